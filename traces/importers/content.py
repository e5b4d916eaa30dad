"""What is in a file, told by its first bytes and read without running anything, and careful looks into it."""

import base64
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from ..check import TraceError, reading
from ..schema import F64, I64
from ..torch_file import read_torch_file

Kind = Literal["torch", "npz", "npy", "json", "text", "parquet", "gguf"]
MAGIC: dict[bytes, Kind] = {b"\x93NUMPY": "npy", b"PAR1": "parquet", b"GGUF": "gguf", b"PK": "npz", b"\x80": "torch"}
MAX_INFLATION = 100
"""Bytes that a compressed array may have for each byte in its file, above a free allowance."""

FREE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A file as plain data: dicts, lists, numbers, text and numpy arrays."""

    path: Path
    kind: Kind
    value: object

    @property
    def keys(self) -> frozenset[str]:
        """Return the names at the top: of a dict, of an archive's arrays."""
        return frozenset(as_dict(self.value)) if isinstance(self.value, dict) else frozenset()

    @property
    def records(self) -> list[dict[str, Any]]:
        """Return the JSON objects of a file, be it one, a list of them, or one a line."""
        if self.kind != "json":
            return []
        values = cast("list[object]", self.value) if isinstance(self.value, list) else [self.value]
        return [as_dict(value) for value in values if isinstance(value, dict)]


def open_content(path: Path) -> Content:
    """Read a file, whatever it is called."""
    with reading(path):
        with path.open("rb") as file:
            start = file.read(6)
        kind: Kind | None = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
        if kind == "npz":
            kind = "npz" if all(name.endswith(".npy") for name in _entries(path)) else "torch"
        if kind is None:
            return _open_text(path)
        return Content(path=path, kind=kind, value=READERS[kind](path) if kind in READERS else None)


def _entries(path: Path) -> dict[str, int]:
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


def _load_npz(path: Path) -> dict[str, NDArray[Any]]:
    size = sum(_entries(path).values())
    if size > FREE_BYTES + MAX_INFLATION * path.stat().st_size:
        raise TraceError(f"its arrays would inflate to {size} bytes; save them with numpy.savez, uncompressed")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


READERS: dict[Kind, Callable[[Path], object]] = {
    "npz": _load_npz,
    "npy": partial(np.load, allow_pickle=False),
    "torch": read_torch_file,
}


def _open_text(path: Path) -> Content:
    text = path.read_bytes().decode()
    if text.lstrip()[:1] not in ("{", "["):
        return Content(path=path, kind="text", value=text)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        value = [json.loads(line) for line in text.splitlines() if line.strip()]
    return Content(path=path, kind="json", value=value)


def only(contents: Sequence[Content], why: str) -> Content:
    """Return the one file of a format whose files do not join."""
    if len(contents) > 1:
        raise TraceError(f"{why}; import one file at a time")
    return contents[0]


def as_dict(value: object) -> dict[str, Any]:
    """Return a dict, keys as text."""
    if not isinstance(value, dict):
        raise TraceError(f"a {type(value).__name__} stands where named fields belong; check the file")
    return {str(key): item for key, item in cast("dict[object, Any]", value).items()}


def as_list(value: object) -> list[Any]:
    """Return a list or tuple as a list."""
    if not isinstance(value, list | tuple):
        raise TraceError(f"a {type(value).__name__} stands where a list belongs; check the file")
    return list(cast("list[Any]", value))


def as_ints(value: object, name: str, ndim: int) -> I64:
    """Return an integer array of `ndim` dimensions, from an array or nested lists."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise TraceError(f"{name} has rows of different lengths; its layers or top-k are mixed") from error
    if not array.size and array.ndim <= ndim:
        array = array.astype(np.int64)
    if array.ndim != ndim or array.dtype.kind not in "iu":
        raise TraceError(f"{name} is {array.dtype} with {array.ndim} dimensions; it must be integers with {ndim}")
    return array.astype(np.int64)


def as_floats(value: object, name: str) -> F64:
    """Return a finite floating-point array."""
    # What no number can be made of is told below, not by a warning.
    with np.errstate(invalid="ignore"):
        array = np.asarray(value, dtype=np.float64)
    if not np.isfinite(array).all():
        raise TraceError(
            f"{name} holds NaN or infinity at {np.argwhere(~np.isfinite(array))[0].tolist()}; record again"
        )
    return array


def decode_ids(value: object, dtype: str) -> I64:
    """Return expert ids sent in a response: nested lists, base64 of an .npy, or base64 of raw ids of `dtype`."""
    if not isinstance(value, str):
        return as_ints(value, "routed_experts", 3)
    raw = base64.b64decode(value, validate=True)
    if raw.startswith(b"\x93NUMPY"):
        return as_ints(np.load(io.BytesIO(raw), allow_pickle=False), "routed_experts", 3)
    if dtype not in ("int32", "uint16", "uint8"):
        raise TraceError(f"routed_experts_dtype is {dtype!r}; allowed are int32, uint16 and uint8")
    return np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<")).astype(np.int64)
