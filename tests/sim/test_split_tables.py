"""The simulator against splits measured on an H100: no figure of the model comes from here.

Green-context times are those of the two split tables of the project's hardware facts ("Where slicing pays" and "Work
that no single launch can express"); the files under `../shared/reference`, where present, say the same with more
digits, and give the unsliced and the sharing times. Run with `-s` to see every cell.
"""

import ast
import json
import sys
from pathlib import Path

import pytest

from expertslice.policies.contract import DeviceSpec
from expertslice.sim.splits import Row, clipped_zipf, mean_abs_error, mixed_row, projection_row, table_of, tau, tile

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the measured rows lie in ../shared/reference")

Shape = tuple[int, int, int, int, int, float]
# d_model, f, experts, top-k, tokens, Zipf exponent: unsliced, sharing, cold on 16 / 32 / 48 / 64 SMs, ms.
PROJECTION: dict[Shape, tuple[float, ...]] = {
    (4096, 14336, 8, 2, 512, 1.5): (0.391, 0.349, 0.777, 0.444, 0.374, 0.373),
    (2048, 4096, 64, 4, 2048, 2.0): (0.453, 0.408, 0.883, 0.497, 0.417, 0.415),
    (2048, 4096, 32, 4, 2048, 1.0): (0.319, 0.297, 0.475, 0.305, 0.345, 0.412),
    (2048, 768, 128, 8, 4096, 1.0): (0.254, 0.240, 0.549, 0.317, 0.245, 0.264),
    (2048, 1024, 64, 8, 1024, 1.2): (0.120, 0.116),
    (2048, 4096, 32, 4, 4096, 1.5): (0.454, 0.446, 0.623, 0.442, 0.509, 0.621),
}
PROJECTION_CELLS = ("unsliced", "sharing", "green 16", "green 32", "green 48", "green 64")
# Bytes streamed, rows and dimensions of the dense product (the last is 137 GFLOP; its shape is not stated):
# one after the other, plain streams, sharing, decode on 16 / 24 / 32 / 40 / 48 / 64 SMs, ms.
MIXED: dict[str, tuple[float, tuple[int, int, int], tuple[float, ...]]] = {
    "large-decode|gemm4096": (
        2147.483648e6,
        (4096, 8192, 8192),
        (1.434, 1.432, 1.480, 1.706, 1.272, 1.204, 1.324, 1.318, 1.378),
    ),
    "mixtral-decode|gemm8192": (
        1879.048192e6,
        (8192, 8192, 8192),
        (2.302, 2.161, 2.501, 2.001, 2.207, 2.003, 2.095, 2.204, 2.578),
    ),
    "qwen-decode|gemm2048": (
        3221.225472e6,
        (2048, 8192, 8192),
        (1.423, 1.473, 1.317, 2.469, 1.682, 1.357, 1.277, 1.279, 1.314),
    ),
    "large-decode|small-gemm": (
        2147.483648e6,
        (4096, 4096, 4096),
        (0.918, 0.914, 0.853, 1.605, 1.118, 0.935, 0.884, 0.868, 0.835),
    ),
}
MIXED_CELLS = (
    "one after the other", "streams", "sharing",
    "green 16", "green 24", "green 32", "green 40", "green 48", "green 64",
)  # fmt: skip


def projection_rows(device: DeviceSpec, **reading: str) -> list[Row]:
    rows: list[Row] = []
    for shape, times in PROJECTION.items():
        measured = dict(zip(PROJECTION_CELLS, times, strict=False))
        rows.append(projection_row(shape, measured, device, **reading))
    return rows


def mixed_rows(device: DeviceSpec, **reading: str) -> list[Row]:
    return [
        mixed_row(name, moved, dense, dict(zip(MIXED_CELLS, times, strict=True)), device, **reading)
        for name, (moved, dense, times) in MIXED.items()
    ]


def report(title: str, rows: list[Row]) -> None:
    green = [row.only("green") for row in rows if len(row.cells) > 2]
    lines = [
        f"\n{title}\n{table_of(rows)}\ngreen contexts alone\n{table_of(green)}",
        f"all cells: tau {tau(rows):.2f}, mean error {mean_abs_error(rows):.1%}",
        f"green contexts: tau {tau(green):.2f}, mean error {mean_abs_error(green):.1%}\n",
    ]
    sys.stdout.write("\n".join(lines))


def costs(rows: list[Row], prefix: str = "") -> dict[str, float]:
    chosen = [row.only(prefix) for row in rows]
    return {row.name: row.regret for row in chosen if len(row.cells) > 1}


def test_the_picked_split_of_one_projection_costs_at_most_a_tenth_more(device: DeviceSpec):
    rows = projection_rows(device)
    report("one projection, burst, one threshold per row", rows)
    assert len(costs(rows, "green")) == 5
    assert max(costs(rows, "green").values()) <= 0.10
    assert max(costs(rows).values()) <= 0.10


@pytest.mark.xfail(
    reason="rows 4 and 6 kept one threshold on hardware; with each cell's best, picks miss by 29 and 41 %"
)
def test_the_picked_split_costs_at_most_a_tenth_more_when_each_cell_has_its_best_threshold(device: DeviceSpec):
    rows = projection_rows(device, threshold="cell")
    report("one projection, burst, best threshold of each cell", rows)
    assert max(costs(rows, "green").values()) <= 0.10


def test_the_picked_split_of_mixed_work_costs_at_most_a_tenth_more(device: DeviceSpec):
    rows = mixed_rows(device, regime="burst")
    report("mixed work, burst", rows)
    assert max(costs(rows, "green").values()) <= 0.10
    assert max(costs(rows).values()) <= 0.10


@pytest.mark.slow
def test_other_readings_of_the_tables_are_printed_good_or_bad(device: DeviceSpec):
    report("one projection, sustained", projection_rows(device, regime="sustained"))
    report("mixed work, sustained", mixed_rows(device, regime="sustained"))


@needs_reference
def test_the_counts_are_those_of_the_measured_rows():
    rows = json.loads((REFERENCE / "slicing_one_projection.json").read_text())["rows"]
    assert len(rows) == len(PROJECTION)
    for row in rows:
        counts_E = clipped_zipf(row["E"], row["k"], row["T"], row["zipf"])
        assert [*counts_E[:4].tolist(), *counts_E[-2:].tolist()] == row["counts"]
        assert counts_E.max() / counts_E.mean() == pytest.approx(row["imb"], rel=1e-3)


@needs_reference
def test_the_times_are_those_of_the_measured_rows():
    for row in json.loads((REFERENCE / "slicing_one_projection.json").read_text())["rows"]:
        times = PROJECTION[(row["d"], row["f"], row["E"], row["k"], row["T"], row["zipf"])]
        assert row["unsliced_best"][0][0] == pytest.approx(times[0], abs=6e-4)
        assert row["coresident_best"][0][0] == pytest.approx(times[1], abs=6e-4)
    for row in json.loads((REFERENCE / "slicing_mixed_work.json").read_text())["rows"]:
        moved, _, times = MIXED[row["name"]]
        green = [row["green"][sms][2] for sms in ("16", "24", "32", "40", "48", "64")]
        measured = [row["sequential_ms"], row["streams_cublas"], row["shared_best"][0][0], *green]
        assert moved == pytest.approx(row["dec_MB"] * 1e6)
        assert measured == pytest.approx(times, abs=6e-4)


@needs_reference
def test_the_tile_pairs_of_the_rows_pick_as_well(device: DeviceSpec):
    rows: list[Row] = []
    for raw in json.loads((REFERENCE / "slicing_one_projection.json").read_text())["rows"]:
        shape = (raw["d"], raw["f"], raw["E"], raw["k"], raw["T"], raw["zipf"])
        hot, hot_warps, hot_stages, _, cold, cold_warps, cold_stages, _, _ = ast.literal_eval(
            raw["coresident_best"][0][1]
        )
        pair = (tile(*hot, hot_warps, hot_stages), tile(*cold, cold_warps, cold_stages))
        measured = dict(zip(PROJECTION_CELLS, PROJECTION[shape], strict=False))
        rows.append(projection_row(shape, measured, device, pair=pair))
    assert max(costs(rows, "green").values()) <= 0.10
    assert max(costs(rows).values()) <= 0.10
