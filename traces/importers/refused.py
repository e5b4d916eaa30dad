"""Files that are recognised and are no traces: each says what it is and what to give instead."""

from collections.abc import Callable, Sequence
from typing import NoReturn

from ..check import TraceError
from .content import Content
from .result import ImportOptions

PLACEMENT = (
    "an expert placement (which physical slot holds which expert): nobody's routing is in it; record with SGLang"
)
BALANCE = (
    "a log of vLLM's EPLB, a series of balance figures without experts; return routed experts or log routes instead"
)
IMATRIX = "a GGUF file: an importance matrix counts experts without order, a model has none; record routing instead"
TRACE = "a Parquet file already; open it with open_trace"


def refuse(what: str) -> Callable[[Sequence[Content], ImportOptions], NoReturn]:
    """Return an importer that says what a file is."""

    def build(contents: Sequence[Content], options: ImportOptions) -> NoReturn:
        raise TraceError(f"{contents[0].path} is {what}")

    return build
