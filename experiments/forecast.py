"""How well the load some steps ahead is predicted: the online predictor beside persistence and popularity.

The predictor's form is fixed and its weights are learned online; what counts are steps of requests that it has not
seen. The error is the part of a layer's rows that was expected at the wrong experts, 0 to 1. A batch is a sample, so
no prediction reaches 0.

Shape letters: N steps, L MoE layers, E routed experts.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..policies.predictor import shares, untrained
from ..traces.schema import I32
from .case import Options, prepare
from .halves import learn_then_judge
from .runs import RunFolder, provenance

METHODS = ("predicted", "persistence", "popularity")
HISTORY = 16
HORIZONS = (1, 2, 4, 8, 16)


def forecast(
    options: Options, *, batches: tuple[int | None, ...], splits: int, learn_steps: int, judge_steps: int, out: Path
) -> tuple[list[dict[str, Any]], Path]:
    """Return rows of mean errors by batch size, split, horizon and method, and the folder that holds them.

    Raises:
        ValueError: the trace cannot be used, or holds too few requests to split.
    """
    case = prepare(replace(options, policies=("unsliced",)))
    if case.rebatch is None:
        raise ValueError(f"{case.opened.name} has too few requests to split; give a trace of at least 8 requests")
    if learn_steps <= HISTORY:
        raise ValueError(f"{learn_steps} steps are too few to learn from; give more than {HISTORY}")
    trace, like = case.rebatch
    rows: list[dict[str, Any]] = []
    facts = {"trace": case.opened.name, "trace_sha256": case.opened.sha256}
    for batch in batches:
        batched = replace(like, batch_size=batch, max_tokens_per_step=None) if batch else like
        for seed in range(options.seed, options.seed + splits):
            source = learn_then_judge(trace, batched, learn_steps=learn_steps, judge_steps=judge_steps, seed=seed)
            counts_NLE = np.stack([step.counts_LE for step in source.kept])
            for horizon in HORIZONS:
                found = dict(zip(METHODS, errors(counts_NLE, horizon, learn_steps), strict=True))
                shared = {**facts, "batch_size": batched.batch_size, "seed": seed, "horizon": horizon}
                rows += [{**shared, "method": method, "error": error} for method, error in found.items()]
    asked = {"learn_steps": learn_steps, "judge_steps": judge_steps, "splits": splits, "seed": options.seed}
    folder = RunFolder(out, "forecast", {**provenance(), **asked, "trace": case.opened.plain()})
    pq.write_table(pa.Table.from_pylist(rows), folder.path / "rows.parquet")
    draw(rows, folder.path)
    return rows, folder.finish()


def errors(counts_NLE: I32, horizon: int, first: int) -> tuple[float, float, float]:
    """Return the mean error of each method over predictions made from step `first` on for `horizon` steps later."""
    predictor, share_NLE = untrained(*counts_NLE.shape[1:], horizon), shares(counts_NLE)
    found: list[tuple[float, ...]] = []
    for newest in range(HISTORY, len(counts_NLE) - horizon):
        history_HLE = counts_NLE[newest - HISTORY + 1 : newest + 1]
        predictor = predictor.learned(history_HLE)
        if newest >= first:
            popular_LE = predictor.popular_LE / predictor.seen
            guesses = predictor.predicted(history_HLE), share_NLE[newest], popular_LE
            then_LE = share_NLE[newest + horizon]
            found.append(tuple(float(np.abs(guess - then_LE).sum(axis=1).mean()) / 2 for guess in guesses))
    if not found:
        raise ValueError(f"no step lies {horizon} steps after one that is judged; judge more steps")
    means = np.mean(found, axis=0).tolist()
    return means[0], means[1], means[2]


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """Draw the errors by horizon, a panel for each batch size."""
    from .plotting import PALETTE, axes, finish, styled

    sizes = sorted({row["batch_size"] for row in rows})
    with styled():
        figure, panels = axes(2.4, ncols=len(sizes), squeeze=False, sharey=True)
        for ax, size in zip(panels[0], sizes, strict=True):
            for method, colour in zip(METHODS, PALETTE, strict=False):
                of_h = [
                    np.mean(
                        [r["error"] for r in rows if (r["batch_size"], r["method"], r["horizon"]) == (size, method, h)]
                    )
                    for h in HORIZONS
                ]
                ax.plot(HORIZONS, of_h, marker="o", markersize=3, color=colour, label=method)
            ax.set(xscale="log", title=f"{size} requests at once", xlabel="steps ahead", ylim=(0, None))
            ax.set_xticks(HORIZONS, map(str, HORIZONS))
        panels[0][0].set_ylabel("rows expected elsewhere")
        panels[0][0].legend()
        words = "Part of a layer's rows expected at other experts than they went to, on requests never seen."
        finish(figure, "forecast", "Predicted load", words, folder)
