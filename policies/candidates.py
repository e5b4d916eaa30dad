"""The layouts and plans that the shipped policies choose among, and the choice by belief that they share.

The set is small on purpose: every layout is captured before step 0, and every plan is priced at each decision.

Shape letters: H steps of history, L MoE layers, E routed experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .contract import ByTokens, DeviceSpec, Mechanism, Observation, Plan, Setup, Slice, SliceLayout, TileVariant
from .layouts import co_resident_layout, default_variant, fits_together, max_ctas_per_sm, one_slice_plan, shared_slice

COLD_SM_SHARES = (0.25, 0.375, 0.5)
"""Shares of the SMs that exclusive splits give to the cold slice."""
BOUND_TILES = (1, 2, 4)
"""Rules by tokens call an expert cold below this many cold tiles of rows."""


def usable_variants(setup: Setup) -> tuple[TileVariant, ...]:
    """Return the tile variants of which the device holds at least one CTA per SM.

    Raises:
        ValueError: there is none.
    """
    usable = tuple(v for v in setup.variants if max_ctas_per_sm(v, setup.device))
    if not usable:
        names = ", ".join(v.name for v in setup.variants) or "no tiles"
        raise ValueError(f"{setup.device.name} holds none of {names}; give a smaller tile variant")
    return usable


def default_tile(setup: Setup) -> str:
    """Return the tile that fits the device and comes nearest to 64 by 128."""
    return default_variant(replace(setup, variants=usable_variants(setup))).name


def snap_sms(sms: float, device: DeviceSpec) -> int:
    """Return the nearest number of SMs that a green context may own, leaving room for one more context."""
    step, least = device.sm_partition_step, device.sm_partition_min
    most = (device.sm_count - least) // step * step
    return int(min(max(round(sms / step) * step, least), most))


def unsliced_plans(setup: Setup) -> tuple[Plan, ...]:
    """Return one plan for each tile that fits, once per SM and where that fits twice; the default tile comes first."""
    first = default_tile(setup)
    names = sorted((v.name for v in usable_variants(setup)), key=lambda name: name != first)
    slices = [
        shared_slice(setup, name, name, ctas_per_sm=ctas)
        for name in names
        for ctas in range(1, 1 + min(2, max_ctas_per_sm(setup.variant(name), setup.device)))
    ]
    return tuple(one_slice_plan(SliceLayout(slices=(one,))) for one in slices)


def tile_pairs(setup: Setup) -> tuple[tuple[TileVariant, TileVariant], ...]:
    """Return (cold, hot) tiles that share an SM: of each pair of shapes the one with the deepest pipelines.

    Cold tiles have 128 columns and as few rows as any, or 64; hot ones have more rows. The largest come first.
    """
    usable = usable_variants(setup)
    cold_rows = {min(v.block_m for v in usable), 64}
    best: dict[tuple[int, ...], tuple[TileVariant, TileVariant]] = {}
    for cold in (v for v in usable if v.block_m in cold_rows and v.block_n == 128):
        for hot in (v for v in usable if v.block_m > cold.block_m and v.block_m >= 64):
            shape = (-cold.block_m, -hot.block_m, hot.block_n)
            known = best.get(shape)
            if fits_together((cold, hot), setup.device) and (not known or _depth(cold, hot) > _depth(*known)):
                best[shape] = (cold, hot)
    return tuple(best[shape] for shape in sorted(best))


def _depth(*pair: TileVariant) -> int:
    return sum(v.num_stages * v.block_k for v in pair)


def sharing_plans(setup: Setup) -> tuple[Plan, ...]:
    """Return hot beside cold on every SM, for each pair of tiles and bound."""
    if "sm_budget" not in setup.mechanisms:
        return ()
    return tuple(
        by_tokens_plan(co_resident_layout(setup, (cold.name, hot.name)), tiles * cold.block_m)
        for cold, hot in tile_pairs(setup)
        for tiles in BOUND_TILES
    )


def splitting_plans(setup: Setup) -> tuple[Plan, ...]:
    """Return hot and cold on SMs of their own, for the first pair of tiles and a few splits and bounds."""
    pairs = tile_pairs(setup)
    if "green_context" not in setup.mechanisms or not pairs:
        return ()
    cold, hot = pairs[0]
    sms = setup.device.sm_count
    splits = sorted({snap_sms(share * sms, setup.device) for share in COLD_SM_SHARES})
    layouts = [hot_cold_split(setup, cold, hot, cold_sms) for cold_sms in splits]
    return tuple(by_tokens_plan(layout, tiles * cold.block_m) for layout in layouts for tiles in BOUND_TILES[:2])


def hot_cold_split(setup: Setup, cold: TileVariant, hot: TileVariant, cold_sms: int) -> SliceLayout:
    """Return two green contexts, cold first, which between them own all SMs that the partition step allows."""
    device = setup.device
    hot_sms = (device.sm_count - cold_sms) // device.sm_partition_step * device.sm_partition_step
    return SliceLayout(
        slices=(exclusive_slice(device, cold, cold_sms), exclusive_slice(device, hot, hot_sms)),
    )


def exclusive_slice(
    device: DeviceSpec, tile: TileVariant, sm_count: int, mechanism: Mechanism = "green_context"
) -> Slice:
    """Return a slice that owns `sm_count` SMs, with two CTAs of its tile on each where they fit."""
    ctas = min(2, max_ctas_per_sm(tile, device))
    return Slice(
        mechanism=mechanism,
        sm_count=sm_count,
        num_ctas=ctas * sm_count,
        ctas_per_sm=ctas,
        up=tile.name,
        down=tile.name,
    )


def by_tokens_plan(layout: SliceLayout, bound: int) -> Plan:
    """Return the plan that runs experts below `bound` tokens on slice 0 and the others on slice 1."""
    return Plan(layout=layout, placement=ByTokens(bounds=(bound,), slice_ids=(0, 1)))


def layouts_of(plans: Sequence[Plan]) -> tuple[SliceLayout, ...]:
    """Return the layouts of the plans, each once, in order."""
    return tuple(dict.fromkeys(plan.layout for plan in plans))


def sampled_steps(counts_HLE: NDArray[np.int32], num_samples: int) -> list[NDArray[np.int32]]:
    """Return up to `num_samples` steps of the history, newest first and evenly back.

    Whole steps rather than their mean: the mean of sparse counts makes every expert look active.
    """
    newest = counts_HLE.shape[0] - 1
    picks = np.linspace(newest, 0, min(num_samples, newest + 1)).round().astype(int)
    return [counts_HLE[pick] for pick in dict.fromkeys(picks.tolist()) if counts_HLE[pick].any()]


def plan_costs_ns(setup: Setup, plans: Sequence[Plan], samples: Sequence[NDArray[np.int32]]) -> list[float]:
    """Return what the belief says each plan takes over the sampled steps.

    Plans of one layout that place the samples' experts alike are priced once. A plan that leaves a slice without any
    expert in every sample costs infinity: a plan with fewer slices does the same.
    """
    assert setup.belief is not None
    priced: dict[tuple[SliceLayout, bytes], float] = {}
    costs: list[float] = []
    for plan in plans:
        ids = [_placed_ids(plan, counts_LE) for counts_LE in samples]
        key = (plan.layout, b"".join(one.tobytes() for one in ids))
        if key not in priced:
            used = {int(i) for one, counts_LE in zip(ids, samples, strict=True) for i in np.unique(one[counts_LE > 0])}
            idle = len(used) < plan.layout.num_slices
            priced[key] = float("inf") if idle else sum(setup.belief.step_ns(plan, one) for one in samples)
        costs.append(priced[key])
    return costs


def _placed_ids(plan: Plan, counts_LE: NDArray[np.int32]) -> NDArray[np.int16]:
    if isinstance(plan.placement, ByTokens):
        return plan.placement.slice_of_expert_E(0, counts_LE)
    return plan.placement.slice_of_expert_LE


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Plans to choose among and the one chosen; the first num_unsliced of them are unsliced."""

    setup: Setup
    plans: tuple[Plan, ...]
    num_unsliced: int
    index: int = 0
    decided_step: int | None = None
    tokens: int = 0

    @property
    def plan(self) -> Plan:
        """Return the chosen plan."""
        return self.plans[self.index]


def is_due(choice: Choice, obs: Observation, every_steps: int) -> bool:
    """Return whether to choose again: every `every_steps`, or after a quarter of that when the load has doubled.

    A step may come in a burst, so the total of the newest counts is compared with that of the last decision.
    """
    if choice.decided_step is None or obs.step < choice.decided_step:
        return True
    age = obs.step - choice.decided_step
    if age >= every_steps:
        return True
    if age * 4 < every_steps:
        return False
    tokens = int(obs.counts_HLE[-1].sum())
    return not choice.tokens <= 2 * tokens <= 4 * choice.tokens


def choose(choice: Choice, obs: Observation, *, num_samples: int, min_gain: float, stickiness: float) -> Choice:
    """Return the choice that the belief finds cheapest on recent steps; ties go to the earlier plan.

    A sliced plan must be cheaper than the best unsliced one by the fraction `min_gain`, and any plan cheaper than
    the one in place by `stickiness`.
    """
    samples = sampled_steps(obs.counts_HLE, num_samples)
    if not samples or choice.setup.belief is None:
        return choice
    costs = np.asarray(plan_costs_ns(choice.setup, choice.plans, samples), dtype=np.float64)
    costs[: choice.num_unsliced] *= 1.0 - min_gain
    costs[choice.index] *= 1.0 - stickiness
    index = int(costs.argmin()) if np.isfinite(costs).any() else choice.index
    return replace(choice, index=index, decided_step=obs.step, tokens=int(obs.counts_HLE[-1].sum()))
