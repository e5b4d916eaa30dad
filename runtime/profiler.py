"""What a run says of its experts and slices, from counts and records that are there anyway: nothing waits for it.

Hot experts have so many tokens that arithmetic bounds them, cold ones are bound by reading their weights.

Shape letters: L MoE layers, E routed experts, S slices.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..policies.contract import Plan, Setup, SliceLayout, StepRecord
from ..policies.layouts import fallback_plan
from ..policies.tiles import read_bytes_per_ns
from ..traces.schema import DTYPE_BYTES, F64, I64, RoutedStep

CLASSES = ("idle", "cold", "hot")


@dataclass(slots=True)
class _Used:
    """What the slices of a layout did."""

    steps: int = 0
    step_ns: int = 0
    busy_ns_S: "I64 | int" = 0


class Profiler:
    """Adds up a run under one setup."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        shape = setup.model.num_layers, setup.model.num_experts
        self._tokens_LE, self._hits_LE = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self._layouts = {(plan := fallback_plan(setup)).plan_id: plan.layout}
        self._used: dict[SliceLayout, _Used] = {}
        self._span_ns: tuple[int, int] | None = None

    def submitted(self, step: RoutedStep) -> None:
        self._tokens_LE += step.counts_LE
        self._hits_LE += step.counts_LE > 0

    def decided(self, plan: Plan) -> None:
        self._layouts[plan.plan_id] = plan.layout

    def finished(self, record: StepRecord) -> None:
        self._span_ns = (self._span_ns[0] if self._span_ns else record.start_ns), record.end_ns
        used = self._used.setdefault(self._layouts[record.plan_id], _Used())
        used.steps += 1
        used.step_ns += record.end_ns - record.start_ns
        used.busy_ns_S = used.busy_ns_S + record.busy_ns_LS.sum(axis=0)

    @property
    def ridge_tokens(self) -> float:
        """Return the tokens of an expert at which its arithmetic takes as long as reading its weights."""
        device, element_bytes = self._setup.device, DTYPE_BYTES[self._setup.model.dtype]
        return device.matrix_flops_per_s / max(device.read_curve_bytes_per_s) * element_bytes / 2

    def profile(self) -> dict[str, Any]:
        """Return tokens per second and class of every expert, SM time of every slice, and the slices recommended."""
        start_ns, end_ns = self._span_ns or (0, 0)
        mean_LE = self._tokens_LE / np.maximum(self._hits_LE, 1)
        class_LE = (mean_LE > 0) + (mean_LE >= self.ridge_tokens).astype(np.int64)
        return {
            "span_ns": end_ns - start_ns,
            "ridge_tokens": self.ridge_tokens,
            "tokens_per_s_LE": self._tokens_LE / max(1, end_ns - start_ns) * 1e9,
            "tokens_when_hit_LE": mean_LE,
            "class_LE": [[CLASSES[i] for i in row] for row in class_LE.tolist()],
            "experts": {name: int((class_LE == i).sum()) for i, name in enumerate(CLASSES)},
            "layouts": [self._layout(layout, used) for layout, used in self._used.items()],
            "recommended": self._recommended(class_LE == 1, class_LE == 2),
        }

    def _layout(self, layout: SliceLayout, used: _Used) -> dict[str, Any]:
        busy_ns_S = np.asarray(used.busy_ns_S).tolist()
        slices = [
            {**asdict(one), "busy_share": busy_ns / max(1, used.step_ns), "sm_ns": busy_ns * one.sm_count}
            for one, busy_ns in zip(layout.slices, busy_ns_S, strict=True)
        ]
        return {"steps": used.steps, "step_ns": used.step_ns, "slices": slices}

    def _recommended(self, cold_LE: "np.ndarray", hot_LE: "np.ndarray") -> dict[str, Any]:
        """Return the split of SMs under which reading cold weights and multiplying hot rows take the same time."""
        device, model = self._setup.device, self._setup.model
        bytes_E: F64 = np.array([model.expert_bytes(e) for e in range(model.num_experts)], dtype=np.float64)
        cold_bytes = float((cold_LE * self._hits_LE * bytes_E).sum())
        hot_flops = float((hot_LE * self._tokens_LE * bytes_E).sum()) * 2 / DTYPE_BYTES[model.dtype]
        if not cold_bytes or not hot_flops:
            return {"slices": 1, "why": f"all experts are {'cold' if cold_bytes else 'hot' if hot_flops else 'idle'}"}

        def takes_ns(cold_sms: int) -> float:
            rate_per_ns = device.matrix_flops_per_s / 1e9 * (device.sm_count - cold_sms) / device.sm_count
            return max(cold_bytes / read_bytes_per_ns(device, cold_sms), hot_flops / rate_per_ns)

        step = device.sm_partition_step
        cold_sms = min(range(device.sm_partition_min, device.sm_count, step), key=takes_ns)
        return {
            "slices": 2,
            "bound_tokens": round(self.ridge_tokens),
            "cold_sms": cold_sms,
            "hot_sms": (device.sm_count - cold_sms) // step * step,
        }


def table(profile: dict[str, Any]) -> list[str]:
    """Return a profile in a few lines, with what counters told beside it."""
    counts = ", ".join(f"{n} {name}" for name, n in profile["experts"].items())
    tokens = np.asarray(profile["tokens_per_s_LE"])
    lines = [f"experts: {counts}; tokens/s of one: median {np.median(tokens):,.0f}, most {tokens.max(initial=0):,.0f}"]
    for layout in profile["layouts"]:
        busy = ", ".join(
            f"{s['mechanism']} {s['sm_count']} SMs, {s['up']}, {s['busy_share']:.0%}" for s in layout["slices"]
        )
        lines.append(f"{layout['steps']} steps, busy: {busy}")
    advice = profile["recommended"]
    if advice["slices"] == 1:
        lines.append(f"recommended: one slice, {advice['why']}")
    else:
        lines.append(
            f"recommended: {advice['cold_sms']} SMs for experts below {advice['bound_tokens']} tokens, "
            f"{advice['hot_sms']} for the others"
        )
    if known := {name: value for name, value in profile["utilisation"].items() if value is not None}:
        lines.append("utilisation: " + ", ".join(f"{name} {value:.0%}" for name, value in known.items()))
    else:
        lines.append(f"utilisation: not known, {profile['utilisation_reason']}")
    return lines
