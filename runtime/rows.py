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

    @classmethod
    def of_one_request(cls, request_id: int, num_tokens: int) -> "PassRows":
        """Return the rows of a pass of which nothing is known: one prompt."""
        return cls(
            request_id_T=np.full(num_tokens, request_id),
            position_T=np.arange(num_tokens),
            phase_T=np.full(num_tokens, PREFILL, np.uint8),
            keep_T=np.ones(num_tokens, dtype=bool),
        )


class SequenceRows:
    """Follows the sequences of a Hugging Face model from pass to pass, by its arguments.

    A pass over an empty cache, or of another number of sequences, begins new requests. Padding is read from a mask
    [B, S] then; later passes go on from there without looking at the device.
    """

    def __init__(self) -> None:
        self._next_request = self._num_sequences = 0
        self._padding_B = np.zeros(0, dtype=np.int64)

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> PassRows | None:
        """Return the rows of a pass; None when its arguments hold no sequences."""
        tokens = next(
            (t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]) if t is not None), None
        )
        if getattr(tokens, "ndim", 0) < 2:
            return None
        num_sequences, length = tokens.shape[:2]
        # Renamed in newer versions.
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        keep_BS = np.ones((num_sequences, length), dtype=bool)
        if past == 0 or num_sequences != self._num_sequences:
            self._next_request += self._num_sequences
            self._num_sequences = num_sequences
            mask = kwargs.get("attention_mask")
            if getattr(mask, "ndim", 0) == 2 and mask.shape[1] >= length:
                keep_BS = mask[:, -length:].cpu().numpy() != 0
            # Of padding on the right nothing is left before the next token.
            self._padding_B = np.where(keep_BS[:, -1], (~keep_BS).sum(axis=1), 0)
        position_BS = past + np.arange(length) - self._padding_B[:, None]
        request_B = self._next_request + np.arange(num_sequences)
        return PassRows(
            request_id_T=np.repeat(request_B, length),
            position_T=np.maximum(position_BS, 0).ravel(),
            phase_T=np.full(keep_BS.size, DECODE if past and length == 1 else PREFILL, np.uint8),
            keep_T=keep_BS.ravel(),
        )
