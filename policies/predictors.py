"""Online prediction of the next steps' share of tokens by expert, from past steps alone.

"blend" regresses what is coming onto how far the newest step and two smoothed loads lie from popularity, its weights
learned as it goes and shrunk to none, which is popularity. A step costs O(L E) time and memory at each horizon.

Shape letters: L MoE layers, E routed experts, R smoothed loads.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..traces.schema import F64, Ints

Method = Literal["persistence", "popularity", "blend"]
RATES = (1.0, 0.25, 0.05)
"""Weights of the newest step in each smoothed load."""
RIDGE = 1e-4


def shares_of_load(counts_LE: Ints | F64) -> F64:
    """Return each expert's share of its layer's rows; even shares where a layer has none."""
    total_L1 = counts_LE.sum(axis=1, keepdims=True)
    return np.where(total_L1 > 0, counts_LE / np.maximum(total_L1, 1), 1.0 / counts_LE.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictor:
    """What a predictor of the load `horizon` steps ahead has learned; arrays are read-only."""

    method: Method = "blend"
    horizon: int = 1
    num_steps: int = 0
    total_LE: F64 | None = None
    """Tokens so far; None before any step."""
    past_RLE: tuple[F64, ...] = ()
    """Features of the last `horizon` steps, newest last: popularity, then the smoothed loads."""
    gram_RR: F64 | None = None
    moment_R: F64 | None = None

    def learn(self, counts_LE: Ints) -> "Predictor":
        """Return the predictor after one more step."""
        share_LE = shares_of_load(counts_LE)
        total_LE = counts_LE.astype(np.float64) + (0.0 if self.total_LE is None else self.total_LE)
        before_RLE = self.past_RLE[-1] if self.past_RLE else None
        least = 1.0 / (self.num_steps + 1)
        smooth_RLE = [
            share_LE if before_RLE is None else before_RLE[r] + max(rate, least) * (share_LE - before_RLE[r])
            for r, rate in enumerate(RATES, 1)
        ]
        features_RLE = np.stack([shares_of_load(total_LE), *smooth_RLE])
        gram_RR, moment_R = self._regressed(share_LE)
        for array in (total_LE, features_RLE, gram_RR, moment_R):
            array.flags.writeable = False
        past = (*self.past_RLE, features_RLE)[-self.horizon :]
        learned = {"total_LE": total_LE, "gram_RR": gram_RR, "moment_R": moment_R}
        return replace(self, num_steps=self.num_steps + 1, past_RLE=past, **learned)

    def share_LE(self) -> F64:
        """Return the share expected `horizon` steps after the newest; before any step there is none to return."""
        popular_LE, newest_LE = self.past_RLE[-1][:2]
        if self.method == "persistence":
            return newest_LE
        if self.method == "popularity" or self.gram_RR is None or self.moment_R is None:
            return popular_LE
        weight_R = np.linalg.solve(self.gram_RR, self.moment_R)
        mixed_LE = np.maximum(popular_LE + np.tensordot(weight_R, self.past_RLE[-1][1:] - popular_LE, 1), 0.0)
        return mixed_LE / np.maximum(mixed_LE.sum(axis=1, keepdims=True), 1e-12)

    def _regressed(self, share_LE: F64) -> tuple[F64, F64]:
        gram_RR = RIDGE * np.eye(len(RATES)) if self.gram_RR is None else self.gram_RR
        moment_R = np.zeros(len(RATES)) if self.moment_R is None else self.moment_R
        if len(self.past_RLE) == self.horizon:
            popular_LE = self.past_RLE[0][0]
            off_RN = (self.past_RLE[0][1:] - popular_LE).reshape(len(RATES), -1)
            # Summed in order of the values: renaming experts must not change a rounding.
            off_RN = off_RN[:, order := np.lexsort((*off_RN, (share_LE - popular_LE).ravel()))]
            gram_RR = gram_RR + off_RN @ off_RN.T
            moment_R = moment_R + off_RN @ (share_LE - popular_LE).ravel()[order]
        return gram_RR.copy(), moment_R.copy()


def drawn_counts(share_LE: F64, rows_L: Ints, seed: tuple[int, ...]) -> Ints:
    """Return counts drawn from shares [L, E]: the mean would make every rare expert look active.

    Experts are drawn in order of their share, so that renaming them renames the draw.
    """
    order_LE = np.argsort(-share_LE, axis=1, kind="stable")
    sorted_LE = np.take_along_axis(share_LE, order_LE, axis=1)
    drawn_LE = np.random.default_rng(seed).multinomial(rows_L, sorted_LE / sorted_LE.sum(axis=1, keepdims=True))
    counts_LE = np.zeros(share_LE.shape, dtype=np.int32)
    np.put_along_axis(counts_LE, order_LE, drawn_LE.astype(np.int32), axis=1)
    return counts_LE
