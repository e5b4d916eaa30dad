"""Trace statistics as rows of a table: median over layers, least and most."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..traces.statistics import TraceStatistics


class Row(NamedTuple):
    """One statistic over layers."""

    name: str
    values_L: NDArray[np.float64]
    form: str

    def cells(self) -> list[str]:
        """Return name, median, least and most."""
        return [self.name, *(format(f(self.values_L), self.form) for f in (np.nanmedian, np.nanmin, np.nanmax))]


def rows_of(stats: TraceStatistics) -> list[Row]:
    """Return what is known of a trace; what a source does not hold has no row."""
    rows = [
        ("Gini coefficient of the load", stats.gini_L, ".2f"),
        ("fullest expert / mean", stats.max_mean_L, ".1f"),
        ("Zipf exponent", stats.zipf_s_L, ".2f"),
        ("overlap of independent tokens", stats.overlap_independent_L, ".2f"),
        *(
            (f"overlap, {lag} token(s) apart", column, ".2f")
            for lag, column in _columns(stats.lags_G, stats.overlap_LG)
        ),
        ("overlap of two tokens of a request", stats.overlap_request_L, ".2f"),
        ("divergence of a request's load, bit", stats.jsd_bits_L, ".3f"),
        ("bits shared with the layer below", stats.mutual_information_bits_L, ".2f"),
        ("recall from the layer below", stats.recall_set_L, ".2f"),
        ("recall from popularity", stats.recall_popularity_L, ".2f"),
        *(
            (f"experts used by a batch of {size}", column, ".1f")
            for size, column in _columns(stats.batch_sizes_Z, stats.distinct_LZ)
        ),
        *(
            (f"fullest / mean in a batch of {size}", column, ".1f")
            for size, column in _columns(stats.batch_sizes_Z, stats.step_max_mean_LZ)
        ),
    ]
    return [Row(name, values, form) for name, values, form in rows if values is not None and not np.isnan(values).all()]


def _columns(labels: tuple[int, ...], table: NDArray[np.float64] | None) -> list[tuple[int, NDArray[np.float64]]]:
    return [] if table is None else list(zip(labels, table.T, strict=True))
