"""Device facts, tile variants and MIG profiles as data: the one place in `policies` that reads files."""

import tomllib
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from ..traces.schema import nearest
from .contract import DeviceSpec, MigProfile, TileVariant

DEVICES = Path(__file__).with_name("devices")
PROVENANCE_FIELDS = frozenset({"mig_profiles", "sources", "rel_errors"})


def device_names() -> tuple[str, ...]:
    """Return the names of the devices that ship with the package."""
    return tuple(sorted(path.stem for path in DEVICES.glob("*.toml")))


@cache
def load_device(name_or_path: str) -> DeviceSpec:
    """Return a device by name, or from a TOML file of the same form.

    Raises:
        ValueError: the name is unknown, or the file lacks a figure, its source, or holds one that is not known.
    """
    path = Path(name_or_path) if name_or_path.endswith(".toml") else DEVICES / f"{name_or_path}.toml"
    if not path.is_file():
        raise ValueError(nearest("device", name_or_path, device_names()))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"device file {path} is not valid TOML ({error}); compare it with a shipped one") from None
    return _device_from(table, str(path))


def _device_from(table: dict[str, Any], where: str) -> DeviceSpec:
    expected = {f.name for f in fields(DeviceSpec)} - PROVENANCE_FIELDS
    given = set(table) - {"mig_profiles"}
    if expected != given:
        missing, extra = sorted(expected - given), sorted(given - expected)
        raise ValueError(f"device file {where} lacks {missing} and holds unknown {extra}; every figure must be given")
    values: dict[str, Any] = {}
    sources: list[tuple[str, str]] = []
    rel_errors: list[tuple[str, float]] = []
    for name, entry in ((f, table[f]) for f in sorted(given)):
        if not isinstance(entry, dict):
            values[name] = entry
            continue
        if "source" not in entry or "value" not in entry:
            raise ValueError(f"device file {where}: {name} needs a value and a source")
        values[name] = tuple(entry["value"]) if isinstance(entry["value"], list) else entry["value"]
        sources.append((name, entry["source"]))
        if entry.get("rel_error"):
            rel_errors.append((name, float(entry["rel_error"])))
    profiles = tuple(_profile_from(entry, where) for entry in table.get("mig_profiles", ()))
    return DeviceSpec(**values, mig_profiles=profiles, sources=tuple(sources), rel_errors=tuple(rel_errors))


def _profile_from(entry: dict[str, Any], where: str) -> MigProfile:
    known = {f.name for f in fields(MigProfile)}
    if missing := sorted((known | {"source"}) - set(entry)):
        raise ValueError(f"device file {where}: MIG profile {entry.get('name', '')!r} lacks {missing}; give them")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k in known}
    return MigProfile(**values)


@cache
def load_variants(compute_capability: int = 90) -> tuple[TileVariant, ...]:
    """Return the shipped tile variants as compiled for a compute capability (90 is 9.0), smallest block_m first.

    Raises:
        ValueError: they were not compiled for that one.
    """
    table = tomllib.loads(Path(__file__).with_name("tiles.toml").read_text(encoding="utf-8"))
    shapes = {f.name for f in fields(TileVariant)}
    target = f"sm_{compute_capability}"
    compiled = sorted(set(table["variants"][0]) - shapes)
    if target not in compiled:
        raise ValueError(
            f"tile variants are not compiled for {target}; there are {', '.join(compiled)}, use one of them"
        )
    variants = [
        TileVariant(**{k: v for k, v in entry.items() if k in shapes}, **entry[target]) for entry in table["variants"]
    ]
    return tuple(sorted(variants, key=lambda v: (v.block_m, v.block_n, v.block_k, v.num_warps, v.num_stages)))
