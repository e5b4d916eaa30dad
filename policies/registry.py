"""The table of policies that the command line offers by name. Code passes objects, not names."""

import contextlib
import dataclasses
import importlib
import json
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from importlib.metadata import entry_points
from typing import Any

from ..traces.schema import nearest
from .contract import Policy
from .dynamic import Dynamic
from .energy import Energy
from .hot_cold import HotCold
from .mig_layout import MigLayout
from .mixed import Mixed
from .oracle import Oracle
from .planner import Planner
from .predictive import Predictive
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
"""Compared where none is named."""
ON_REQUEST: dict[str, type[Policy[Any]]] = {
    "predictive": Predictive,
    "planner": Planner,
    "energy": Energy,
    "mig_layout": MigLayout,
    "mixed": Mixed,
}
"""Compared where they are named."""


def policy_names() -> tuple[str, ...]:
    """Return the names that `make_policy` knows: ours, then those that installed packages add."""
    ours = (*POLICIES, *ON_REQUEST)
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
    if name in (ours := POLICIES | ON_REQUEST):
        return ours[name]
    points = [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name]
    if not points and ":" not in name:
        raise ValueError(nearest("policy", name, policy_names()) + ", or give module:Class")
    module_name, _, attribute = (points[0].value if points else name).partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        # Importing runs whatever the module holds.
        raise ValueError(
            f"policy {name!r} cannot be imported ({error}); give module:Class of an installed class"
        ) from error
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
    known = _parameters(cls)
    for key in params:
        if key not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f"{cls.__name__} has no parameter {key!r}; it has {names}, set one of them")
    needed = [name for name, (_, default) in known.items() if default is MISSING and name not in params]
    if needed:
        raise ValueError(f"{cls.__name__} needs {', '.join(needed)}; set it")
    return cls(**{k: _read_as(known[k][0], v, f"{cls.__name__} parameter {k}") for k, v in params.items()})


def _parameters(cls: type) -> dict[str, tuple[Any, Any]]:
    """Return (type, default) of the constructor's parameters; `MISSING` for none."""
    hints = typing.get_type_hints(cls)
    found: list[dataclasses.Field[Any]] = [f for f in dataclasses.fields(typing.cast("Any", cls)) if f.init]
    return {f.name: (hints[f.name], f.default if f.default_factory is MISSING else f.default_factory()) for f in found}


def _read_as(kind: Any, value: object, where: str) -> object:
    """Return a value as a parameter's type, a text being read as it; a bool is no number, an int may be a float."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where} is {value!r}; allowed are {', '.join(map(str, args))}")
        return value
    if isinstance(value, str) and kind is not str:
        if origin is tuple:
            return tuple(_read_as(args[0], part.strip(), where) for part in value.split(",") if part.strip())
        with contextlib.suppress(ValueError):
            return _read_as(kind, json.loads(value.lower()), where)
    elif kind is float and type(value) is int:
        return float(value)
    elif isinstance(value, origin or kind) and not (kind is int and isinstance(value, bool)):
        return value
    wanted = "true or false" if kind is bool else f"a value of type {_type_name(kind)}"
    raise ValueError(f"{where} is {value!r}; give {wanted}")


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) else str(kind)


def describe(name: str) -> dict[str, Any]:
    """Return what `policies --json` says of one policy: summary, flags, parameters with types and defaults."""
    cls = policy_class(name)
    module_doc = importlib.import_module(cls.__module__).__doc__ or cls.__doc__ or ""
    parameters = [
        {"name": key, "type": _type_name(kind), "default": None if default is MISSING else default}
        for key, (kind, default) in _parameters(cls).items()
    ]
    return {
        "name": name,
        "summary": module_doc.strip().splitlines()[0] if module_doc.strip() else "",
        "foresees": cls.foresees,
        "reads_clock": cls.reads_clock,
        "parameters": parameters,
    }
