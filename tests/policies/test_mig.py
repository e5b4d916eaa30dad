"""MIG layouts against the counts that NVIDIA's tables give."""

from dataclasses import replace

import pytest

from expertslice.policies.contract import MigPlacement
from expertslice.policies.data import device_names, load_device
from expertslice.policies.mig import illegality, maximal_layouts, mig_layout

H100 = load_device("h100-sxm5-80gb")


def at(profile, start):
    return MigPlacement(profile=profile, start=start)


@pytest.mark.parametrize("name", device_names())
def test_number_of_maximal_layouts(name):
    device = load_device(name)
    plain = tuple(p for p in device.mig_profiles if (p.compute_slices, p.memory_slices) != (1, 2))
    assert len(maximal_layouts(replace(device, mig_profiles=plain))) == 19
    assert len(maximal_layouts(device)) == 78


@pytest.mark.parametrize("name", device_names())
def test_maximal_layouts_are_legal_distinct_and_fit(name):
    device = load_device(name)
    layouts = maximal_layouts(device)
    assert len({frozenset(one) for one in layouts}) == len(layouts)
    sms = {p.name: p.sm_count for p in device.mig_profiles}
    for layout in layouts:
        assert illegality(layout, device) is None
        assert sum(sms[place.profile] for place in layout) <= device.sm_count


@pytest.mark.parametrize(
    ("placements", "says"),
    [
        ((), "no instances"),
        ((at("5g.50gb", 0),), "unknown on h100-sxm5-80gb; it has 1g.10gb"),
        ((at("3g.40gb", 1),), r"starts at memory slice 1; it may start at \[0, 4\]"),
        ((at("3g.40gb", 0), at("1g.10gb", 3)), "both take memory slice 3"),
        ((at("1g.10gb", 7),), "may start at"),
    ],
)
def test_says_why_a_layout_is_illegal(placements, says):
    problem = illegality(placements, H100)
    assert problem is not None
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(problem)


def test_instances_of_a_profile_are_limited():
    fewer = tuple(replace(p, max_instances=1) if p.name == "3g.40gb" else p for p in H100.mig_profiles)
    assert "holds 1, drop some" in str(
        illegality((at("3g.40gb", 0), at("3g.40gb", 4)), replace(H100, mig_profiles=fewer))
    )


def test_a_device_without_mig_has_no_layouts():
    assert maximal_layouts(replace(H100, mig_profiles=())) == ()


def test_layout_has_a_slice_per_instance():
    layout = mig_layout(H100, (at("4g.40gb", 0), at("3g.40gb", 4)), ("a", "b"))
    assert [(one.sm_count, one.up, one.instance) for one in layout.slices] == [(64, "a", 0), (60, "b", 1)]
    with pytest.raises(ValueError, match="1 tiles for 2 MIG instances"):
        mig_layout(H100, layout.mig, ("a",))
    with pytest.raises(ValueError, match="both take"):
        mig_layout(H100, (at("4g.40gb", 0), at("2g.20gb", 2)), ("a", "b"))
