"""Whether a device can hold a plan: one pure function that both backends call before they carry it out.

The rules, beyond those that `contract.Slice` states:
- A layout is all MIG, all green contexts, or any mix of shared and sm_budget. A process sees one MIG instance, and a
  grid outside a green context may run on its SMs, so that what claims to be exclusive would not be.
- Bounded grids (sm_budget) are assumed spread evenly. Where their SMs add up to more than the device has, one SM holds
  ctas_per_sm of each of them, and those must fit together. Shared slices queue for room, so they need not.

Every check yields sentences that name what was given, what is allowed and what to do.

Shape letters: L MoE layers, E routed experts, S slices.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, pairwise
from typing import get_args

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
    TileOrder,
    TileVariant,
)
from .layouts import SMEM_RESERVED_BYTES, max_ctas_per_sm
from .mig import illegality, profile_of

TILE_ORDERS = get_args(TileOrder)
STREAM_PRIORITIES = range(-5, 1)
"""What CUDA offers; lower is served first."""


class PlanError(ValueError):
    """A plan that the device cannot hold."""


def validate(plan: Plan, setup: Setup, *, checked: SliceLayout | None = None) -> None:
    """Check that the device of `setup` can hold the plan; a layout that was `checked` there is not looked at again.

    The layout's part is remembered by value, so that a call per step costs microseconds.

    Raises:
        PlanError: naming what was given, what is allowed and what to do.
    """
    known = plan.layout is checked
    problem = None if known else _layout_problem(plan.layout, setup.device, setup.variants, setup.mechanisms)
    if problem := problem or next(_of_plan(plan, setup), None):
        raise PlanError(problem)


def _of_plan(plan: Plan, setup: Setup) -> Iterator[str]:
    num_slices = plan.layout.num_slices
    if plan.tile_order not in TILE_ORDERS:
        yield f"plan has tile order {plan.tile_order!r}; use expert, heavy or light"
    if plan.steal and plan.layout.mig:
        yield "plan lets slices steal across MIG instances, which share no memory; set steal=False"
    if isinstance(plan.placement, ByTokens):
        yield from _of_rule(plan.placement, num_slices)
    else:
        yield from _of_pinned(plan.placement, num_slices, (setup.model.num_layers, setup.model.num_experts))


def _of_rule(rule: ByTokens, num_slices: int) -> Iterator[str]:
    given = f"{len(rule.bounds)} bounds and {len(rule.slice_ids)} slices"
    if len(rule.slice_ids) != len(rule.bounds) + 1:
        yield f"rule by tokens has {given}; give one slice more than bounds"
    if any(a >= b for a, b in pairwise((-1, *rule.bounds))):
        yield f"rule by tokens has bounds {rule.bounds}; give token counts from 0 up, strictly rising"
    for slice_id in rule.slice_ids:
        if not 0 <= slice_id < num_slices:
            yield f"rule by tokens names slice {slice_id}; the layout has slices 0..{num_slices - 1}, use one"


def _of_pinned(pinned: Pinned, num_slices: int, shape: tuple[int, int]) -> Iterator[str]:
    ids_LE = pinned.slice_of_expert_LE
    if ids_LE.shape != shape:
        yield f"plan pins experts of shape {list(ids_LE.shape)}; the model has [layers, experts] {list(shape)}"
    if ids_LE.dtype != np.int16:
        yield f"plan pins experts as {ids_LE.dtype}; convert them to int16"
    # In two's complement what is below 0 lies above every slice: one pass finds both.
    if ids_LE.dtype == np.int16 and np.maximum.reduce(ids_LE.view(np.uint16), axis=None) >= num_slices:
        layer, expert = np.argwhere((ids_LE < 0) | (ids_LE >= num_slices))[0]
        yield (
            f"plan puts expert {expert} of layer {layer} on slice {ids_LE[layer, expert]}; "
            f"the layout has slices 0..{num_slices - 1}, use one"
        )


@lru_cache(maxsize=4096)
def _layout_problem(
    layout: SliceLayout, device: DeviceSpec, variants: tuple[TileVariant, ...], mechanisms: frozenset[Mechanism]
) -> str | None:
    if not layout.slices:
        return "layout has no slices; give at least one"
    tiles = {v.name: v for v in variants}
    of_slices = (
        chain(_of_tiles(one, f"slice {i}", tiles, device), _of_ctas(one, f"slice {i}", device))
        for i, one in enumerate(layout.slices)
    )
    checks = chain(
        _of_mechanisms(layout, mechanisms),
        *of_slices,
        _of_co_residents(layout, tiles, device),
        _of_owners(layout, device),
        _of_instances(layout, device),
    )
    return next(checks, None)


def _of_mechanisms(layout: SliceLayout, mechanisms: frozenset[Mechanism]) -> Iterator[str]:
    used = {one.mechanism for one in layout.slices}
    for mechanism in sorted(used - mechanisms):
        allowed = ", ".join(m for m in MECHANISMS if m in mechanisms) or "none"
        yield f"layout uses mechanism {mechanism!r}; this setup allows {allowed}, use one of them"
    if len(used) > 1 and used & EXCLUSIVE:
        yield (
            f"layout mixes {' and '.join(sorted(used))}; only shared and sm_budget mix, because a grid outside an "
            "exclusive slice may still run on its SMs: use one mechanism"
        )


def _of_tiles(one: Slice, where: str, tiles: dict[str, TileVariant], device: DeviceSpec) -> Iterator[str]:
    if one.ctas_per_sm < 1:
        yield f"{where} asks for {one.ctas_per_sm} CTAs per SM; give at least 1"
    for tile in (one.up, one.down):
        if tile not in tiles:
            yield f"{where} names tile {tile!r}; this setup has {', '.join(tiles)}, use one of them"
        elif one.ctas_per_sm > (fit := max_ctas_per_sm(tiles[tile], device)):
            yield (
                f"{where} asks for {one.ctas_per_sm} CTAs of tile {tile} per SM; an SM of {device.name} holds {fit}, "
                "ask for fewer or take a smaller tile"
            )


def _of_ctas(one: Slice, where: str, device: DeviceSpec) -> Iterator[str]:
    given = f"{where} has {one.num_ctas} CTAs at {one.ctas_per_sm} per SM on {one.sm_count} SMs"
    if not 1 <= one.sm_count <= device.sm_count or one.num_ctas < 1:
        yield f"{given}; give 1..{device.sm_count} SMs on {device.name} and at least 1 CTA"
    needed = -(-one.num_ctas // one.ctas_per_sm)
    if one.mechanism in EXCLUSIVE and needed > one.sm_count:
        yield f"{given}; they hold {one.sm_count * one.ctas_per_sm}, give no more"
    if one.mechanism not in EXCLUSIVE and needed != one.sm_count:
        yield f"{given}; a {one.mechanism} slice owns no SMs, set sm_count to {needed}"
    if one.stream_priority not in STREAM_PRIORITIES:
        yield f"{where} has stream priority {one.stream_priority}; CUDA offers -5 (first) to 0, use one"


def _of_co_residents(layout: SliceLayout, tiles: dict[str, TileVariant], device: DeviceSpec) -> Iterator[str]:
    bounded = [one for one in layout.slices if one.mechanism == "sm_budget"]
    if sum(one.sm_count for one in bounded) <= device.sm_count:
        return
    # Slices reach their products at different times, so each counts with the worse of its two tiles.
    pairs = [(one.ctas_per_sm, (tiles[one.up], tiles[one.down])) for one in bounded]
    smem = sum(n * (max(v.smem_bytes for v in vs) + SMEM_RESERVED_BYTES) for n, vs in pairs)
    held = (
        ("bytes of shared memory", smem, device.smem_per_sm_bytes + SMEM_RESERVED_BYTES),
        ("registers", sum(n * max(v.regs_per_cta for v in vs) for n, vs in pairs), device.regs_per_sm),
        ("threads", sum(n * 32 * max(v.num_warps for v in vs) for n, vs in pairs), device.threads_per_sm),
    )
    for what, need, limit in held:
        if need > limit:
            yield (
                f"sm_budget slices hold {need} {what} together on one SM; {device.name} has {limit}, "
                "take smaller tiles, fewer CTAs per SM, or grids that add up to the device's SMs"
            )


def _of_owners(layout: SliceLayout, device: DeviceSpec) -> Iterator[str]:
    owners = [one for one in layout.slices if one.mechanism in EXCLUSIVE]
    total = sum(one.sm_count for one in owners)
    if total > device.sm_count:
        yield f"exclusive slices own {total} SMs; {device.name} has {device.sm_count}, give fewer"
    least, step = device.sm_partition_min, device.sm_partition_step
    for one in owners:
        if one.mechanism == "green_context" and (one.sm_count < least or one.sm_count % step):
            allowed = f"multiples of {step} from {least} up"
            yield f"green context of {one.sm_count} SMs; {device.name} splits in {allowed}, round to one"


def _of_instances(layout: SliceLayout, device: DeviceSpec) -> Iterator[str]:
    taken = [one.instance for one in layout.slices]
    if layout.slices[0].mechanism != "mig":
        if layout.mig or taken.count(None) < len(taken):
            yield "layout names MIG instances but its slices use another mechanism; use mig or drop them"
        return
    if problem := illegality(layout.mig, device):
        yield problem
    if len(set(taken)) != len(taken) or not set(taken) <= set(range(len(layout.mig))):
        known = f"instances 0..{len(layout.mig) - 1}"
        yield f"MIG slices run on instances {taken}; the layout has {known}, give each slice its own"
    for one in layout.slices:
        assert one.instance is not None
        profile = profile_of(layout.mig[one.instance].profile, device)
        if one.sm_count != profile.sm_count:
            has = f"that instance has {profile.sm_count}"
            yield f"MIG slice of {one.sm_count} SMs on a {profile.name}; {has}, set that"
