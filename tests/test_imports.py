"""Traces, policies, the simulator and the command line load no accelerator library, and doctests hold."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

FREE = ("traces", "policies", "sim")

WATCH = """
import importlib, pkgutil, sys
for package in {packages}:
    folder = importlib.import_module(f"expertslice.{{package}}")
    for module in pkgutil.walk_packages(folder.__path__, f"expertslice.{{package}}."):
        importlib.import_module(module.name)
print([name for name in {barred} if name in sys.modules])
"""


def loaded(packages: tuple[str, ...], barred: tuple[str, ...]) -> str:
    script = WATCH.format(packages=packages, barred=barred)
    return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(("package", "barred"), [
    ("traces", ("torch", "triton", "simpy", "pynvml", "seaborn")),
    ("policies", ("torch", "triton", "simpy", "pynvml", "pytest")),
    ("sim", ("torch", "triton", "pynvml")),
])  # fmt: skip
def test_a_package_loads_nothing_it_must_not(package: str, barred: tuple[str, ...]):
    assert loaded((package,), barred) == "[]"


def test_the_command_line_starts_without_heavy_libraries():
    script = (
        "import sys, expertslice.experiments.cli; print([n for n in ('torch', 'seaborn', 'scipy') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("package", FREE)
def test_doctests(package: str):
    folder = importlib.import_module(f"expertslice.{package}")
    for found in pkgutil.walk_packages(folder.__path__, f"expertslice.{package}."):
        assert doctest.testmod(importlib.import_module(found.name)).failed == 0
