"""Which request and position each row of a forward pass is.

Shape letters: B sequences, S positions of a pass, T = B x S rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..traces.schema import I64, U8, Bools

PREFILL, DECODE = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRows:
    """The rows of one pass; those that are not kept are padding."""

    request_id_T: I64
    position_T: I64
    phase_T: U8
    keep_T: Bools

    @property
    def num_rows(self) -> int:
        return len(self.keep_T)

    def rows(self) -> "PassRows":
        return self

    @classmethod
    def of_one_request(cls, request_id: int, num_tokens: int) -> "PassRows":
        """Return the rows of a pass of which nothing is known: one prompt."""
        return cls(
            request_id_T=np.full(num_tokens, request_id),
            position_T=np.arange(num_tokens),
            phase_T=np.full(num_tokens, PREFILL, np.uint8),
            keep_T=np.ones(num_tokens, dtype=bool),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencePass:
    """A pass over sequences: what its rows are is worked out when they are asked for, after many passes."""

    first_request: int
    num_sequences: int
    length: int
    past: int
    padding_B: I64
    keep_BS: Bools | None
    """None: no padding."""

    @property
    def num_rows(self) -> int:
        return self.num_sequences * self.length

    def rows(self) -> PassRows:
        """Return which request and position each row is."""
        position_BS = self.past + np.arange(self.length) - self.padding_B[:, None]
        request_B = self.first_request + np.arange(self.num_sequences)
        phase = DECODE if self.past and self.length == 1 else PREFILL
        return PassRows(
            request_id_T=np.repeat(request_B, self.length),
            position_T=np.maximum(position_BS, 0).ravel(),
            phase_T=np.full(self.num_rows, phase, np.uint8),
            keep_T=np.ones(self.num_rows, dtype=bool) if self.keep_BS is None else self.keep_BS.ravel(),
        )


class SequenceRows:
    """Follows the sequences of a Hugging Face model from pass to pass, by its arguments.

    A pass over an empty cache, or of another number of sequences, begins new requests. Padding is read from a mask
    [B, S] then; later passes go on from there without looking at the device.
    """

    def __init__(self) -> None:
        self._next_request = self._num_sequences = 0
        self._padding_B = np.zeros(0, dtype=np.int64)

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> SequencePass | None:
        """Return the rows of a pass; None when its arguments hold no sequences."""
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is None and args:
            tokens = args[0]
        if getattr(tokens, "ndim", 0) < 2:
            return None
        num_sequences, length = tokens.shape[:2]
        # Renamed in newer versions.
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        keep_BS = None
        if past == 0 or num_sequences != self._num_sequences:
            self._next_request += self._num_sequences
            self._num_sequences = num_sequences
            self._padding_B = np.zeros(num_sequences, dtype=np.int64)
            mask = kwargs.get("attention_mask")
            if getattr(mask, "ndim", 0) == 2 and mask.shape[1] >= length:
                keep_BS = mask[:, -length:].cpu().numpy() != 0
                # Of padding on the right nothing is left before the next token.
                self._padding_B = np.where(keep_BS[:, -1], (~keep_BS).sum(axis=1), 0)
        return SequencePass(
            first_request=self._next_request,
            num_sequences=num_sequences,
            length=length,
            past=past,
            padding_B=self._padding_B,
            keep_BS=keep_BS,
        )
