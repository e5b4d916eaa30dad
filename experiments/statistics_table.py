"""Trace statistics as rows of a table: median over layers, least and most."""

import numpy as np

from ..traces.statistics import TraceStatistics


def rows_of(stats: TraceStatistics) -> list[list[str]]:
    """Return name, median, least and most of what is known of a trace; what a source does not hold has no row."""
    rows = [
        ("Gini coefficient of the load", stats.gini_L, ".2f"),
        ("fullest expert / mean", stats.max_mean_L, ".1f"),
        ("Zipf exponent", stats.zipf_s_L, ".2f"),
        ("overlap of independent tokens", stats.overlap_independent_L, ".2f"),
        *_columns("overlap, {} token(s) apart", stats.lags_G, stats.overlap_LG, ".2f"),
        ("overlap of two tokens of a request", stats.overlap_request_L, ".2f"),
        ("divergence of a request's load, bit", stats.jsd_bits_L, ".3f"),
        ("bits shared with the layer below", stats.mutual_information_bits_L, ".2f"),
        ("recall from the layer below", stats.recall_set_L, ".2f"),
        ("recall from popularity", stats.recall_popularity_L, ".2f"),
        *_columns("experts used by a batch of {}", stats.batch_sizes_Z, stats.distinct_LZ, ".1f"),
        *_columns("fullest / mean in a batch of {}", stats.batch_sizes_Z, stats.step_max_mean_LZ, ".1f"),
    ]
    return [
        [name, *(format(over(values_L), form) for over in (np.nanmedian, np.nanmin, np.nanmax))]
        for name, values_L, form in rows
        if values_L is not None and not np.isnan(values_L).all()
    ]


def _columns(name: str, labels: tuple[int, ...], values_LX: np.ndarray | None, form: str) -> list[tuple]:
    """Return one row for each column that a source may hold."""
    if values_LX is None:
        return []
    return [(name.format(label), values_L, form) for label, values_L in zip(labels, values_LX.T, strict=True)]
