"""A little of what `fuzz.py` does for long: good files are read, mangled ones are one sentence."""

import importlib.util
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("fuzz", HERE / "fuzz.py")
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


@pytest.fixture
def seeds(tmp_path, save_by_hand):
    (tmp_path / "seeds").mkdir()
    return fuzz.write_seeds(tmp_path / "seeds", save_by_hand)


def test_there_is_a_good_file_of_every_format_that_holds_a_trace(seeds):
    formats = set()
    for path in seeds:
        fuzz.read(path)
        if path.suffix != ".parquet":
            formats.add(fuzz.import_trace(path, **fuzz.OPTIONS).format)
    assert formats == {name for name, form in fuzz.FORMATS.items() if not isinstance(form.build, str)}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 2**32))
def test_mangled_files_are_read_or_one_sentence(tmp_path, seeds, number, monkeypatch):
    rng = random.Random(number)
    source = rng.choice(seeds)
    case = tmp_path / f"case{source.suffix}"
    case.write_bytes(fuzz.mangled(source.read_bytes(), rng))
    monkeypatch.setattr(fuzz, "MOST_PEAK_BYTES", 1 << 62)
    assert fuzz.attempt(case) is None
