"""The paper's claims: every one is tested by its target, judged by its rule, and the page says what rows say."""

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertslice.experiments import results_page
from expertslice.experiments.bench_rows import Point, write_parquet
from expertslice.experiments.claims import (
    NOT_YET,
    Found,
    Source,
    found_of,
    interactions,
    judged,
    load_claims,
    overall,
    sources,
    verdict_of,
)
from expertslice.experiments.kernels_page import page_of
from expertslice.experiments.reproduce import TARGETS, Task, tasks_of
from expertslice.experiments.reproduce_arms import FACTORS, cells
from expertslice.experiments.reproduce_probes import simulated

DOCS = Path(__file__).parents[2] / "docs"
CLAIMS = {claim.id: claim for claim in load_claims()}
H100 = "NVIDIA H100 80GB HBM3"
CASE = ("medium", "relu3", "bf16", "uniform", 256)


def source(arms, probe="arms", device=H100, case=CASE, name="paper/h100"):
    rows = {arm: {"arm": arm, "status": "ok"} | row for arm, row in arms.items()}
    return Source(name=name, device=device, rows={(probe, case): rows}, about={})


def timed(us, spread=0.1):
    return {"us_q20": us * (1 - spread), "us_q50": us, "us_q80": us * (1 + spread)}


def test_the_page_is_generated_from_committed_rows():
    shown = page_of("results.md.j2", results_page.facts(DOCS / "results"))
    assert (DOCS / "results.md").read_text(encoding="utf-8") == shown


def test_claims_have_names_of_their_own_and_a_section_on_the_page():
    assert not [one for one, count in Counter(claim.id for claim in load_claims()).items() if count > 1]
    assert {claim.target for claim in CLAIMS.values()} == set(TARGETS) == set(results_page.HEADS)


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_every_claim_is_measured_by_its_target(claim):
    cases = claim.cases
    if claim.form == "contrast":
        cases = [case for side in (claim.better, claim.worse) for case in replace(claim, **side).cases]
    for model, kind, dtype, skew, tokens in cases:
        point = Point(model=model, kind=kind, skew=skew, tokens=tokens, dtype=dtype)
        assert Task(probe=claim.probe, point=point) in TARGETS[claim.target]
    if claim.probe == "factorial":
        names = {claim.over, *([claim.arm] if isinstance(claim.arm, str) else claim.arm)}
        assert names <= {*cells(), "ours"}


def test_a_ratio_takes_both_arms_from_one_source():
    claim = CLAIMS["speedup"]
    apart = [source({"ours": timed(10)}), source({"sequential": timed(30)}, name="speed/layers")]
    assert found_of(claim, CASE, apart) is None
    found = found_of(claim, CASE, [source({"ours": timed(10), "sequential": timed(30)})])
    assert found == Found(pytest.approx(3), pytest.approx(27 / 11), pytest.approx(33 / 9))
    assert found_of(claim, CASE, [source({"ours": timed(10), "sequential": timed(30)}, device="NVIDIA H200")]) is None
    paired = timed(30) | {"over_ours": 3.1, "over_ours_low": 3.0, "over_ours_high": 3.2}
    assert found_of(claim, CASE, [source({"ours": timed(10), "sequential": paired})]) == Found(3.1, 3.0, 3.2)


def test_forms_give_savings_rates_and_values():
    energy = source({"ours": {"energy_per_token_uj": 55}, "sequential": {"energy_per_token_uj": 100}}, "load")
    assert found_of(CLAIMS["energy-bar"], CASE, [energy]).value == pytest.approx(45)
    assert found_of(CLAIMS["h100-energy"], CASE, [energy]).value == pytest.approx(0.055)
    rate = found_of(CLAIMS["h100-throughput"], CASE, [source({"ours": timed(128)})])
    assert rate.value == pytest.approx(2e6)
    assert rate.low < rate.value < rate.high


def test_of_several_arms_the_best_counts_for_a_ratio_and_the_worst_for_a_value():
    arms = {"paper/layer/none/one": timed(12, 0), "paper/layer/tiles/one": timed(24, 0)}
    claim = CLAIMS["slices"]
    assert found_of(claim, CASE, [source(arms, "factorial")]).value == pytest.approx(0.5)
    arms["paper/layer/SMs/many"] = timed(10, 0)
    assert found_of(claim, CASE, [source(arms, "factorial")]).value == pytest.approx(1.2)
    same = CLAIMS["same-tokens"]
    rows = {name: {"same_tokens": name != "ours, static"} for name in same.arm}
    assert found_of(same, CASE, [source(rows, "tokens")]).value == 0
    del rows["ours, unsliced"]
    assert found_of(same, CASE, [source(rows, "tokens")]) is None


def test_what_failed_says_so_and_what_nobody_measured_too():
    claim = replace(CLAIMS["speedup"], models=["medium"], dtypes=["bf16"], tokens=[256])
    failed = source({"ours": timed(10), "sequential": {"status": "failed", "reason": "out of luck"}})
    assert judged(claim, [failed])["measured"] == [("medium bf16", "sequential failed: out of luck")]
    empty = judged(claim, [])
    assert (empty["measured"], empty["verdict"]) == ([("medium bf16", NOT_YET)], NOT_YET)


def test_peers_stand_beside_ours_the_best_of_them():
    claim = replace(CLAIMS["speedup"], models=["medium"], dtypes=["bf16"], tokens=[256])
    arms = {"ours": timed(10, 0), "torch_grouped_graph": timed(18, 0), "torch_grouped_compiled": timed(15, 0)}
    (peer,) = judged(claim, [source(arms)])["peers"]
    assert peer == ("medium bf16 torch_grouped_compiled", Found(1.5, 1.5, 1.5))
    arms["sglang"] = {"status": "bridged", "over_ours": 0.9, "over_ours_low": 0.8, "over_ours_high": 1.0}
    (peer,) = judged(claim, [source(arms)])["peers"]
    assert peer == ("medium bf16 sglang", Found(0.9, 0.8, 1.0))


finite = st.floats(0.01, 100)


@given(finite, finite, finite)
def test_a_claim_holds_where_all_of_the_interval_does(claimed, low, width):
    found = Found(low + width / 2, low, low + width)
    at_least = verdict_of("at_least", claimed, found)
    assert (at_least == "holds") == (low / claimed >= 1)
    assert (at_least == "no") == (found.high / claimed < 1)
    at_most = verdict_of("at_most", claimed, found)
    if at_least == "no":
        assert at_most == "holds"
    if at_most == "no":
        assert at_least == "holds"


@pytest.mark.parametrize(("values", "words"), [
    ([3, 3], "holds"),
    ([3, 1], "holds partly, in 1 of 2"),
    ([1, 1], "does not hold"),
    ([3, None], "holds; 1 of 2 without a value"),
    ([None, None], NOT_YET),
])  # fmt: skip
def test_verdicts_over_cases_are_words(values, words):
    claim = replace(CLAIMS["speedup"], dtypes=["bf16", "fp32"], models=["medium"], tokens=[256])
    assert overall(claim, [None if value is None else Found(value, value, value) for value in values]) == words
    noisy = overall(claim, [Found(2, 2, 2), Found(1.8, 1.7, 1.9)])
    assert noisy == "holds partly, in 1 of 2, 1 within noise"
    assert overall(replace(claim, cannot="why"), [None]) == "cannot be tested here: why"


def test_each_batch_size_is_held_against_its_own_figure():
    claim = replace(CLAIMS["speedup-table"], models=["medium"], dtypes=["bf16"])
    assert overall(claim, [Found(2.3, 2.3, 2.3)] * 5) == "holds partly, in 1 of 5"


def test_components_that_multiply_do_not_interact():
    gain = {"eager": 1, "layer": 4, "loop": 1, "paper": 2, "ours": 3, "expert": 1, "none": 1, "one": 1}
    times = {name: timed(100 / math.prod(gain.get(level, 1.5) for level in cell), 0) for name, cell in cells().items()}
    found = interactions([source(times, "factorial")], FACTORS)
    assert found
    assert all(row["ratio"] == pytest.approx(1) for row in found)
    times["ours/layer/none/one"] = timed(100 / 24, 0)
    by_pair = {(row["first"], row["second"]): row for row in interactions([source(times, "factorial")], FACTORS)}
    row = by_pair["kernels: ours", "graphs: layer"]
    assert row["ratio"] == pytest.approx(2 ** (1 / row["settings"]))


def test_committed_rows_are_what_the_simulator_says_now():
    rows = pq.read_table(DOCS / "results/paper/simulated/rows.parquet").to_pylist()
    point = Point(model="medium", kind="relu3", skew="uniform", tokens=256)
    of_point = [row for row in rows if all(row[name] == getattr(point, name) for name in Point.__dataclass_fields__)]
    held = {row["arm"]: row["us_q50"] for row in of_point}
    assert held == {row["arm"]: pytest.approx(row["us_q50"], rel=0.01) for row in simulated(point)}


def test_results_of_several_versions_are_named(tmp_path):
    folder = tmp_path / "paper/h100"
    folder.mkdir(parents=True)
    versions = {"torch": "2.11", "triton": "3.6"}
    runs = [{"commit": c, "tasks": 1, "versions": versions, "driver": "1", "cpu": "c"} for c in ("a" * 40, "b" * 40)]
    (folder / "manifest.json").write_text(json.dumps({"device": H100, "runs": runs}))
    row = dict(zip(("model", "kind", "dtype", "skew", "tokens"), CASE, strict=True))
    write_parquet(folder / "rows.parquet", [{**row, "probe": "arms", "arm": "ours", "status": "ok", **timed(10)}])
    (tmp_path / "speed").symlink_to(DOCS / "results/speed")
    line = results_page.source_line(sources(tmp_path)[0])
    assert "commit aaaaaaa, bbbbbbb" in line
    assert "of several versions" in line


def test_a_claim_with_an_unknown_field_is_refused(tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text('[defaults]\n[[group]]\ntarget = "table1"\nclaims = [{ id = "x", wrong = 1 }]\n')
    with pytest.raises(ValueError, match="claim 'x'"):
        load_claims(path)


def full_results(folder):
    """Write rows of every task as an H100 would leave them, all arms alike but ours twice as fast; bench's beside."""
    rng = np.random.default_rng(0)
    columns = {claim.column for claim in CLAIMS.values()} | {*results_page.BUSY, "limit_share"}
    rows = []
    for task in tasks_of("all"):
        claims = [claim for claim in CLAIMS.values() if claim.probe == task.probe]
        arms = {name for one in claims for name in ([one.arm] if isinstance(one.arm, str) else one.arm)}
        arms |= {claim.over for claim in claims} | ({*cells()} if task.probe == "factorial" else set())
        for arm in sorted(arms):
            about = {"probe": task.probe, **asdict(task.point), "commit": "a" * 40, "arm": arm, "status": "ok"}
            about |= {name: float(rng.uniform(0.2, 0.9)) for name in sorted(columns)}
            rows.append(about | timed(50.0 if arm.startswith("ours") else 100.0, 0) | {"after_throttle_reasons": []})
    rows[0] |= {"after_throttle_reasons": ["hw_slowdown"]}
    failed = next(row for row in rows if row["arm"] == "loop/eager/SMs/many")
    failed |= {"status": "failed", "reason": "PartitionError: no | such split", "us_q50": None}
    folder.mkdir(parents=True)
    write_parquet(folder / "rows.parquet", rows)
    run = {"commit": "a" * 40, "tasks": 1, "versions": {"torch": "2", "triton": "3"}, "driver": "1", "cpu": "a CPU"}
    (folder / "manifest.json").write_text(json.dumps({"device": H100, "runs": [run]}))
    (folder.parents[1] / "speed").symlink_to(DOCS / "results/speed")


def test_once_everything_is_measured_every_claim_has_a_verdict(tmp_path):
    full_results(tmp_path / "paper/h100")
    shown = results_page.facts(tmp_path)
    verdicts = {row["claim"].id: row["verdict"] for _, rows in shown["sections"] for row in rows}
    assert {one for one, verdict in verdicts.items() if verdict == NOT_YET} == {"h200-throughput"}
    assert verdicts["speedup"] == "holds"
    assert verdicts["speedup-table"] == "does not hold"
    page = page_of("results.md.j2", shown)
    assert "failed: PartitionError" in page
    assert "another reason than the power cap: 1." in page
    assert "| loop/layer/none/many | 100.0 | 100.0 |" in page
    assert "kernels: ours | graphs: layer" in page
    tables = [line for line in page.splitlines() if line.startswith("| ")]
    assert all(line.endswith("|") for line in tables)
