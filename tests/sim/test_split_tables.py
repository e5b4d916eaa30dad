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
from splits import (
    MIXED,
    PROJECTION,
    PROJECTION_CELLS,
    Row,
    clipped_zipf,
    mixed_rows,
    projection_row,
    projection_rows,
    section,
    tile,
)

from expertslice.policies.contract import DeviceSpec

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the measured rows lie in ../shared/reference")


def report(title: str, rows: list[Row]) -> None:
    sys.stdout.write("\n" + section(title, rows))


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
