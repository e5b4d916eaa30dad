"""Whether a device can hold a plan: one pure function that both backends call before they carry it out.

The rules, beyond those that `contract.Slice` states:
- A layout is all MIG, all green contexts, or any mix of shared and sm_budget. A process sees one MIG instance, and a
  grid outside a green context may run on its SMs, so that what claims to be exclusive would not be.
- Bounded grids (sm_budget) are assumed spread evenly. Where their SMs add up to more than the device has, one SM holds
  ctas_per_sm of each of them, and those must fit together. Shared slices queue for room, so they need not.

Shape letters: L MoE layers, E routed experts, S slices of a layout.
"""

from functools import lru_cache
from itertools import pairwise

import numpy as np

from .contract import (
    EXCLUSIVE,
    MECHANISMS,
    ByTokens,
    DeviceSpec,
    Mechanism,
    Pinned,
    Plan,
    Setup,
    Slice,
    SliceLayout,
    TileVariant,
)
from .layouts import SMEM_RESERVED_BYTES, max_ctas_per_sm
from .mig import illegality, profile_of

STREAM_PRIORITIES = range(-5, 1)
"""What CUDA offers; lower is served first."""


class PlanError(ValueError):
    """A plan that the device cannot hold."""


def validate(plan: Plan, setup: Setup) -> None:
    """Check that the device of `setup` can hold the plan.

    The layout's part is remembered by value, so that a call per step costs microseconds.

    Raises:
        PlanError: naming what was given, what is allowed and what to do.
    """
    _check_layout(plan.layout, setup.device, setup.variants, setup.mechanisms)
    if plan.tile_order not in ("expert", "heavy", "light"):
        raise PlanError(f"plan has tile order {plan.tile_order!r}; use expert, heavy or light")
    if plan.steal and plan.layout.mig:
        raise PlanError("plan lets slices steal across MIG instances, which share no memory; set steal=False")
    if isinstance(plan.placement, ByTokens):
        _check_by_tokens(plan.placement, plan.layout.num_slices)
    else:
        _check_pinned(plan.placement, plan.layout.num_slices, (setup.model.num_layers, setup.model.num_experts))


def _check_by_tokens(rule: ByTokens, num_slices: int) -> None:
    if len(rule.slice_ids) != len(rule.bounds) + 1:
        raise PlanError(
            f"rule by tokens has {len(rule.bounds)} bounds and {len(rule.slice_ids)} slices; "
            "give one slice more than bounds"
        )
    if any(a >= b for a, b in pairwise((-1, *rule.bounds))):
        raise PlanError(f"rule by tokens has bounds {rule.bounds}; give token counts from 0 up, strictly rising")
    for slice_id in rule.slice_ids:
        if not 0 <= slice_id < num_slices:
            raise PlanError(
                f"rule by tokens names slice {slice_id}; the layout has slices 0..{num_slices - 1}, use one"
            )


def _check_pinned(pinned: Pinned, num_slices: int, shape: tuple[int, int]) -> None:
    ids_LE = pinned.slice_of_expert_LE
    if ids_LE.shape != shape:
        raise PlanError(
            f"plan pins experts of shape {list(ids_LE.shape)}; the model has [layers, experts] {list(shape)}"
        )
    if ids_LE.dtype != np.int16:
        raise PlanError(f"plan pins experts as {ids_LE.dtype}; convert them to int16")
    if int(ids_LE.min()) < 0 or int(ids_LE.max()) >= num_slices:
        layer, expert = np.argwhere((ids_LE < 0) | (ids_LE >= num_slices))[0]
        raise PlanError(
            f"plan puts expert {expert} of layer {layer} on slice {ids_LE[layer, expert]}; "
            f"the layout has slices 0..{num_slices - 1}, use one"
        )


@lru_cache(maxsize=4096)
def _check_layout(
    layout: SliceLayout, device: DeviceSpec, variants: tuple[TileVariant, ...], mechanisms: frozenset[Mechanism]
) -> None:
    if not layout.slices:
        raise PlanError("layout has no slices; give at least one")
    by_name = {v.name: v for v in variants}
    _check_mechanisms(layout, mechanisms)
    for index, one in enumerate(layout.slices):
        where = f"slice {index}"
        _check_tiles(one, where, by_name, device)
        _check_ctas(one, where, device)
    _check_together(layout, by_name, device)
    _check_exclusive(layout, device)
    _check_mig(layout, device)


def _check_mechanisms(layout: SliceLayout, mechanisms: frozenset[Mechanism]) -> None:
    used = {one.mechanism for one in layout.slices}
    for mechanism in sorted(used):
        if mechanism not in mechanisms:
            allowed = ", ".join(m for m in MECHANISMS if m in mechanisms) or "none"
            raise PlanError(f"layout uses mechanism {mechanism!r}; this setup allows {allowed}, use one of them")
    if len(used) > 1 and used & EXCLUSIVE:
        raise PlanError(
            f"layout mixes {' and '.join(sorted(used))}; only shared and sm_budget mix, because a grid outside an "
            "exclusive slice may still run on its SMs: use one mechanism"
        )


def _check_tiles(one: Slice, where: str, by_name: dict[str, TileVariant], device: DeviceSpec) -> None:
    if one.ctas_per_sm < 1:
        raise PlanError(f"{where} asks for {one.ctas_per_sm} CTAs per SM; give at least 1")
    for tile in (one.up, one.down):
        if tile not in by_name:
            raise PlanError(f"{where} names tile {tile!r}; this setup has {', '.join(by_name)}, use one of them")
        fit = max_ctas_per_sm(by_name[tile], device)
        if one.ctas_per_sm > fit:
            raise PlanError(
                f"{where} asks for {one.ctas_per_sm} CTAs of tile {tile} per SM; an SM of {device.name} holds {fit}, "
                "ask for fewer or take a smaller tile"
            )


def _check_ctas(one: Slice, where: str, device: DeviceSpec) -> None:
    if not 1 <= one.sm_count <= device.sm_count or one.num_ctas < 1:
        raise PlanError(
            f"{where} has {one.sm_count} SMs and {one.num_ctas} CTAs; "
            f"give 1..{device.sm_count} SMs on {device.name} and at least 1 CTA"
        )
    needed = -(-one.num_ctas // one.ctas_per_sm)
    if one.mechanism in EXCLUSIVE and needed > one.sm_count:
        raise PlanError(
            f"{where} has {one.num_ctas} CTAs at {one.ctas_per_sm} per SM on {one.sm_count} SMs; they hold "
            f"{one.sm_count * one.ctas_per_sm}, give no more"
        )
    if one.mechanism not in EXCLUSIVE and needed != one.sm_count:
        raise PlanError(
            f"{where} has sm_count {one.sm_count} for {one.num_ctas} CTAs at {one.ctas_per_sm} per SM; "
            f"a {one.mechanism} slice owns no SMs, set sm_count to {needed}"
        )
    if one.stream_priority not in STREAM_PRIORITIES:
        raise PlanError(f"{where} has stream priority {one.stream_priority}; CUDA offers -5 (first) to 0, use one")


def _check_together(layout: SliceLayout, by_name: dict[str, TileVariant], device: DeviceSpec) -> None:
    bounded = [one for one in layout.slices if one.mechanism == "sm_budget"]
    if sum(one.sm_count for one in bounded) <= device.sm_count:
        return
    # Slices reach their products at different times, so each counts with the worse of its two tiles.
    pairs = [(one.ctas_per_sm, (by_name[one.up], by_name[one.down])) for one in bounded]
    held = {
        "bytes of shared memory": sum(n * (max(v.smem_bytes for v in vs) + SMEM_RESERVED_BYTES) for n, vs in pairs),
        "registers": sum(n * max(v.regs_per_cta for v in vs) for n, vs in pairs),
        "threads": sum(n * 32 * max(v.num_warps for v in vs) for n, vs in pairs),
    }
    limits = (device.smem_per_sm_bytes + SMEM_RESERVED_BYTES, device.regs_per_sm, device.threads_per_sm)
    for (what, need), limit in zip(held.items(), limits, strict=True):
        if need > limit:
            raise PlanError(
                f"sm_budget slices hold {need} {what} together on one SM; {device.name} has {limit}, "
                "take smaller tiles, fewer CTAs per SM, or grids that add up to the device's SMs"
            )


def _check_exclusive(layout: SliceLayout, device: DeviceSpec) -> None:
    owners = [one for one in layout.slices if one.mechanism in EXCLUSIVE]
    total = sum(one.sm_count for one in owners)
    if total > device.sm_count:
        raise PlanError(f"exclusive slices own {total} SMs; {device.name} has {device.sm_count}, give fewer")
    least, step = device.sm_partition_min, device.sm_partition_step
    for one in owners:
        if one.mechanism == "green_context" and (one.sm_count < least or one.sm_count % step):
            raise PlanError(
                f"green context of {one.sm_count} SMs; {device.name} splits in multiples of {step} from {least} up, "
                "round to one"
            )


def _check_mig(layout: SliceLayout, device: DeviceSpec) -> None:
    is_mig = layout.slices[0].mechanism == "mig"
    if not is_mig:
        if layout.mig or any(one.instance is not None for one in layout.slices):
            raise PlanError("layout names MIG instances but its slices use another mechanism; use mig or drop them")
        return
    if problem := illegality(layout.mig, device):
        raise PlanError(problem)
    taken = [one.instance for one in layout.slices]
    if len(set(taken)) != len(taken) or not set(taken) <= set(range(len(layout.mig))):
        raise PlanError(
            f"MIG slices run on instances {taken}; the layout has instances 0..{len(layout.mig) - 1}, "
            "give each slice its own"
        )
    for one in layout.slices:
        assert one.instance is not None
        profile = profile_of(layout.mig[one.instance].profile, device)
        if one.sm_count != profile.sm_count:
            raise PlanError(
                f"MIG slice of {one.sm_count} SMs on a {profile.name}; that instance has {profile.sm_count}, set that"
            )
