"""The slices of a layout on streams: forked, stamped where they begin and end, joined; other work where it belongs.

Shape letters: L MoE layers, S slices.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .other import BEFORE

if TYPE_CHECKING:
    from .other import OtherKernels


@triton.jit
def stamp_kernel(out_ptr):
    """Store the device's timer, ns."""
    now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer; // $1", "=l,r", [0], tl.int64, is_pure=False, pack=1)
    tl.store(out_ptr, now)


class StreamLanes:
    """The lanes of one step; a slice's first stamp is taken before its other work.

    A slice without a stream, alone in its layout, runs on the current one.
    """

    def __init__(
        self,
        streams: Sequence["torch.cuda.Stream | None"],
        stamps_LS2: torch.Tensor,
        *,
        sms: Sequence[int],
        other: "OtherKernels | None" = None,
        places: frozenset[int] = frozenset(),
    ) -> None:
        self._streams, self._sms = streams, sms
        self._stamps = [[stamp_S2.split(1) for stamp_S2 in stamps_S2[: len(streams)]] for stamps_S2 in stamps_LS2]
        self._other, self._places = other, places
        self.layer, self._begun = 0, False

    def enter(self, layer: int) -> None:
        """Go on with a layer: what runs before it is enqueued now."""
        self.layer, self._begun = layer, False
        if self._other and BEFORE in self._places:
            self._other.launch(layer, BEFORE)

    def beside(self, parts: list[Callable[[], None]]) -> None:
        """Fork to a stream for each part, and join."""
        main = torch.cuda.current_stream()
        own = [stream for stream in self._streams if stream is not None]
        # One event for all: torch hands out few streams, and where one is `main` no other may wait for its part.
        forked = main.record_event() if own else None
        for slice_id, (part, stream) in enumerate(zip(parts, self._streams, strict=True)):
            if stream is not None:
                stream.wait_event(forked)
            begin, end = self._stamps[self.layer][slice_id]
            with torch.cuda.stream(stream):
                if not self._begun:
                    stamp_kernel[(1,)](begin)
                    if self._other and 1 + slice_id in self._places:
                        self._other.launch(self.layer, 1 + slice_id, self._sms[slice_id])
                part()
                stamp_kernel[(1,)](end)
        for stream in own:
            main.wait_stream(stream)
        self._begun = True
