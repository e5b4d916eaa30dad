"""Reads what `torch.save` wrote, without torch and without running anything: a zip of raw storages and one pickle.

Tensors come back as numpy arrays (bfloat16 as float32), containers as dicts, lists and tuples. Sizes are bounded by
the archive's own: a small file cannot ask for much memory.

The pickle is run by Python's own reader, cut down to the instructions that writers of plain data use (dicts, lists,
tuples, text, numbers, references); every other one is refused. No class is imported and nothing is called but the
three functions of `_Reader`, so there is no way from a file's bytes to code.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .check import TraceError, reading

MAX_PICKLE_BYTES = 16 << 20
"""Tensors are not in it: so much holds the lists of a million tokens, and bounds what its objects can take."""
MAX_DEPTH = 64
"""Nested containers under construction; records of routing need about five."""

BFLOAT16 = np.dtype([("bits", "u2")])
FLOATS = {"Double": np.dtype("f8"), "Float": np.dtype("f4"), "Half": np.dtype("f2"), "BFloat16": BFLOAT16}
WHOLE = {"Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?"}
DTYPES = FLOATS | {name: np.dtype(code) for name, code in WHOLE.items()}
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()}

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


def read_torch_file(path: str | Path) -> object:
    """Return the object in a `.pt` file.

    Raises:
        TraceError: The file is damaged, not of torch's zip format, or holds more than plain data and tensors.
    """
    path = Path(path)
    with reading(path), path.open("rb") as file:
        if file.read(2) != b"PK":
            raise TraceError("it is not in torch's zip format; load it with torch and save it again with torch.save")
        with zipfile.ZipFile(file) as archive:
            size = path.stat().st_size
            return _Reader(archive, _pickle_name(archive, size), size).load()


def _pickle_name(archive: zipfile.ZipFile, size: int) -> str:
    """Return the name of the pickle in an archive of sound sizes."""
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise TraceError("its entries are compressed, which torch.save never does; save it again with torch.save")
    if sum(entry.file_size for entry in entries) > size:
        raise TraceError("its entries claim more bytes than the file has; it was tampered with")
    pickles = [entry for entry in entries if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
        raise TraceError(f"it needs one data.pkl of at most {MAX_PICKLE_BYTES >> 20} MiB; save shorter recordings")
    return pickles[0].filename


@dataclass(frozen=True, slots=True)
class _Named:
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


class _Reader(_Python):
    """Runs the pickle of one archive; reads each storage once and counts the bytes of tensors that it hands out."""

    def __init__(self, archive: zipfile.ZipFile, name: str, size: int) -> None:
        super().__init__(_Whole(archive.read(name)))
        self._archive = archive
        self._budget = size
        self._root = name.removesuffix("data.pkl")
        marker = f"{self._root}byteorder"
        self._order: Literal[">", "<"] = ">" if marker in archive.namelist() and archive.read(marker) == b"big" else "<"
        self._storages: dict[str, bytes] = {}
        self._calls: dict[str, Callable[..., object]] = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch.Size": tuple,
            "collections.OrderedDict": dict,
        }

    def find_class(self, module: str, name: str) -> _Named:
        whole = f"{module}.{name}"
        if whole not in self._calls and whole not in STORAGES:
            raise TraceError(f"its pickle asks for {whole}, which is not plain data; it was not run")
        return _Named(whole)

    def persistent_load(self, persistent_id: object) -> NDArray[np.generic]:
        """Return a storage as a flat array."""
        match persistent_id:
            case ("storage", _Named(name), str(key), str(), int(count)) if name in STORAGES:
                stored = STORAGES[name].newbyteorder(self._order)
            case _:
                raise TraceError("its pickle refers to something other than a tensor's storage; save tensors alone")
        if key not in self._storages:
            self._storages[key] = self._archive.read(f"{self._root}data/{key}")
        return np.frombuffer(self._storages[key], dtype=stored, count=count)

    def _tensor(
        self, storage: NDArray[np.generic], offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
    ) -> NDArray[np.generic]:
        """Return a view of a storage, after making sure that it ends inside it."""
        if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
            raise TraceError(f"a tensor has size {size}, strides {stride} and offset {offset}; it was tampered with")
        count = math.prod(size)
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if count else 0
        if end > len(storage):
            raise TraceError(f"a tensor of size {size} reaches beyond its {len(storage)} stored values; it is damaged")
        self._budget -= count * storage.itemsize
        if self._budget < 0:
            raise TraceError("its tensors repeat one storage and would need more memory than the file; save clones")
        steps = [step * storage.itemsize for step in stride]
        view: NDArray[Any] = np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)
        if storage.dtype.names is None:
            return view
        # bfloat16 is the upper half of a float32.
        return np.left_shift(view["bits"].astype(np.uint32), 16, dtype=np.uint32).view(np.float32)

    def _mark(self) -> None:
        if len(self.metastack) == MAX_DEPTH:
            raise TraceError(f"its pickle nests deeper than {MAX_DEPTH}; records of routing do not")
        self.load_mark()

    def _set_item(self) -> None:
        self._set([self.stack.pop(-2), self.stack.pop()])

    def _set_items(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: Sequence[Any]) -> None:
        target = _expect(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a nested tuple recurses without end in sight; records have no such keys.
            target[_expect(key, str | int | None)] = value

    def _reduce(self) -> None:
        arguments, called = _expect(self.stack.pop(), tuple), self.stack.pop()
        if not isinstance(called, _Named) or called.name not in self._calls:
            raise TraceError("its pickle calls something that is not plain data; it was not run")
        self.append(self._calls[called.name](*arguments))

    dispatch = _Instructions({code: _Python.dispatch[code] for code in ALLOWED})
    dispatch |= {ord(pickle.MARK): _mark, ord(pickle.REDUCE): _reduce}
    dispatch |= {ord(pickle.SETITEM): _set_item, ord(pickle.SETITEMS): _set_items}


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TraceError(f"its pickle has a {type(value).__name__} in a place where plain data has none")
    return value
