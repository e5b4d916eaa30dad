"""The corpus as bytes, one file per domain, with held-out windows that training never touches.

Shape letters: N bytes of one domain, B sequences, C positions.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .model import BOS

Corpus = dict[str, NDArray[np.uint8]]


def read_corpus(path: Path) -> Corpus:
    """Read a tar of text files into bytes by short file name, sorted by name."""
    with tarfile.open(path) as tar:
        files = [(Path(m.name).stem, file.read()) for m in tar if (file := tar.extractfile(m)) is not None]
    return {name: np.frombuffer(content, np.uint8) for name, content in sorted(files)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How text is divided: windows of `window_bytes`, one of each `every` held out, over the whole file."""

    window_bytes: int = 8192
    every: int = 32

    def heldout_starts(self, num_bytes: int) -> NDArray[np.int64]:
        """Give the first byte of each held-out window; only whole windows count."""
        return np.arange(self.every // 2, num_bytes // self.window_bytes, self.every) * self.window_bytes

    def train_spans(self, num_bytes: int) -> NDArray[np.int64]:
        """Give [start, end) of each stretch between held-out windows, int64 [spans, 2]."""
        held = self.heldout_starts(num_bytes)
        return np.stack([np.r_[0, held + self.window_bytes], np.r_[held, num_bytes]], axis=1)

    def chunks(self, text_N: NDArray[np.uint8], length: int) -> NDArray[np.int64]:
        """Cut held-out windows into chunks; return tokens [chunks, length] that begin with BOS."""
        offsets = np.arange(self.window_bytes // (length - 1)) * (length - 1)
        starts = self.heldout_starts(len(text_N))[:, None] + offsets
        bytes_BC = text_N[starts.reshape(-1, 1) + np.arange(length - 1)]
        return np.insert(bytes_BC.astype(np.int64), 0, BOS, axis=1)


class Sampler:
    """Draws training sequences uniformly within a domain, and domains by size ** `power`."""

    def __init__(self, corpus: Corpus, split: Split, *, length: int, power: float, seed: int) -> None:
        self._texts, self._length, self._seed = list(corpus.values()), length, seed
        spans = [split.train_spans(len(text_N)).tolist() for text_N in self._texts]
        self.starts = [
            np.concatenate([np.arange(begin, end - length + 1, dtype=np.int32) for begin, end in of_text])
            for of_text in spans
        ]
        """The bytes of each domain at which a sequence may start."""
        weight = np.array([len(text_N) for text_N in self._texts]) ** float(power)
        self.domain_share = weight / weight.sum()

    def batch(self, step: int, num_sequences: int) -> NDArray[np.int64]:
        """Draw the sequences of one step, int64 [B, length + 1], each beginning with BOS."""
        rng = np.random.default_rng([self._seed, step])
        tokens_BC = np.full((num_sequences, self._length + 1), BOS, np.int64)
        for row, domain in enumerate(rng.choice(len(self._texts), num_sequences, p=self.domain_share)):
            start = self.starts[domain][rng.integers(len(self.starts[domain]))]
            tokens_BC[row, 1:] = self._texts[domain][start : start + self._length]
        return tokens_BC
