"""What an expert's tokens weigh: the time they take by belief, since a cold expert costs its weights, not its rows.

Shape letters: L MoE layers, E routed experts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .contract import Setup
from .layouts import fallback_plan

TOKENS_MOST = 1 << 14
"""Beyond this the weight grows in proportion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weight of an expert by its tokens, at a few counts; between them it is linear."""

    tokens: tuple[float, ...]
    weights: tuple[float, ...]
    width_E: tuple[float, ...]
    """Each expert's width as a multiple of the mean."""

    def of(self, counts_LE: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the weight of every expert; 0 without tokens."""
        last = self.weights[-1] / self.tokens[-1]
        beyond_LE = np.maximum(counts_LE - self.tokens[-1], 0.0) * last
        return (np.interp(counts_LE, self.tokens, self.weights) + beyond_LE) * np.asarray(self.width_E)


def weights_of(setup: Setup) -> Weights:
    """Return weights by the belief, in ns of the whole device with all experts alike busy; without one, tokens."""
    widths = np.asarray([setup.model.d_ff_of(e) for e in range(setup.model.num_experts)], dtype=np.float64)
    width_E = tuple((widths / widths.mean()).tolist())
    if setup.belief is None:
        return Weights(tokens=(0.0, float(TOKENS_MOST)), weights=(0.0, float(TOKENS_MOST)), width_E=width_E)
    plan = fallback_plan(setup)
    tokens = [0, *(1 << power for power in range(TOKENS_MOST.bit_length()))]
    costs = [
        setup.belief.layer_ns(plan, 0, np.full(setup.model.num_experts, count, dtype=np.int32)) / len(width_E)
        for count in tokens
    ]
    # More tokens never weigh less, whatever a belief's waves do.
    rising = np.maximum.accumulate(np.asarray(costs) - costs[0])
    return Weights(tokens=tuple(map(float, tokens)), weights=tuple(rising.tolist()), width_E=width_E)
