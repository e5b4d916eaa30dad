"""Expected expert load some steps ahead, learned online from counts alone; numpy only.

A prediction is a weighted sum of simple ones, the same weights for all layers and experts: how popular an expert has
been so far, means of recent steps, the newest step, and what followed steps at which the neighbouring layers' loads
were like now. The weights are those of least squares over all that was seen, fading slowly.

Shape letters: H steps of history, L MoE layers, E routed experts, F simple predictions.
"""

from dataclasses import dataclass, replace

import numpy as np

from ..traces.schema import F64, I32, Ints

FADE = 0.995
"""Weight that what was learned keeps from each step to the next."""
RIDGE = 1e-3
"""Pull towards equal weights, as a part of the mean square of a prediction."""
FAST = 0.4
"""Weight of the newest step in the fast mean."""
NUM_SIMPLE = 5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictor:
    """What was learned so far; arrays are read-only."""

    horizon: int
    """Steps ahead of the newest one."""
    popular_LE: F64
    """Sum of shares over the steps seen, fading as slowly as they do."""
    seen: float
    gram_FF: F64
    moment_F: F64

    def __post_init__(self) -> None:
        for array in (self.popular_LE, self.gram_FF, self.moment_F):
            array.flags.writeable = False

    def learned(self, counts_HLE: I32) -> "Predictor":
        """Return the predictor after one more step, the newest of the history."""
        share_HLE = shares(counts_HLE)
        gram_FF, moment_F = self.gram_FF, self.moment_F
        if len(share_HLE) > self.horizon + 1:
            simple_FLE = self._simple(share_HLE[: -self.horizon])
            gram_FF = FADE * gram_FF + np.einsum("fij,gij->fg", simple_FLE, simple_FLE)
            moment_F = FADE * moment_F + np.einsum("fij,ij->f", simple_FLE, share_HLE[-1])
        popular_LE, seen = FADE * self.popular_LE + share_HLE[-1], FADE * self.seen + 1.0
        return replace(self, popular_LE=popular_LE, seen=seen, gram_FF=gram_FF, moment_F=moment_F)

    def predicted(self, counts_HLE: I32) -> F64:
        """Return the share [L, E] of its layer's rows that each expert is expected to get, `horizon` steps on."""
        simple_FLE = self._simple(shares(counts_HLE))
        pull = RIDGE * np.trace(self.gram_FF) / NUM_SIMPLE + 1e-12
        weight_F = np.linalg.solve(
            self.gram_FF + pull * np.eye(NUM_SIMPLE), self.moment_F + pull * np.full(NUM_SIMPLE, 1.0 / NUM_SIMPLE)
        )
        share_LE = np.maximum(np.einsum("f,fij->ij", weight_F, simple_FLE), 0.0)
        return share_LE / np.maximum(share_LE.sum(axis=1, keepdims=True), 1e-12)

    def _simple(self, share_HLE: F64) -> F64:
        """Return the simple predictions [F, L, E] from what a history says."""
        newest_LE = share_HLE[-1]
        popular_LE = self.popular_LE / self.seen if self.seen else newest_LE
        fast_LE = np.average(share_HLE, axis=0, weights=(1.0 - FAST) ** np.arange(len(share_HLE))[::-1])
        alike_LE = self._followers(share_HLE) if len(share_HLE) > self.horizon else newest_LE
        return np.stack([popular_LE, share_HLE.mean(axis=0), fast_LE, newest_LE, alike_LE])

    def _followers(self, share_HLE: F64) -> F64:
        """Return each layer's mean over the steps that followed those at which its neighbours were like now."""
        past_HLE, after_HLE = share_HLE[: -self.horizon], share_HLE[self.horizon :]
        distance_HL = np.abs(past_HLE - share_HLE[-1]).sum(axis=2)
        beside_HL = np.zeros_like(distance_HL)
        beside_HL[:, 1:] += distance_HL[:, :-1]
        beside_HL[:, :-1] += distance_HL[:, 1:]
        near_HL = np.exp(-(beside_HL - beside_HL.min(axis=0)) / 0.1)
        return np.einsum("hi,hij->ij", near_HL / near_HL.sum(axis=0), after_HLE)


def shares(counts_HLE: Ints) -> F64:
    """Return counts as parts of their layer's rows; 0 in an idle layer."""
    return counts_HLE / np.maximum(counts_HLE.sum(axis=-1, keepdims=True), 1)


def untrained(num_layers: int, num_experts: int, horizon: int) -> Predictor:
    """Return a predictor that has seen nothing: its weights are equal."""
    return Predictor(
        horizon=horizon,
        popular_LE=np.zeros((num_layers, num_experts)),
        seen=0.0,
        gram_FF=np.zeros((NUM_SIMPLE, NUM_SIMPLE)),
        moment_F=np.zeros(NUM_SIMPLE),
    )
