"""A pickle reader that can only build data: no class is imported, nothing is called but what its caller passes in.

It knows the instructions that writers of plain data use (dicts, lists, tuples, text, numbers, references) and refuses
every other one, so there is no way from a file's bytes to code.
"""

import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .check import TraceError

MAX_DEPTH = 64
"""Nested containers under construction; records of routing need about five."""

NUMBERS = {0x4A: "<i", 0x4B: "<B", 0x4D: "<H", 0x47: ">d"}
TEXTS = {0x58: "<I", 0x8C: "<B"}
MEMO_PUT = {0x71: "<B", 0x72: "<I"}
MEMO_GET = {0x68: "<B", 0x6A: "<I"}
CONSTANTS: dict[int, object] = {0x4E: None, 0x88: True, 0x89: False}
FIXED_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
STOP = 0x2E


@dataclass(frozen=True, slots=True)
class Named:
    """A global that a pickle mentions: its name, and nothing of what it names."""

    name: str


class ClosedUnpickler:
    """Runs one pickle.

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
        self._data = data
        self._place = 0
        self._names = names
        self._calls = calls
        self._persistent = persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def load(self) -> object:
        """Return what the pickle describes.

        Raises:
            TraceError: It asks for more than data.
        """
        while (code := self._data[self._place]) != STOP:
            self._place += 1
            step = _STEPS.get(code)
            if step is None:
                raise TraceError(f"its pickle holds instruction {code:#04x}, which is not plain data; it was not run")
            step(self, code)
        return self._stack.pop()

    def _take(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self._data, self._place)
        self._place += struct.calcsize(layout)
        return value

    def _bytes(self, size: int) -> bytes:
        taken = self._data[self._place : self._place + size]
        if len(taken) != size:
            raise TraceError("its pickle ends early; the file is truncated")
        self._place += size
        return taken

    def _above_mark(self) -> list[Any]:
        place = self._marks.pop()
        items = self._stack[place:]
        del self._stack[place:]
        return items

    def mark(self, _: int) -> None:
        if len(self._marks) == MAX_DEPTH:
            raise TraceError(f"its pickle nests deeper than {MAX_DEPTH}; records of routing do not")
        self._marks.append(len(self._stack))

    def skip(self, code: int) -> None:
        self._place += {0x80: 1, 0x95: 8}[code]

    def number(self, code: int) -> None:
        self._stack.append(self._take(NUMBERS[code]))

    def long(self, _: int) -> None:
        self._stack.append(int.from_bytes(self._bytes(self._take("<B")), "little", signed=True))

    def text(self, code: int) -> None:
        self._stack.append(self._bytes(self._take(TEXTS[code])).decode())

    def constant(self, code: int) -> None:
        self._stack.append(CONSTANTS[code])

    def empty(self, code: int) -> None:
        self._stack.append({0x7D: dict, 0x5D: list, 0x29: tuple}[code]())

    def tuple(self, code: int) -> None:
        size = FIXED_TUPLES.get(code)
        self._stack.append(
            tuple(self._above_mark() if size is None else [self._stack.pop() for _ in range(size)][::-1])
        )

    def append(self, code: int) -> None:
        items = self._above_mark() if code == 0x65 else [self._stack.pop()]
        _expect(self._stack[-1], list).extend(items)

    def set_items(self, code: int) -> None:
        items = self._above_mark() if code == 0x75 else [self._stack.pop(-2), self._stack.pop()]
        target = _expect(self._stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a nested tuple recurses without end in sight; records have no such keys.
            target[_expect(key, str | int | None)] = value

    def put(self, code: int) -> None:
        self._memo[self._take(MEMO_PUT[code]) if code in MEMO_PUT else len(self._memo)] = self._stack[-1]

    def get(self, code: int) -> None:
        self._stack.append(self._memo[self._take(MEMO_GET[code])])

    def named(self, code: int) -> None:
        if code == 0x93:
            name, module = _expect(self._stack.pop(), str), _expect(self._stack.pop(), str)
        else:
            module, name = (self._line() for _ in range(2))
        if f"{module}.{name}" not in self._names:
            raise TraceError(f"its pickle asks for {module}.{name}, which is not plain data; it was not run")
        self._stack.append(Named(f"{module}.{name}"))

    def _line(self) -> str:
        end = self._data.index(b"\n", self._place)
        line = self._data[self._place : end].decode()
        self._place = end + 1
        return line

    def persistent(self, _: int) -> None:
        self._stack.append(self._persistent(self._stack.pop()))

    def reduce(self, _: int) -> None:
        arguments, called = _expect(self._stack.pop(), tuple), self._stack.pop()
        if not isinstance(called, Named) or called.name not in self._calls:
            raise TraceError("its pickle calls something that is not plain data; it was not run")
        self._stack.append(self._calls[called.name](*arguments))


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TraceError(f"its pickle has a {type(value).__name__} in a place where plain data has none")
    return value


_STEPS: dict[int, Callable[[ClosedUnpickler, int], None]] = {
    0x28: ClosedUnpickler.mark,
    0x8A: ClosedUnpickler.long,
    0x51: ClosedUnpickler.persistent,
    0x52: ClosedUnpickler.reduce,
    **dict.fromkeys((0x80, 0x95), ClosedUnpickler.skip),
    **dict.fromkeys(NUMBERS, ClosedUnpickler.number),
    **dict.fromkeys(TEXTS, ClosedUnpickler.text),
    **dict.fromkeys(CONSTANTS, ClosedUnpickler.constant),
    **dict.fromkeys((0x7D, 0x5D, 0x29), ClosedUnpickler.empty),
    **dict.fromkeys((0x74, *FIXED_TUPLES), ClosedUnpickler.tuple),
    **dict.fromkeys((0x61, 0x65), ClosedUnpickler.append),
    **dict.fromkeys((0x73, 0x75), ClosedUnpickler.set_items),
    **dict.fromkeys((*MEMO_PUT, 0x94), ClosedUnpickler.put),
    **dict.fromkeys(MEMO_GET, ClosedUnpickler.get),
    **dict.fromkeys((0x63, 0x93), ClosedUnpickler.named),
}
