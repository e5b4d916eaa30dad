"""Reads what `torch.save` wrote, without torch and without running anything: a zip of raw storages and one pickle.

Tensors come back as numpy arrays (bfloat16 as float32), containers as dicts, lists and tuples. Sizes are bounded by
the archive's own: a small file cannot ask for much memory.
"""

import math
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .check import TraceError, reading
from .closed_pickle import ClosedUnpickler, Named

MAX_PICKLE_BYTES = 16 << 20
"""Tensors are not in it: so much holds the lists of a million tokens, and bounds what its objects can take."""

REBUILD = "torch._utils._rebuild_tensor_v2"
BFLOAT16 = np.dtype([("bits", "u2")])
FLOATS = {"Double": np.dtype("f8"), "Float": np.dtype("f4"), "Half": np.dtype("f2"), "BFloat16": BFLOAT16}
WHOLE = {"Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?"}
DTYPES = FLOATS | {name: np.dtype(code) for name, code in WHOLE.items()}
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()}
NAMES = frozenset((*STORAGES, REBUILD, "torch.Size", "collections.OrderedDict"))


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
            return _Archive(archive, path.stat().st_size).load()


class _Archive:
    """One opened file: its storages, each read once, and the bytes of tensors that it may still hand out."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        self._budget = size
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise TraceError("its entries are compressed, which torch.save never does; save it again with torch.save")
        if sum(entry.file_size for entry in entries) > size:
            raise TraceError("its entries claim more bytes than the file has; it was tampered with")
        pickles = [
            entry for entry in entries if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")
        ]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise TraceError(f"it needs one data.pkl of at most {MAX_PICKLE_BYTES >> 20} MiB; save shorter recordings")
        self._pickle = pickles[0].filename
        self._root = self._pickle.removesuffix("data.pkl")
        names = {entry.filename for entry in entries}
        marker = f"{self._root}byteorder"
        self._order: Literal[">", "<"] = ">" if marker in names and archive.read(marker) == b"big" else "<"
        self._storages: dict[str, bytes] = {}

    def load(self) -> object:
        calls = {REBUILD: self._tensor, "torch.Size": tuple, "collections.OrderedDict": dict}
        data = self._archive.read(self._pickle)
        return ClosedUnpickler(data, names=NAMES, calls=calls, persistent=self._storage).load()

    def _storage(self, persistent_id: object) -> NDArray[np.generic]:
        """Return a storage as a flat array."""
        match persistent_id:
            case ("storage", Named(name), str(key), str(), int(count)) if name in STORAGES:
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
