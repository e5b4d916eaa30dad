"""Device facts: each with a source, none missing, and refused in one sentence where they are wrong."""

import tomllib
from pathlib import Path

import pytest

import expertslice.policies
from expertslice.policies.data import device_names, load_device, load_variants

FOLDER = Path(expertslice.policies.__file__).parent / "devices"
TEXT = (FOLDER / "h100-sxm5-80gb.toml").read_text()


@pytest.mark.parametrize("name", device_names())
def test_every_figure_has_a_source(name):
    table = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    for key, entry in table.items():
        if key == "mig_profiles":
            assert all(profile["source"] for profile in entry)
        elif key not in ("name", "title", "status"):
            assert entry["source"], key
            assert 0 <= entry.get("rel_error", 0) <= 0.5, key


@pytest.mark.parametrize("name", device_names())
def test_devices_are_consistent(name):
    device = load_device(name)
    assert device.name == name
    assert device.status == "provisional"
    assert list(device.read_curve_ctas) == sorted(set(device.read_curve_ctas))
    assert list(device.read_curve_bytes_per_s) == sorted(device.read_curve_bytes_per_s)
    assert len(device.read_curve_ctas) == len(device.read_curve_bytes_per_s)
    assert device.sustained_flops_per_s < device.matrix_flops_per_s
    peak = device.sm_count * device.mma_flops_per_clk * device.clock_mhz * 1e6
    assert device.matrix_flops_per_s < peak
    assert device.idle_w < device.stream_w < device.limit_w
    assert {p.bandwidth_share for p in device.mig_profiles} == {0.125, 0.25, 0.5, 1.0}
    assert all(p.memory_bytes <= device.hbm_bytes for p in device.mig_profiles)


def test_scaled_figures_say_so_and_err_more():
    h100, a100 = (dict(load_device(n).rel_errors) for n in ("h100-sxm5-80gb", "a100-sxm4-80gb"))
    for key, source in load_device("a100-sxm4-80gb").sources:
        assert not source.startswith("measured"), key
        if source.startswith(("scaled", "H100")) and key in h100:
            assert a100[key] > h100[key] or a100[key] == 0.5, key


def test_the_papers_bandwidth_is_explained():
    assert "1.5 TB/s" in dict(load_device("a100-sxm4-80gb").sources)["read_curve_bytes_per_s"]


def test_unknown_device_suggests_the_nearest():
    with pytest.raises(ValueError, match="device 'h100-sxm' is unknown; did you mean 'h100-sxm5-80gb'"):
        load_device("h100-sxm")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[sm_count]", "[sm_counts]", r"lacks \['sm_count'\] and holds unknown \['sm_counts'\]"),
        ('source = "data sheet; read back by the driver"\n', "", "needs a value and a source"),
        ("max_instances = 7\n", "", r"MIG profile '1g\.10gb' lacks \['max_instances'\]"),
        ("value = 132", "value = = 132", "is not valid TOML"),
    ],
)
def test_broken_device_files_are_refused(tmp_path, old, new, says):
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ValueError, match=says):
        load_device(str(path))


def test_a_device_file_of_ones_own_loads(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace('name = "h100-sxm5-80gb"', 'name = "mine"'))
    assert load_device(str(path)).name == "mine"


def test_variants_by_compute_capability():
    for capability in (90, 80):
        variants = load_variants(capability)
        assert {"64x128x64w4s4", "128x128x64w8s4", "128x256x64w8s3"} <= {v.name for v in variants}
        assert 8 <= len(variants) <= 14
        for v in variants:
            assert v.name == f"{v.block_m}x{v.block_n}x{v.block_k}w{v.num_warps}s{v.num_stages}"
    with pytest.raises(ValueError, match="not compiled for sm_70; there are sm_80, sm_90"):
        load_variants(70)
