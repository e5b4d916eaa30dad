"""The package list matches the folders, and the built wheel carries its data."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP_LEVEL = ("traces", "policies", "kernels", "sim", "runtime", "experiments")


def folders_with_code() -> set[str]:
    found = {"expertslice"}
    for top in TOP_LEVEL:
        found |= {
            "expertslice." + ".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / top).rglob("__init__.py")
        }
    return found


def test_the_package_list_names_every_folder():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders_with_code()


def test_no_module_stands_at_the_root_but_the_package_itself():
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


def test_every_code_file_is_shorter_than_400_lines():
    long = [
        str(path.relative_to(ROOT))
        for top in TOP_LEVEL
        for path in (ROOT / top).rglob("*.py")
        if len(path.read_text().splitlines()) > 400
    ]
    assert long == []


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A build writes beside its sources; it gets a copy so that the checkout stays as it is.
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in tracked:
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


@pytest.mark.parametrize("pattern", ["traces/bundled/*.parquet", "policies/devices/*.toml", "policies/*.toml",
                                     "traces/*.toml", "experiments/data/*.json",
                                     "experiments/templates/*.j2"])  # fmt: skip
def test_the_wheel_carries_the_data(wheel_names: list[str], pattern: str):
    expected = {f"expertslice/{path.relative_to(ROOT)}" for path in ROOT.glob(pattern)}
    assert expected
    assert expected <= set(wheel_names)


def test_the_wheel_carries_no_tests(wheel_names: list[str]):
    assert not [name for name in wheel_names if name.startswith(("tests/", "expertslice/tests/"))]


def test_traces_that_ship_lie_in_one_folder():
    assert {path.parent.name for path in (ROOT / "traces").rglob("*.parquet")} == {"bundled"}
