"""What is measured and what is held out, drawn by seed and committed as data before anything is measured.

`python -P -m expertslice.experiments.design > experiments/data/design.json` writes it anew.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..traces.schema import MoeSpec

PATH = Path(__file__).with_name("data") / "design.json"
SEED = 20261124
MODELS = ("large", "medium", "mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b", "small")
"""Of the committed layer times."""
SHAPES = {
    "4096x14336-E8": (4096, 14336, 8, 2), "2048x4096-E32": (2048, 4096, 32, 4), "2048x1024-E64": (2048, 1024, 64, 8),
    "2048x768-E128": (2048, 768, 128, 8), "1024x2048-E16": (1024, 2048, 16, 2), "4096x1536-E48": (4096, 1536, 48, 6),
}  # fmt: skip
"""d_model, d_ff, experts, top-k of the layers to profile."""
TOKENS = (16, 128, 1024, 4096)
LATER_SHAPES = {
    "2880x2880-E32": (2880, 2880, 32, 4), "2048x1408-E64": (2048, 1408, 64, 6), "512x1024-E8": (512, 1024, 8, 2),
    "3072x8192-E16": (3072, 8192, 16, 1), "1536x3072-E24": (1536, 3072, 24, 3), "1024x512-E32": (1024, 512, 32, 4),
    "5120x2048-E40": (5120, 2048, 40, 2), "6144x4096-E8": (6144, 4096, 8, 4),
}  # fmt: skip
"""Added, with what of them is held out, once the first had been measured and before these were."""
LATER_TOKENS = (32, 256, 2048)
SKEWS = ("uniform", "zipf")
SM_RANGES = ((8, 32), (40, 64), (72, 96), (104, 120))
"""Ranges of a split's first slice, SMs, both ends included."""


def drawn(seed: int) -> dict[str, Any]:
    """Return the folds of committed records, and the shapes, skews by tokens, and split range that are held out."""
    rng = np.random.default_rng(seed)
    models = rng.permutation(MODELS).tolist()
    shapes = rng.permutation(list(SHAPES)).tolist()
    skewed = [[int(tokens), SKEWS[int(rng.integers(2))]] for tokens in sorted(rng.permutation(TOKENS)[:2].tolist())]
    split_sms = list(SM_RANGES[int(rng.integers(len(SM_RANGES)))])
    later = rng.permutation(list(LATER_SHAPES)).tolist()
    return {
        "seed": seed,
        "folds": [sorted(models[:3]), sorted(models[3:])],
        "held_out": {
            "shapes": sorted(shapes[:2]),
            "later_shapes": sorted(later[:3]),
            "loads": skewed,
            "split_sms": split_sms,
        },
    }


DESIGN: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else drawn(SEED)
FOLD_SEED: int = DESIGN["seed"]
FOLDS: tuple[tuple[str, ...], ...] = tuple(map(tuple, DESIGN["folds"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One load of one layer to profile."""

    shape: str
    tokens: int
    skew: str

    @property
    def name(self) -> str:
        """Return the load in a few letters; a group of the profile."""
        return f"{self.shape} {self.tokens} {self.skew}"

    @property
    def spec(self) -> MoeSpec:
        """Return the layer."""
        d_model, d_ff, num_experts, top_k = (SHAPES | LATER_SHAPES)[self.shape]
        return MoeSpec(
            name=self.shape, num_layers=1, num_experts=num_experts, top_k=top_k, d_model=d_model, d_ff=(d_ff,),
            kind="swiglu",
        )  # fmt: skip

    @property
    def held_out(self) -> bool:
        """Return whether no model may be fitted to it."""
        held = DESIGN["held_out"]
        return self.shape in held["shapes"] + held["later_shapes"] or [self.tokens, self.skew] in held["loads"]


def loads() -> Iterator[Load]:
    """Yield the loads, those of a shape side by side."""
    first, later = ((SHAPES, TOKENS), (LATER_SHAPES, LATER_TOKENS))
    for shape, tokens, skew in itertools.chain(itertools.product(*first, SKEWS), itertools.product(*later, SKEWS)):
        yield Load(shape=shape, tokens=tokens, skew=skew)


def split_held_out(first_sms: int) -> bool:
    """Return whether splits that give the first slice so many SMs are held out."""
    least, most = DESIGN["held_out"]["split_sms"]
    return least <= first_sms <= most


if __name__ == "__main__":
    sys.stdout.write(json.dumps(drawn(SEED), indent=2) + "\n")
