"""The paper's adaptive policy: hot beside cold, chosen for the load that is expected rather than for recent steps.

Meant for loads that drift slowly under the noise of small batches, which a smoothed history tells apart.
No committed run shows it winning yet: it is compared on request.

Shape letters: H steps of history, L MoE layers, E routed experts.
"""

from dataclasses import dataclass

import numpy as np

from ..traces.schema import F64, I32, Ints
from .choice import Choice
from .contract import Observation
from .hot_cold import HotCold


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictive(HotCold):
    """`HotCold` that prices plans on draws from the expected load."""

    smoothing: float = 0.25
    """Weight of the newest step; each step before weighs that fraction less."""

    def samples(self, obs: Observation, state: Choice) -> list[I32]:
        newest_LE = obs.counts_HLE[-1]
        if not newest_LE.any():
            return []
        load_LE = expected_load(obs.counts_HLE, self.smoothing)
        seeds = [(state.setup.seed, obs.step, i) for i in range(self.num_samples)]
        return [drawn_counts(load_LE, newest_LE.sum(axis=1), seed) for seed in seeds]


def expected_load(counts_HLE: Ints, smoothing: float) -> F64:
    """Return the load expected next but for its scale: the sum over steps, each older one weighing less."""
    weight_H = (1.0 - smoothing) ** np.arange(len(counts_HLE))[::-1]
    return (weight_H[:, None, None] * counts_HLE).sum(axis=0)


def drawn_counts(load_LE: F64, rows_L: Ints, seed: tuple[int, ...]) -> I32:
    """Return so many rows drawn in proportion to a load: its mean would make every rare expert look active.

    Experts are drawn in order of their load, so that renaming them renames the draw.
    """
    order_LE = np.argsort(-load_LE, axis=1, kind="stable")
    sorted_LE = np.take_along_axis(load_LE, order_LE, axis=1)
    share_LE = sorted_LE / np.maximum(sorted_LE.sum(axis=1, keepdims=True), 1e-12)
    drawn_LE = np.random.default_rng(seed).multinomial(rows_L, share_LE)
    counts_LE = np.zeros(load_LE.shape, dtype=np.int32)
    np.put_along_axis(counts_LE, order_LE, drawn_LE.astype(np.int32), axis=1)
    return counts_LE
