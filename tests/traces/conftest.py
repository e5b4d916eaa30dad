"""Writes `.pt` fixtures, by torch where it is installed and by hand everywhere."""

import struct
import zipfile

import numpy as np
import pytest

STORAGES = {"i4": "IntStorage", "i8": "LongStorage", "f4": "FloatStorage", "f2": "HalfStorage", "u1": "ByteStorage"}


def pickled(value, storages):
    """Return the pickle instructions of plain data, with arrays as torch's tensors."""

    def parts(values):
        return b"".join(pickled(item, storages) for item in values)

    plain = {
        type(None): lambda: b"N",
        bool: lambda: b"\x88" if value else b"\x89",
        int: lambda: b"\x8a\x09" + value.to_bytes(9, "little", signed=True),
        float: lambda: b"G" + struct.pack(">d", value),
        str: lambda: b"X" + struct.pack("<I", len(value.encode())) + value.encode(),
        list: lambda: b"](" + parts(value) + b"e",
        tuple: lambda: b"(" + parts(value) + b"t",
        dict: lambda: b"}(" + parts(part for item in value.items() for part in item) + b"u",
    }
    return plain[type(value)]() if type(value) in plain else pickled_tensor(value, storages)


def pickled_tensor(value, storages):
    value = np.ascontiguousarray(value)
    key = str(len(storages))
    storages.append(value.tobytes())
    storage = f"ctorch\n{STORAGES[value.dtype.str[1:]]}\n".encode()
    stride = tuple(step // value.itemsize for step in value.strides)
    reference = b"(" + pickled("storage", storages) + storage
    reference += b"".join(pickled(part, storages) for part in (key, "cpu", value.size)) + b"tQ"
    shape = b"".join(pickled(part, storages) for part in (0, value.shape, stride, False))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + shape + b"ccollections\nOrderedDict\n)RtR"


def write_by_hand(value, path):
    storages = []
    content = b"\x80\x02" + pickled(value, storages) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", b"little")
        for key, storage in enumerate(storages):
            archive.writestr(f"archive/data/{key}", storage)
        archive.writestr("archive/version", b"3\n")


def write_by_torch(value, path):
    torch = pytest.importorskip("torch")

    def tensors(value):
        match value:
            case dict():
                return {key: tensors(item) for key, item in value.items()}
            case list() | tuple():
                return type(value)(map(tensors, value))
            case np.ndarray():
                return torch.from_numpy(np.ascontiguousarray(value))
        return value

    torch.save(tensors(value), path)


@pytest.fixture(params=["by hand", "by torch"])
def save_pt(request):
    """Return a function that saves plain data with arrays as a `.pt` file."""
    return {"by hand": write_by_hand, "by torch": write_by_torch}[request.param]


@pytest.fixture
def save_by_hand():
    """Return the writer that needs no torch."""
    return write_by_hand
