"""The table of policies that the command line offers by name. Code passes objects, not names."""

import dataclasses
import importlib
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from importlib.metadata import entry_points
from typing import Any

from ..traces.names import nearest
from .contract import Policy
from .dynamic import Dynamic
from .hot_cold import HotCold
from .oracle import Oracle
from .proportional import Proportional
from .static import Static
from .unsliced import Unsliced

ENTRY_POINT_GROUP = "expertslice.policies"

POLICIES: dict[str, type[Policy[Any]]] = {
    "unsliced": Unsliced,
    "static": Static,
    "proportional": Proportional,
    "dynamic": Dynamic,
    "hot_cold": HotCold,
    "oracle": Oracle,
}


def policy_names() -> tuple[str, ...]:
    """Return the names that `make_policy` knows: ours, then those that installed packages add."""
    ours = tuple(POLICIES)
    return ours + tuple(sorted(point.name for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in ours))


def make_policy(name: str, params: Mapping[str, object] | None = None) -> Policy[Any]:
    """Return a policy by a name of the table, an entry point's name, or "module:Class".

    Texts among `params` are read as the type of the dataclass field they name.

    Raises:
        ValueError: nothing of that name exists, it does not satisfy the contract, or a parameter is wrong.
    """
    return build_policy(policy_class(name), params or {})


def policy_class(name: str) -> type[Policy[Any]]:
    """Return the class behind a name.

    Raises:
        ValueError: nothing of that name exists, or it does not satisfy the contract.
    """
    if name in POLICIES:
        return POLICIES[name]
    points = [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name]
    if not points and ":" not in name:
        raise ValueError(nearest("policy", name, policy_names()) + ", or give module:Class")
    target = points[0].value if points else name
    module_name, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"policy {name!r} cannot be imported ({error}); give module:Class of an installed class"
        ) from None
    return checked_class(name, found)


def checked_class(name: str, found: object) -> type[Policy[Any]]:
    """Return `found` if it is a class that satisfies the contract.

    Raises:
        ValueError: it is no dataclass with init, layouts and plan, and booleans foresees and reads_clock.
    """
    wants = "a frozen dataclass with init, layouts, plan and booleans foresees and reads_clock"
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        raise ValueError(f"policy {name!r} is {type(found).__name__} {found!r:.60}; it must be {wants}")
    missing = [m for m in ("init", "layouts", "plan") if not callable(getattr(found, m, None))]
    missing += [m for m in ("foresees", "reads_clock") if not isinstance(getattr(found, m, None), bool)]
    if missing:
        raise ValueError(f"policy {name!r} lacks {', '.join(missing)}; it must be {wants}")
    return typing.cast("type[Policy[Any]]", found)


def build_policy(cls: type[Policy[Any]], params: Mapping[str, object]) -> Policy[Any]:
    """Return an instance of a policy class with its parameters set."""
    hints = parameter_types(cls)
    values: dict[str, Any] = {}
    for key, value in params.items():
        if key not in hints:
            known = ", ".join(hints) or "none"
            raise ValueError(f"{cls.__name__} has no parameter {key!r}; it has {known}, set one of them")
        values[key] = _read_as(hints[key], value, f"{cls.__name__} parameter {key}")
    needed = [f.name for f in _parameters(cls) if f.default is MISSING and f.default_factory is MISSING]
    if missing := ", ".join(name for name in needed if name not in values):
        raise ValueError(f"{cls.__name__} needs {missing}; set it")
    return cls(**values)


def parameter_types(cls: type) -> dict[str, Any]:
    """Return the constructor's parameters and their types."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in _parameters(cls)}


def _parameters(cls: type) -> "list[dataclasses.Field[Any]]":
    return [f for f in dataclasses.fields(typing.cast("Any", cls)) if f.init]


def _read_as(kind: Any, value: object, where: str) -> object:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where} is {value!r}; allowed are {', '.join(map(str, args))}")
        return value
    if not isinstance(value, str):
        return _checked_kind(origin or kind, value, where)
    if origin is tuple:
        return tuple(_read_as(args[0], part.strip(), where) for part in value.split(",") if part.strip())
    if kind is bool:
        return _read_flag(value, where)
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {value!r}; give a value of type {_type_name(kind)}") from None


def _read_flag(value: str, where: str) -> bool:
    if value.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise ValueError(f"{where} is {value!r}; give true or false")
    return value.lower() in ("true", "yes", "1")


def _checked_kind(kind: type, value: object, where: str) -> object:
    if kind is float and type(value) is int:
        return float(value)
    # A bool is an int to Python, but never what a count means.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r}; give a value of type {_type_name(kind)}")
    return value


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) else str(kind)


def describe(name: str) -> dict[str, Any]:
    """Return what `policies --json` says of one policy: summary, flags, parameters with types and defaults."""
    cls = policy_class(name)
    module_doc = importlib.import_module(cls.__module__).__doc__ or cls.__doc__ or ""
    hints = parameter_types(cls)
    parameters = [
        {
            "name": f.name,
            "type": _type_name(hints[f.name]),
            "default": None if f.default is MISSING else f.default,
        }
        for f in _parameters(cls)
    ]
    return {
        "name": name,
        "summary": module_doc.strip().splitlines()[0] if module_doc.strip() else "",
        "foresees": cls.foresees,
        "reads_clock": cls.reads_clock,
        "parameters": parameters,
    }
