"""Device models on disk: a truth, a belief, where they were measured and how far off they are, under a checksum."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..policies.contract import DeviceSpec
from ..policies.data import load_device
from ..policies.residual import NAMES, Residual
from ..policies.tiles import TileConstants
from ..sim.calibrate import CEILINGS, Measured, believed, check_enough, fit_belief, fit_truth, halves, judge
from .runs import to_json, whole

FORMAT = "expertslice.device-model/2"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceModel:
    """What calibration leaves; a value."""

    device: str
    """Of the facts in policies/devices."""
    machine: Mapping[str, Any]
    """Device and driver as they name themselves, and versions of torch and triton."""
    truth: Residual
    belief: tuple[float, ...]
    """Factors of `sim.calibrate.CEILINGS`."""
    held_out: Mapping[str, float]
    """Errors on loads that the truth was not fitted to."""
    about: Mapping[str, Any]

    @property
    def spec(self) -> DeviceSpec:
        """Return the facts that the truth corrects."""
        return load_device(self.device)

    @property
    def believed(self) -> DeviceSpec:
        """Return the device that a policy believes in."""
        return believed(self.spec, self.belief)

    def check_device(self, name: str) -> None:
        """Raise ValueError where another device's facts are asked for."""
        if name != self.device:
            raise ValueError(
                f"the device model is of {self.device} and {name} is asked for; give --device {self.device}"
            )

    def check_machine(self, machine: Mapping[str, Any]) -> None:
        """Raise ValueError where a machine is not the one that was measured, in device, driver or versions."""
        for what, was in self.machine.items():
            if machine.get(what) != was:
                raise ValueError(
                    f"the device model was measured with {what} {was!r} and this machine has {machine.get(what)!r}; "
                    "profile this machine and calibrate again"
                )


def calibrate(
    rows: list[Measured], *, device: str, machine: Mapping[str, Any], held_out: list[Measured], seed: int, about: Any
) -> DeviceModel:
    """Return the model of some measurements: half of the loads give the truth, the others the belief.

    Without `held_out` measurements the belief's half judges the truth.

    Raises:
        ValueError: too little was measured.
    """
    check_enough(rows)
    facts, (for_truth, for_belief) = load_device(device), halves(rows, seed)
    truth, judged = fit_truth(for_truth, facts), held_out or for_belief
    by = "held-out loads of the profile" if held_out else "the loads that the belief was fitted to"
    return DeviceModel(
        device=device,
        machine=machine,
        truth=truth,
        belief=fit_belief(for_belief, facts),
        held_out=judge(judged, truth, facts),
        about={
            "points": len(for_truth),
            "loads": len({r.cell for r in for_truth}),
            "judged": by,
            "seed": seed,
            **about,
        },
    )


def save(path: Path, model: DeviceModel) -> None:
    """Write a model, complete or not at all."""
    value = {"format": FORMAT, "features": NAMES, "ceilings": CEILINGS, **asdict(model)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        part.write_text(to_json({**value, "checksum": _checksum(value)}, indent=None) + "\n", encoding="utf-8")


def load(path: Path) -> DeviceModel:
    """Read a model.

    Raises:
        ValueError: it is none, was changed by hand, or is of another version of the package.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        claimed = value.pop("checksum")
        known = value["format"] == FORMAT and tuple(value["features"]) == NAMES
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{path} is no device model; give a file that `expertslice calibrate` wrote") from None
    if not known:
        raise ValueError(f"{path} is a device model of another version of this package; calibrate again")
    if claimed != _checksum(value):
        raise ValueError(f"{path} does not match its checksum: it was changed; calibrate again rather than edit it")
    truth = {f.name: _tupled(value["truth"][f.name]) for f in fields(Residual)}
    truth["constants"] = TileConstants(**{name: _tupled(v) for name, v in value["truth"]["constants"].items()})
    kept = {f.name: _tupled(value[f.name]) for f in fields(DeviceModel) if f.name != "truth"}
    return DeviceModel(**kept, truth=Residual(**truth))


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _checksum(value: Mapping[str, Any]) -> str:
    plain = json.loads(to_json(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
