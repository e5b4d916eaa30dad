"""The account of a timeline: whatever overlaps, the parts add up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertslice.experiments.account import PARTS, Span, account, parts_of, product_floors_us
from expertslice.policies.data import load_device

SWIGLU = ("route_kernel", "place_kernel", "gather_kernel", "grouped_kernel", "pingpong_kernel", "combine_kernel")
times = st.lists(st.tuples(st.floats(0, 50), st.floats(0.1, 400)), min_size=6, max_size=6)


def test_launches_are_told_apart_by_kernel_and_order():
    assert parts_of(SWIGLU) == ["routing", "routing", "gather", "up", "down", "combine"]
    assert parts_of(["route_kernel", *["grouped_kernel"] * 3]) == ["routing", "up", "middle", "down"]
    assert parts_of(["route_kernel", "fused_kernel", "combine_kernel"]) == ["routing", "fused", "combine"]


@given(times=times)
def test_parts_add_up_to_the_time_from_first_start_to_last_end(times):
    spans, now_us = [], 0.0
    for kernel, (after_us, took_us) in zip(SWIGLU, times, strict=True):
        # The next launch may start while the one before still runs, as a dependent launch does.
        now_us += after_us
        spans.append(Span(kernel, now_us, now_us + took_us))
    whole_us = max(span.end_us for span in spans) - spans[0].start_us
    assert sum(account(spans, 1).values()) == pytest.approx(whole_us)


def test_each_layer_counts_and_the_median_is_kept():
    kernels = ("route_kernel", "fused_kernel", "combine_kernel")
    spans = [
        Span(kernel, 100.0 * layer + 10 * i, 100.0 * layer + 10 * i + 4 + (layer == 2))
        for layer in range(3)
        for i, kernel in enumerate(kernels)
    ]
    found = account(list(reversed(spans)), 3)
    assert set(found) == set(PARTS)
    assert found["routing"] == found["fused"] == found["combine"] == pytest.approx(4.0)
    assert found["up"] == 0
    with pytest.raises(ValueError, match="9 launches for 2 layers"):
        account(spans, 2)
    with pytest.raises(ValueError, match="'sleep_kernel' is no launch of a layer"):
        parts_of(["route_kernel", "sleep_kernel"])


@pytest.mark.parametrize("kind", ["swiglu", "relu3", "gelu2"])
def test_floors_of_products_add_up_to_the_layers(kind):
    torch = pytest.importorskip("torch")
    from expertslice.experiments.bench_arms import Batch, draw_logits
    from expertslice.experiments.bench_rows import Work
    from expertslice.traces.schema import MoeSpec

    spec = MoeSpec(name="t", num_layers=1, num_experts=8, top_k=2, d_model=64, d_ff=(96,), kind=kind)
    logits_PTE = draw_logits(spec, 5, 2, "zipf", 3, "cpu")
    batch, device = (
        Batch(spec=spec, x_TD=torch.zeros(5, 64), logits_PTE=logits_PTE, sets=()),
        load_device("h100-sxm5-80gb"),
    )
    floors = product_floors_us(batch, device)
    assert sum(floors.values()) == pytest.approx(Work.of(batch).floor_us(device), rel=2e-3)
