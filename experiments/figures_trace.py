"""Figures of a trace's statistics: how skewed, how local, how dependent its routing is.

Shape letters: L MoE layers, E experts, G lags, Z batch sizes.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.statistics import TraceStatistics
from .plotting import INK, PALETTE, Drawn, Sketch, axes, finish, styled

Floats = NDArray[np.float64]


def draw_trace(stats: TraceStatistics, mean_LE: Floats, folder: Path) -> list[Drawn]:
    """Draw every figure that the statistics allow and save it."""
    folder.mkdir(parents=True, exist_ok=True)
    with styled():
        made = [
            _load(stats, mean_LE),
            _overlap(stats),
            _lru(stats),
            _cross_layer(stats),
            _distinct(stats, mean_LE.shape[1]),
        ]
        return [finish(*one, folder) for one in made if one is not None]


def _over_layers(x: Floats, values_LX: Floats) -> tuple[Any, Any]:
    """Draw the median layer as a line over the range of all layers; points that no layer knows are left out."""
    known = ~np.isnan(values_LX).all(axis=0)
    x, values_LX = x[known], values_LX[:, known]
    figure, ax = axes(2.8)
    low_X, high_X = np.nanmin(values_LX, axis=0), np.nanmax(values_LX, axis=0)
    ax.fill_between(x, low_X, high_X, color=PALETTE[0], alpha=0.22, lw=0, label="all layers")
    ax.plot(x, np.nanmedian(values_LX, axis=0), color=PALETTE[0], marker="o", ms=3.5, label="median layer")
    return figure, ax


def _load(stats: TraceStatistics, mean_LE: Floats) -> Sketch:
    share_LE = np.sort(mean_LE / np.maximum(mean_LE.mean(axis=1, keepdims=True), 1e-12), axis=1)[:, ::-1]
    rank = np.arange(1, share_LE.shape[1] + 1)
    figure, ax = _over_layers(rank, share_LE)
    ax.axhline(1, color=INK, lw=0.8, ls=":", label="even load")
    ax.set(xlabel="expert, by falling load", ylabel="tokens, × even share", ylim=(0, None), xlim=(1, rank[-1]))
    ax.legend()
    gini, most = np.nanmedian(stats.gini_L), np.nanmedian(stats.max_mean_L)
    caption = (
        f"The steeper the curve, the more a few experts carry: the fullest expert of the median layer gets {most:.1f} "
        f"times an even share (Gini {gini:.2f})."
    )
    return figure, "trace-load", "Load of the experts", caption


def _overlap(stats: TraceStatistics) -> Sketch | None:
    if stats.overlap_LG is None or np.isnan(stats.overlap_LG).all():
        return None
    figure, ax = _over_layers(np.array(stats.lags_G, float), 100 * stats.overlap_LG)
    independent = 100 * float(np.nanmedian(stats.overlap_independent_L))
    ax.axhline(independent, color=INK, lw=0.8, ls=":", label="independent tokens")
    ax.set_xscale("log", base=2)
    ax.set(xticks=stats.lags_G, xticklabels=stats.lags_G, ylim=(0, None))
    ax.set(xlabel="tokens between the two, same request", ylabel="experts in common, %")
    ax.legend()
    first = 100 * float(np.nanmedian(stats.overlap_LG[:, 0]))
    caption = (
        f"What lies above the dotted line can be predicted from the past: neighbouring tokens share {first:.0f} % of "
        f"their experts, independent ones would share {independent:.0f} %."
    )
    return figure, "trace-overlap", "Experts that tokens have in common", caption


def _lru(stats: TraceStatistics) -> Sketch | None:
    if stats.lru_hit_LE is None:
        return None
    slots = np.arange(stats.lru_hit_LE.shape[1])
    figure, ax = _over_layers(slots.astype(float), 100 * stats.lru_hit_LE)
    ax.plot(slots, 100 * slots / slots[-1], color=INK, lw=0.8, ls=":", label="no locality, even load")
    ax.set(xlabel="experts that the cache holds", ylabel="hits, %", ylim=(0, 100), xlim=(0, slots[-1]))
    ax.legend(loc="lower right")
    half = 100 * float(np.nanmedian(stats.lru_hit_LE[:, len(slots) // 2]))
    caption = (
        f"A least-recently-used cache of half the experts of a layer would hit {half:.0f} % of the time; the further "
        "above the dotted line, the more skew and locality there is to use."
    )
    return figure, "trace-lru", "Hits of a cache of experts", caption


def _cross_layer(stats: TraceStatistics) -> Sketch | None:
    if stats.recall_L is None or stats.recall_popularity_L is None or not len(stats.recall_L):
        return None
    layer = np.arange(1, len(stats.recall_L) + 1)
    figure, ax = axes(2.8)
    ax.plot(layer, 100 * stats.recall_popularity_L, "o-", color=PALETTE[7], ms=4, label="from popularity alone")
    if stats.recall_set_L is not None:
        ax.plot(layer, 100 * stats.recall_set_L, "o-", color=PALETTE[0], ms=4, label="from the layer below")
    ax.set(xlabel="MoE layer", ylabel="experts foretold, %", ylim=(0, 100))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    bits = ""
    if stats.mutual_information_bits_L is not None:
        shared = np.nanmedian(stats.mutual_information_bits_L)
        bits = f"; the first choices of neighbouring layers share {shared:.2f} bit"
    caption = f"The gap between the curves is what a predictor can learn from the layer below{bits}."
    return figure, "trace-layers", "What one layer says about the next", caption


def _distinct(stats: TraceStatistics, num_experts: int) -> Sketch | None:
    if stats.distinct_LZ is None or stats.distinct_independent_LZ is None or np.isnan(stats.distinct_LZ).all():
        return None
    known = ~np.isnan(stats.distinct_LZ).all(axis=0)
    sizes = np.array(stats.batch_sizes_Z, float)[known]
    figure, ax = _over_layers(sizes, stats.distinct_LZ[:, known])
    independent = np.nanmedian(stats.distinct_independent_LZ, axis=0)[known]
    ax.plot(sizes, independent, color=INK, lw=0.8, ls=":", label="independent tokens")
    ax.axhline(num_experts, color=INK, lw=0.6)
    ax.set_xscale("log", base=2)
    ax.set(xticks=sizes, xticklabels=[f"{size:.0f}" for size in sizes], ylim=(0, num_experts * 1.05))
    ax.set(xlabel="requests in the batch, one token each", ylabel="experts in use")
    ax.legend(loc="lower right")
    last = float(np.nanmedian(stats.distinct_LZ[:, known][:, -1]))
    caption = (
        f"Each expert in use must be read from memory once a step: batches of {sizes[-1]:.0f} touch {last:.0f} of "
        f"{num_experts} experts in the median layer."
    )
    return figure, "trace-distinct", "Experts that a batch touches", caption
