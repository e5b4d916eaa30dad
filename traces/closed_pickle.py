"""A pickle reader that can only build data: no class is imported, nothing is called but what its caller passes in.

Python's own reader, cut down to the instructions that writers of plain data use (dicts, lists, tuples, text, numbers,
references); every other one is refused, so there is no way from a file's bytes to code.
"""

import io
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .check import TraceError

MAX_DEPTH = 64
"""Nested containers under construction; records of routing need about five."""

ALLOWED = b"".join(
    (
        *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
        *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
        *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE),
        *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.APPEND, pickle.APPENDS),
        *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
        *(pickle.SETITEM, pickle.SETITEMS, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID, pickle.REDUCE),
    )
)


@dataclass(frozen=True, slots=True)
class Named:
    """A global that a pickle mentions: its name, and nothing of what it names."""

    name: str


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise TraceError(f"its pickle holds instruction {code:#04x}, which is not plain data; it was not run")


class _Whole(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        taken = super().read(size)
        if size is not None and len(taken) < size:
            raise TraceError("its pickle ends early; the file is truncated")
        return taken


# The reader written in Python takes its instructions from a table; the one written in C has them built in.
_Python: Any = pickle._Unpickler  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


class ClosedUnpickler(_Python):
    """Runs one pickle; `load` returns what it describes and raises `TraceError` when it asks for more than data.

    Args:
        data: The pickle.
        names: The globals it may mention; they come back as `Named`, never imported.
        calls: Which of them it may call, and what is called instead.
        persistent: Returns the object for a persistent id.
    """

    def __init__(
        self,
        data: bytes,
        *,
        names: Collection[str],
        calls: Mapping[str, Callable[..., object]],
        persistent: Callable[[object], object],
    ) -> None:
        super().__init__(_Whole(data))
        self._names = names
        self._calls = calls
        self.persistent_load = persistent

    def find_class(self, module: str, name: str) -> Named:
        if f"{module}.{name}" not in self._names:
            raise TraceError(f"its pickle asks for {module}.{name}, which is not plain data; it was not run")
        return Named(f"{module}.{name}")

    def mark(self) -> None:
        if len(self.metastack) == MAX_DEPTH:
            raise TraceError(f"its pickle nests deeper than {MAX_DEPTH}; records of routing do not")
        self.load_mark()

    def set_item(self) -> None:
        self.set_items([self.stack.pop(-2), self.stack.pop()])

    def set_items(self, pair: Sequence[Any] | None = None) -> None:
        items: Sequence[Any] = self.pop_mark() if pair is None else pair
        target = _expect(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a nested tuple recurses without end in sight; records have no such keys.
            target[_expect(key, str | int | None)] = value

    def reduce(self) -> None:
        arguments, called = _expect(self.stack.pop(), tuple), self.stack.pop()
        if not isinstance(called, Named) or called.name not in self._calls:
            raise TraceError("its pickle calls something that is not plain data; it was not run")
        self.append(self._calls[called.name](*arguments))

    dispatch = _Instructions({code: _Python.dispatch[code] for code in ALLOWED})
    dispatch |= {ord(pickle.MARK): mark, ord(pickle.REDUCE): reduce}
    dispatch |= {ord(pickle.SETITEM): set_item, ord(pickle.SETITEMS): set_items}


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TraceError(f"its pickle has a {type(value).__name__} in a place where plain data has none")
    return value
