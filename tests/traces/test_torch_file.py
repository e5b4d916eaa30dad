"""`.pt` files without torch: tensors come back exactly, and nothing in a file is ever run."""

import contextlib
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertslice.traces.check import TraceError
from expertslice.traces.torch_file import read_torch_file

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")


def save(path, pkl, entries=(), *, compression=zipfile.ZIP_STORED, byteorder=b"little", root="archive"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pkl)
        archive.writestr(f"{root}/byteorder", byteorder)
        for name, content in dict(entries).items():
            archive.writestr(f"{root}/data/{name}", content)
    return path


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor(storage="IntStorage", key="0", count=6, offset=0, size=(2, 3), stride=(3, 1)):
    """Return the pickle of one tensor, by hand."""

    def shape(values):
        return b"(" + b"".join(map(integer, values)) + b"t"

    persistent = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu") + integer(count)
    arguments = (
        persistent + b"tQ" + integer(offset) + shape(size) + shape(stride) + b"\x89ccollections\nOrderedDict\n)R"
    )
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR."


NUMBERS = np.arange(6, dtype="<i4").tobytes()


def test_tensors_by_hand(tmp_path):
    path = tmp_path / "x.pt"
    back = read_torch_file(save(path, tensor(), {"0": NUMBERS}))
    assert back.tolist() == [[0, 1, 2], [3, 4, 5]]
    back = read_torch_file(save(path, tensor(offset=1, size=(2, 2), stride=(1, 3)), {"0": NUMBERS}))
    assert back.tolist() == [[1, 4], [2, 5]]
    big = np.arange(6, dtype=">i4").tobytes()
    assert read_torch_file(save(path, tensor(), {"0": big}, byteorder=b"big")).tolist() == [[0, 1, 2], [3, 4, 5]]
    half = np.array([1.5, -2], "<f4").view("<u2")[1::2].tobytes()
    back = read_torch_file(save(path, tensor("BFloat16Storage", count=2, size=(2,), stride=(1,)), {"0": half}))
    assert back.dtype == np.float32
    assert back.tolist() == [1.5, -2]
    assert read_torch_file(save(path, tensor(count=0, size=(0, 4), stride=(4, 1)), {"0": b""})).shape == (0, 4)


@needs_torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves_comes_back(tmp_path, protocol):
    dtypes = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool", "bfloat16"]
    values = {name: torch.arange(24).reshape(2, 3, 4).to(getattr(torch, name)) for name in dtypes}
    value = {
        "tensors": values,
        "views": [torch.arange(10)[2:8:3], torch.arange(6).reshape(2, 3).T, torch.tensor(7), torch.zeros(0, 3)],
        "plain": [
            1,
            -1,
            2**40,
            -(2**40),
            1.5,
            None,
            True,
            False,
            "näme",
            (),
            (1,),
            (1, 2),
            (1, 2, 3),
            (1, 2, 3, 4),
            {},
        ],
        "ordered": OrderedDict(a=1, b=[{}]),
        "size": torch.Size([1, 2]),
        "long": list(range(3000)),
        "tuple": (torch.ones(2),) * 3,
        1: None,
    }
    torch.save(value, tmp_path / "x.pt", pickle_protocol=protocol)
    back = read_torch_file(tmp_path / "x.pt")
    for name in ("plain", "ordered", "size", "long", 1):
        assert back[name] == value[name]
    for name, expected in values.items():
        np.testing.assert_array_equal(
            back["tensors"][name], expected.float().numpy() if name == "bfloat16" else expected
        )
    for got, expected in zip(back["views"], value["views"], strict=True):
        np.testing.assert_array_equal(got, expected.numpy())
    assert back["tuple"][2] is back["tuple"][0]


class Evil:
    def __init__(self, call, *arguments):
        self.what = call, arguments

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize(
    "evil",
    [
        Evil(os.system, "touch canary"),
        Evil(eval, "open('canary', 'w')"),
        Evil(exec, "open('canary', 'w')"),
        Evil(getattr, Evil(__import__, "os"), "system"),
        Evil(subprocess.call, ["touch", "canary"]),
        {"records": [Evil(print, "x")]},
    ],
)
@pytest.mark.parametrize("protocol", range(6))
def test_code_is_refused_and_not_run(tmp_path, monkeypatch, evil, protocol):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(evil, protocol)
    with pytest.raises(TraceError, match=r"x\.pt .*"):
        read_torch_file(save(tmp_path / "x.pt", content))
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR.", "asks for os.system"),
        (b"\x80\x02ctorch.serialization\nload\n)R.", "asks for torch.serialization.load"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "asks for"),
        (b"\x80\x02" + text("torch._utils._rebuild_tensor_v2") + b")R.", "calls something"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls something"),
        (b"(S'ls'\nios\nsystem\n.", "not plain data"),
        (b"\x80\x02" + b"(" * 65 + b".", "nests deeper than 64"),
        (b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.", "tuple in a place"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "not plain data"),
        (b"\x80\x02\x8a\xff\x01.", "ends early"),
        (b"\x80\x02X\xff\xff\xff\xff.", "ends early"),
        (b"\x80\x02Nr\xff\xff\xff\x7f0.", "not plain data"),
        (b"\x80\x02j\xff\xff\xff\x7f.", "Memo value not found"),
        (b"\x80\x02K\x01Q.", "other than a tensor's storage"),
        (b"\x80\x02", "ends early"),
        (b"", "ends early"),
        (tensor(storage="TypedStorage"), "asks for torch.TypedStorage"),
        (tensor(count=7), "damaged"),
        (tensor(key="../data.pkl"), "lacks"),
        (tensor(offset=1), "reaches beyond its 6"),
        (tensor(offset=-1), "tampered"),
        (tensor(stride=(-3, 1)), "tampered"),
        (tensor(size=(2, 3, 1)), "tampered"),
        (tensor(size=(3, 3)), "reaches beyond"),
        (tensor(size=(2**40, 2**20), stride=(0, 0)), "more memory than the file"),
    ],
)
def test_hostile_pickles_are_one_sentence(tmp_path, content, words):
    with pytest.raises(TraceError, match=words) as caught:
        read_torch_file(save(tmp_path / "x.pt", content, {"0": NUMBERS}))
    assert "x.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hostile_archives_are_one_sentence(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(TraceError, match="compressed"):
        read_torch_file(save(path, tensor(), {"0": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/other", b"")
    with pytest.raises(TraceError, match=r"needs one data\.pkl"):
        read_torch_file(path)
    many = tensor()[:-1] + b"0" + tensor()[2:]
    with pytest.raises(TraceError, match="not plain data"):
        read_torch_file(save(path, many, {"0": NUMBERS}))
    whole = tensor(count=6000, size=(6000,), stride=(1,))
    repeated = b"\x80\x02(" + whole[2:-1] * 3 + b"t."
    with pytest.raises(TraceError, match="more memory"):
        read_torch_file(save(path, repeated, {"0": bytes(24000)}))


def test_deep_data_does_no_harm(tmp_path):
    deep = b"\x80\x02)" + b"\x85" * 200_000 + b"."
    assert len(read_torch_file(save(tmp_path / "x.pt", deep))) == 1


def test_legacy_files_say_what_to_do(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    with pytest.raises(TraceError, match=r"save it again with torch\.save"):
        read_torch_file(path)
    with pytest.raises(TraceError, match="does not exist"):
        read_torch_file(tmp_path / "no.pt")


@needs_torch
def test_legacy_files_of_torch(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(TraceError, match=r"save it again with torch\.save"):
        read_torch_file(tmp_path / "x.pt")


def test_truncation_anywhere_is_one_trace_error(tmp_path):
    whole = save(tmp_path / "x.pt", tensor(), {"0": NUMBERS}).read_bytes()
    for size in range(0, len(whole), 3):
        (tmp_path / "x.pt").write_bytes(whole[:size])
        with pytest.raises(TraceError):
            read_torch_file(tmp_path / "x.pt")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), tail=st.binary(max_size=20))
def test_mangled_pickles_raise_nothing_else(tmp_path, place, value, tail):
    good = bytearray(tensor())
    good[place % len(good)] = value
    with contextlib.suppress(TraceError):
        read_torch_file(save(tmp_path / "x.pt", bytes(good) + tail, {"0": NUMBERS}))


def test_reads_without_torch(tmp_path):
    save(tmp_path / "x.pt", tensor(), {"0": NUMBERS})
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from expertslice.traces.torch_file import read_torch_file\n"
        f"assert read_torch_file({str(tmp_path / 'x.pt')!r}).sum() == 15"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
