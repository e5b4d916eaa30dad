"""A ring of expert ids on the model's device: filled by tensor operations alone, so that it fills in graph replay too.

Shape letters: T tokens of a pass, N rows of the ring, L MoE layers, K top-k.
"""

import torch
from torch import Tensor


class IdRing:
    """Ids of the newest `num_rows` tokens; on a host without a GPU it lies in host memory."""

    def __init__(self, num_layers: int, top_k: int, *, num_rows: int, device: torch.device) -> None:
        self.num_rows = num_rows
        self._ids_NLK = torch.zeros(num_rows, num_layers, top_k, dtype=torch.int32, device=device)
        self._row_N = torch.arange(num_rows, device=device)
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._fetched = 0

    def put(self, ids_TLK: Tensor) -> None:
        """Add the ids of a pass; nothing waits, and a captured call adds those of each replay."""
        num_tokens = len(ids_TLK)
        row_T = (self._row_N[:num_tokens] + self._next) % self.num_rows
        self._ids_NLK.index_copy_(0, row_T, ids_TLK.int())
        self._next.add_(num_tokens)

    def fetch(self, count: int) -> Tensor:
        """Return a copy of the next `count` rows that were put and not fetched [count, L, K]; nothing waits.

        There may be no more than the ring holds.
        """
        assert count <= self.num_rows
        begin = self._fetched % self.num_rows
        head = self._ids_NLK[begin : begin + count]
        self._fetched += count
        return torch.cat([head, self._ids_NLK[: count - len(head)]])
