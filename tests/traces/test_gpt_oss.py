"""The recording of gpt-oss-20b: its statistics are those published, and the generator fitted to it has them too."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from expertslice.traces.fit import fit
from expertslice.traces.schema import Provenance
from expertslice.traces.statistics import TraceStatistics, summarise
from expertslice.traces.synth import synthesise
from expertslice.traces.trace import UNKNOWN, RoutingTrace, StepTable

GPT_OSS = Path(__file__).resolve().parents[3] / "shared" / "traces" / "gptoss20b" / "dev.npz"


def gpt_oss():
    """Read the recording of gpt-oss-20b; skip where this checkout stands alone."""
    if not GPT_OSS.exists():
        pytest.skip("the recording of gpt-oss-20b is not beside this checkout (shared/traces/gptoss20b)")
    with np.load(GPT_OSS) as z:
        ids, lengths = z["experts"], np.diff(z["request_offsets"])
    request_T = np.repeat(np.arange(len(lengths)), lengths)
    num_tokens = len(ids)
    return RoutingTrace(
        num_experts=32,
        provenance=Provenance(source="dev.npz", model="gpt-oss-20b"),
        request_id_T=request_T,
        position_T=(np.arange(num_tokens) - np.repeat(np.cumsum(lengths) - lengths, lengths)).astype(np.int32),
        phase_T=np.ones(num_tokens, np.uint8),
        step_T=np.arange(num_tokens),
        domain_T=np.full(num_tokens, UNKNOWN, np.int16),
        expert_ids_TLK=ids,
        step_table=StepTable(phase_S=np.ones(num_tokens, np.uint8), segment_S=np.zeros(num_tokens, np.uint8)),
    )


LAYERS = (0, 6, 12, 18, 23)
PUBLISHED = {
    "gini": 0.39,
    "max / mean": 2.5,
    "zipf s": 0.54,
    **{
        f"overlap at {lag}": v
        for lag, v in zip((1, 2, 4, 8, 32, 64), (0.44, 0.37, 0.35, 0.33, 0.31, 0.30), strict=True)
    },
    "overlap in request": 0.296,
    "overlap independent": 0.185,
    "jsd": 0.13,
    "information": 1.42,
    "top-1 entropy": 4.24,
    "recall": 0.58,
    "recall by popularity": 0.33,
    **{f"distinct at {b}": v for b, v in zip((1, 8, 32, 128), (4.0, 17.3, 25.7, 29.2), strict=True)},
    **{f"distinct independent at {b}": v for b, v in zip((1, 8, 32, 128), (4.0, 17.8, 26.6, 30.3), strict=True)},
    **{f"step max / mean at {b}": v for b, v in zip((1, 8, 32, 128), (8, 4.2, 3.3, 2.9), strict=True)},
    **{f"autocorrelation at {b}": v for b, v in zip((1, 8, 32, 128), (0.15, 0.25, 0.33, 0.45), strict=True)},
    **{f"lru 8 at layer {layer}": v for layer, v in zip(LAYERS, (0.34, 0.55, 0.81, 0.56, 0.71), strict=True)},
    **{f"lru 16 at layer {layer}": v for layer, v in zip(LAYERS, (0.65, 0.84, 0.97, 0.85, 0.90), strict=True)},
}


def rows(s: TraceStatistics, layers=LAYERS) -> dict[str, float]:
    """Return the rows of the published table: medians over layers, but for the caches."""
    per_lag, per_batch = list(np.median(s.overlap_LG, axis=0)), range(len(s.batch_sizes_Z))
    table = {
        "gini": s.gini_L,
        "max / mean": s.max_mean_L,
        "zipf s": s.zipf_s_L,
        **{f"overlap at {lag}": v for lag, v in zip(s.lags_G, per_lag, strict=True) if lag != 16},
        "overlap in request": s.overlap_request_L,
        "overlap independent": s.overlap_independent_L,
        "jsd": s.jsd_bits_L,
        "information": s.mutual_information_bits_L,
        "top-1 entropy": s.top1_entropy_bits_L,
        "recall": s.recall_L,
        "recall by popularity": s.recall_popularity_L,
        **{f"distinct at {s.batch_sizes_Z[z]}": s.distinct_LZ[:, z] for z in per_batch},
        **{f"distinct independent at {s.batch_sizes_Z[z]}": s.distinct_independent_LZ[:, z] for z in per_batch},
        **{f"step max / mean at {s.batch_sizes_Z[z]}": s.step_max_mean_LZ[:, z] for z in per_batch},
        **{f"autocorrelation at {s.batch_sizes_Z[z]}": s.autocorrelation_LZ[:, z] for z in per_batch},
        **{f"lru {k} at layer {layer}": s.lru_hit_LE[layer, k] for k in (8, 16) for layer in layers},
    }
    return {name: float(np.median(value)) for name, value in table.items()}


@pytest.fixture(scope="module")
def trace():
    return gpt_oss()


def away(one, other):
    return {name: round(one[name] / other[name] - 1, 3) for name in one}


def assert_close(one, other, within):
    off = away(one, other)
    assert max(map(abs, off.values())) < within, {name: v for name, v in off.items() if abs(v) > 0.7 * within}


def test_statistics_are_those_published(trace):
    measured = rows(summarise(trace))
    assert measured.keys() == PUBLISHED.keys()
    assert_close(measured, PUBLISHED, within=0.13)


def test_fitted_generator_has_the_statistics_of_eight_layers(trace):
    few = replace(trace, expert_ids_TLK=trace.expert_ids_TLK[:, [0, 1, 6, 12, 13, 18, 22, 23]])
    drawn = synthesise(fit(few), num_requests=342, seed=7)
    assert_close(rows(summarise(drawn), range(8)), rows(summarise(few), range(8)), within=0.15)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fitted_generator_has_the_published_statistics(trace):
    drawn = rows(summarise(synthesise(fit(trace), num_requests=342, seed=7)))
    assert_close(drawn, rows(summarise(trace)), within=0.15)
    assert_close(drawn, PUBLISHED, within=0.15)
