"""The table of counters read back, launch by launch."""

import pytest

pytest.importorskip("torch")

from expertslice.experiments.bench_rows import Point
from expertslice.experiments.counters import METRICS, counted

POINTS = [Point(model=model, kind="swiglu", skew="uniform", tokens=32) for model in ("small", "large")]
KERNELS = ("route_kernel", "fused_kernel", "combine_kernel"), (
    "route_kernel", "place_kernel", "grouped_kernel", "grouped_kernel", "combine_kernel",
)  # fmt: skip


ALL = tuple(metric for metric, _ in METRICS.values())


def report(kernels, metrics=ALL):
    lines = [",".join(f'"{name}"' for name in ("ID", "Kernel Name", *metrics)), '"",""' + ',"unit"' * len(metrics)]
    for i, kernel in enumerate(kernels):
        lines.append(",".join(f'"{cell}"' for cell in (i, kernel, *(f"{1000 * (i + 1):,}" for _ in metrics))))
    return "\n".join(lines)


def test_each_launch_is_a_part_of_its_layer():
    rows = counted(report([kernel for layer in KERNELS for kernel in layer]), POINTS)
    assert [(row["model"], row["part"]) for row in rows] == [
        *(("small", part) for part in ("routing", "fused", "combine")),
        *(("large", part) for part in ("routing", "routing", "up", "down", "combine")),
    ]
    assert [row["time_us"] for row in rows] == [float(i + 1) for i in range(8)]
    assert rows[1]["memory_read_bytes"] == 2000


def test_a_counter_that_is_not_there_is_left_out():
    rows = counted(report(KERNELS[0], ("gpu__time_duration.sum",)), POINTS[:1])
    assert "l2_bytes" not in rows[0]


def test_a_report_without_launches_is_refused():
    with pytest.raises(ValueError, match="no launch was profiled"):
        counted("==ERROR== ERR_NVGPUCTRPERM", POINTS)
