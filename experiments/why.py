"""Why a ranking is as it is, in sentences. Every figure is computed from the terms and the outcomes.

Shape letters: L MoE layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..policies.contract import Plan
from ..policies.cost import CostModel
from ..traces.schema import RoutedStep
from .ranking import REFERENCE, Outcomes
from .simulate import Outcome, other_work_of
from .table import effect_words, share_words
from .terms import LayerTerms, layer_terms, mean, weighted

BESIDE = 0.1
"""Hot and cold stand side by side in a layer when each takes at least this part of its experts' time."""
GAIN_WORTH = 0.5
"""Percent by which a layer must be faster to count as one where something was gained."""

CONTROL_WORTH = 0.005
"""Part of a step that a better tile of the control must save to be told."""


Row = Mapping[str, Any]
"""A policy's row of the ranking."""


def explain(
    rows: Sequence[Row],
    main: Outcomes,
    truth: CostModel,
    plan: Plan,
    steps: Sequence[RoutedStep],
    controls: Sequence[Plan],
) -> dict[str, Any]:
    """Return why the ranking is as it is, from the runs behind it and the simulator's truth on a sample of steps.

    `plan` is what the unsliced policy ran most, `controls` are all the unsliced plans that it could have run. Plain
    values come back: the best policy, sentences, and each layer's terms with how much faster the best policy is there.
    Best is the fastest policy that is surely faster than unsliced, else the fastest but unsliced itself.
    """
    terms = layer_terms(truth, plan, steps)
    others = [row for row in rows if row["deployable"] and row["policy"] != REFERENCE]
    best = min(others, key=lambda row: not row["surely_faster"], default=None)
    name = best["policy"] if best else None
    ours, theirs = main[name or REFERENCE].layer_ns_L, main[REFERENCE].layer_ns_L
    gain_L = [float(100 * (1 - a / b)) if b else 0.0 for a, b in zip(ours, theirs, strict=True)]
    sentences = [_where_time_goes(terms), _room(terms)]
    if best is None:
        sentences += ["No other deployable policy was asked for."]
    elif best["surely_faster"]:
        sentences += _gain(best, main, terms, gain_L)
    else:
        sentences += [_no_gain(rows, best), f"{_dominant(terms)}."]
    slowest = max((row for row in rows if row["deployable"]), key=lambda row: row["effect_percent"])
    sentences += [_loss(slowest, main[slowest["policy"]])] if slowest["surely_slower"] else []
    sentences += _control(truth, plan, steps, controls)
    layers = [asdict(t) | {"bound": t.bound, "gain_percent": gain} for t, gain in zip(terms, gain_L, strict=True)]
    return {"best": name, "sentences": sentences, "layers": layers}


def _control(truth: CostModel, plan: Plan, steps: Sequence[RoutedStep], controls: Sequence[Plan]) -> list[str]:
    """Say how far the unsliced policy's tile is from the best it could have run: that is no merit of slicing."""

    def ns(one: Plan) -> int:
        return sum(truth.step_ns(one, step.counts_LE, other_work_of(step, truth.model)) for step in steps)

    ran_ns, best_ns, best = ns(plan), *min(((ns(one), one) for one in controls), key=lambda found: found[0])
    lost = 1 - best_ns / ran_ns
    if lost < CONTROL_WORTH:
        return []
    ran, could = (f"{one.layout.slices[0].up}, {one.layout.slices[0].ctas_per_sm} an SM" for one in (plan, best))
    return [
        f"Unsliced mostly runs tile {ran}; on the sampled steps {could}, would save {share_words(lost, 1)}: so much of "
        "any gain is the control's choice of tile, not slicing."
    ]


def _where_time_goes(terms: Sequence[LayerTerms]) -> str:
    said = {
        "cold_share": f"{mean(terms, 'cold_experts'):.1f} cold experts a layer, bound by memory "
        f"({mean(terms, 'cold_tokens'):.1f} tokens each)",
        "hot_share": f"{mean(terms, 'hot_experts'):.1f} hot ones, bound by arithmetic "
        f"({mean(terms, 'hot_tokens'):.0f} tokens each)",
        "waste_share": "waves that are not full and padded rows",
        "launch_share": "routing, launches and combining",
        "other_share": "attention and other dense work",
    }
    shares = {name: weighted(terms, name) for name in said}
    parts = [f"{share_words(shares[name])} to {words}" for name, words in said.items() if shares[name] >= 0.005]
    parts[0] = parts[0].replace(" to ", " of an unsliced step's time goes to ", 1)
    return f"{_and(parts)}."


def _room(terms: Sequence[LayerTerms]) -> str:
    beside = [t for t in terms if min(t.cold_share, t.hot_share) >= BESIDE * (t.cold_share + t.hot_share) > 0]
    overlap, waste, floor = (weighted(terms, name) for name in ("overlap_share", "waste_share", "floor_share"))
    where = f"in {layer_words([t.layer for t in beside])}" if beside else "in no layer"
    return (
        f"Both kinds stand side by side {where}: overlapping them perfectly would save {share_words(overlap, 1)} of "
        f"the step, waves without gaps and padding {share_words(waste, 1)}; the experts' physical floor is "
        f"{share_words(floor)} of it."
    )


def layer_words(layers: Sequence[int]) -> str:
    """Return layers as ranges: "layers 0-2 and 5"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {_and(words)}"


def _and(words: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _gain(best: Row, main: Outcomes, terms: Sequence[LayerTerms], gain_L: Sequence[float]) -> list[str]:
    def bound_by(layers: Sequence[int]) -> str:
        return f"bound by {' or '.join(sorted({terms[layer].bound for layer in layers}))}"

    gained = [layer for layer, gain in enumerate(gain_L) if gain >= GAIN_WORTH]
    flat = [layer for layer, gain in enumerate(gain_L) if gain < GAIN_WORTH]
    sliced = share_words(1 - best["unsliced_share"])
    said = f"{best['policy']} lies at {effect_words(best)}, slicing {sliced} of the steps"
    if gained:
        average = sum(gain_L[layer] for layer in gained) / len(gained)
        said += f": it is {average:.1f} % faster in {layer_words(gained)}, {bound_by(gained)}"
    # At which rate the same bytes move is what a gain amounts to where memory binds.
    runs = (main[name] for name in (best["policy"], REFERENCE))
    ours, theirs = (run.hbm_bytes / run.makespan_ns / 1e3 for run in runs)
    rates = f"Over the whole run it moves its bytes at {ours:.2f} TB/s, unsliced at {theirs:.2f} TB/s."
    nothing = [f"Nothing to gain in {layer_words(flat)} ({bound_by(flat)})."] if flat and gained else []
    return [f"{said}.", rates, *nothing]


def _no_gain(rows: Sequence[Row], best: Row) -> str:
    said = f"Nothing to gain that can be told from noise: {best['policy']} lies at {effect_words(best)}"
    if best["unsliced_share"] == 1:
        said += ", never finding a slice worth it"
    for bound in [row for row in rows if not row["deployable"]][:1]:
        known = "who knows the coming step and is not deployable"
        said += f"; {bound['policy']}, {known}, lies at {effect_words(bound)}"
    return said + "."


def _dominant(terms: Sequence[LayerTerms]) -> str:
    takes = {
        "cold_share": "Reading the weights of cold experts takes",
        "hot_share": "The arithmetic of hot experts takes",
        "waste_share": "Waves that are not full and padded rows take",
        "launch_share": "Routing, launches and combining take",
        "other_share": "Attention and other dense work take",
    }
    share, name = max((weighted(terms, name), name) for name in takes)
    changed = ", which slices share out but do not shorten" if share > 0.5 else ""
    return f"{takes[name]} {share_words(share)} of the time{changed}"


def _loss(loser: Row, run: Outcome) -> str:
    busy = ", ".join(share_words(one["busy_share"]) for one in loser["layouts"][0]["slices"])
    lost = (run.reconfigure_ns + run.capture_ns + run.stall_ns) / run.makespan_ns
    changes = f", and changing plans costs {share_words(lost, 1)}" if lost >= 0.001 else ""
    return f"{loser['policy']} loses, at {effect_words(loser)}: its slices are busy {busy} of the time{changes}."
