"""Files of tuned launches: what is saved is what is found, by name; what is not there is modelled and said."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertslice.kernels import tuned
from expertslice.kernels.launches import default_launch
from expertslice.kernels.spec import LaunchSpec, LayerLaunch, SliceLaunch
from expertslice.traces.models import load_model
from expertslice.traces.schema import MoeSpec

DEVICE = "NVIDIA H100 80GB HBM3"
SPEC = load_model("qwen3-30b-a3b")


def launch(block_m, *, fused=False):
    tile = LaunchSpec(block_m=block_m, block_n=64, block_k=64, num_warps=4, num_stages=3, num_ctas=7)
    return LayerLaunch(slices=(SliceLaunch(up=tile, down=tile),), fused=fused)


def file_of(most_tokens):
    least = [1, *(most + 1 for most in most_tokens)]
    ranges = tuple(
        tuned.TunedRange(
            least_tokens=a, most_tokens=b, launch=launch(16 << i % 3, fused=i % 2 == 0), us={"uniform": 2.5}
        )
        for i, (a, b) in enumerate(zip(least, most_tokens, strict=False))
    )
    return tuned.Tuned(device=DEVICE, triton="3.6.0", shape=tuned.shape_name(SPEC), ranges=ranges)


@given(
    most_tokens=st.sets(st.integers(1, 10_000), min_size=1, max_size=6).map(sorted), num_tokens=st.integers(0, 20_000)
)
def test_a_batch_gets_the_launch_of_its_range(most_tokens, num_tokens):
    held = file_of(most_tokens)
    inside = [r for r in held.ranges if r.least_tokens <= num_tokens <= r.most_tokens]
    outside = held.ranges[0] if num_tokens < 1 else held.ranges[-1]
    assert held.launch_for(num_tokens) == (inside or [outside])[0].launch


def test_a_saved_file_is_found_by_device_and_shape(tmp_path):
    path = tuned.path_of(tmp_path, DEVICE, tuned.shape_name(SPEC))
    tuned.save(path, file_of([4, 64, 8192]))
    assert path.relative_to(tmp_path).as_posix() == "nvidia-h100-80gb-hbm3/d2048-f768-e128-k8-swiglu-bf16.json"
    assert tuned.load(path) == file_of([4, 64, 8192])
    assert tuned.launch_for(SPEC, 5, DEVICE, folder=tmp_path) == launch(32)


def test_an_unknown_shape_is_modelled_and_says_so_once(tmp_path, caplog):
    spec = MoeSpec(name="new", num_layers=1, num_experts=3, top_k=1, d_model=48, d_ff=(40,))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert tuned.launch_for(spec, 9, DEVICE, folder=tmp_path) == default_launch(spec, 9)
    assert len(caplog.records) == 1
    assert "d48-f40-e3-k1-swiglu-bf16" in caplog.text


def test_the_papers_tiles():
    tiles = {tuned.launch_for(SPEC, n, DEVICE, preset="paper").slices[0].up for n in (1, 8192)}
    assert {(t.block_m, t.block_n, t.block_k) for t in tiles} == {(64, 64, 32), (128, 128, 64)}


@pytest.mark.parametrize("change", ["truncated", "no key", "bad tile", "gap"])
def test_a_bad_file_is_named(change, tmp_path):
    path = tuned.path_of(tmp_path, DEVICE, "x")
    tuned.save(path, file_of([4, 64]))
    value = json.loads(path.read_text())
    if change == "no key":
        del value["ranges"][0]["up"]
    elif change == "bad tile":
        value["ranges"][0]["up"]["block_m"] = 17
    elif change == "gap":
        value["ranges"][1]["tokens"][0] = 9
    text = json.dumps(value)
    path.write_text(text[: len(text) // 2] if change == "truncated" else text)
    with pytest.raises(ValueError, match=r"x\.json.*tune the shape again"):
        tuned.load(path)


def test_every_shipped_file_is_read_by_its_name():
    for path in tuned.FOLDER.glob("*/*.json"):
        held = tuned.load(path)
        assert path == tuned.path_of(tuned.FOLDER, held.device, held.shape)
