"""The pages about kernels, speed, slices, generation and fidelity are what their committed files say."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from expertslice.experiments import fidelity_page, generate_page, kernels_page, slices_page, speed_page
from expertslice.experiments.kernels_page import page_of
from expertslice.traces.models import load_model

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", [kernels_page, speed_page, slices_page, generate_page, fidelity_page])
def test_a_page_is_generated_from_its_results(page):
    name = page.__name__.rpartition(".")[2].removesuffix("_page")
    shown = page.facts(DOCS / "results" / name)
    assert (DOCS / f"{name}.md").read_text(encoding="utf-8") == page_of(f"{name}.md.j2", shown)


def test_layers_were_timed_under_the_launches_that_are_shipped():
    pytest.importorskip("torch")
    from dataclasses import replace

    from expertslice.experiments.bench_arms import describe
    from expertslice.kernels.tuned import FOLDER, load, path_of, shape_name

    rows = pq.read_table(DOCS / "results/speed/layers/rows.parquet").to_pylist()
    ours = [row for row in rows if row["arm"] == "ours"]
    assert ours
    for row in ours:
        spec = replace(load_model(row["model"]), kind=row["kind"], num_layers=1, dtype="bf16")
        held = load(path_of(FOLDER, "NVIDIA H100 80GB HBM3", shape_name(spec)))
        assert row["launch"] == describe(held.launch_for(row["tokens"])), row
