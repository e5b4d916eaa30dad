"""Tuned launches: one JSON file for each device and layer shape, a launch for each range of tokens.

A file lies at tuned/DEVICE/SHAPE.json and says which triton it was made with. It is read by name alone: a shape without
a file gets a modelled launch, and one line of log says so.

Shape letters: E experts, K top-k.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ..traces.schema import MoeSpec
from .launches import default_launch, rows_per_expert
from .spec import HOPPER, LaunchSpec, LayerLaunch, SliceLaunch

FOLDER = Path(__file__).parent / "tuned"
FLAGS = ("fused", "dependent", "prefetch_bytes", "gathered")
"""Of a launch, beside its tiles."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedRange:
    """The launch of batches of `least_tokens` to `most_tokens`; what it took at the most, by skew of the routing."""

    least_tokens: int
    most_tokens: int
    launch: LayerLaunch
    us: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The ranges of one shape on one device, ascending and without gaps."""

    device: str
    triton: str
    shape: str
    ranges: tuple[TunedRange, ...]

    def launch_for(self, num_tokens: int) -> LayerLaunch:
        """Return the launch of a batch; the last range serves larger ones too."""
        return next((r.launch for r in self.ranges if num_tokens <= r.most_tokens), self.ranges[-1].launch)


def shape_name(spec: MoeSpec) -> str:
    """Return the name of a layer shape: models of equal shape share it."""
    widths = sorted(set(spec.d_ff))
    width = str(widths[0]) if len(widths) == 1 else f"{widths[0]}to{widths[-1]}"
    return f"d{spec.d_model}-f{width}-e{spec.num_experts}-k{spec.top_k}-{spec.kind}-{spec.dtype}"


def path_of(folder: Path, device: str, shape: str) -> Path:
    """Return where the file of a device, named as the driver names it, and a shape lies."""
    return folder / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") / f"{shape}.json"


def load(path: Path) -> Tuned:
    """Read a file.

    Raises:
        ValueError: it is not what `save` writes; a launch in it is not possible.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        ranges = tuple(_range(one) for one in found["ranges"])
        tuned = Tuned(device=found["device"], triton=found["triton"], shape=found["shape"], ranges=ranges)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error!r} in a file of tuned launches; tune the shape again, or delete it") from None
    tokens = [t for one in ranges for t in (one.least_tokens, one.most_tokens)]
    gapless = all(after == before + 1 for before, after in zip(tokens[1::2], tokens[2::2], strict=False))
    if not ranges or tokens != sorted(tokens) or not gapless:
        raise ValueError(f"{path}: its ranges of tokens {tokens} do not follow each other; tune the shape again")
    return tuned


def save(path: Path, tuned: Tuned) -> None:
    """Write a file, complete or not at all."""
    value = {"device": tuned.device, "triton": tuned.triton, "shape": tuned.shape}
    value["ranges"] = [_plain(one) for one in tuned.ranges]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.rename(path)


def _plain(one: TunedRange) -> dict[str, Any]:
    (chosen,) = one.launch.slices
    flags = {name: getattr(one.launch, name) for name in FLAGS}
    tokens = [one.least_tokens, one.most_tokens]
    return {"tokens": tokens, "up": asdict(chosen.up), "down": asdict(chosen.down), **flags, "us": dict(one.us)}


def _range(value: Mapping[str, Any]) -> TunedRange:
    chosen = SliceLaunch(up=LaunchSpec(**value["up"]), down=LaunchSpec(**value["down"]))
    launch = LayerLaunch(slices=(chosen,), **{name: value[name] for name in FLAGS})
    least, most = value["tokens"]
    return TunedRange(least_tokens=least, most_tokens=most, launch=launch, us=value["us"])


@lru_cache
def tuned_for(device: str, shape: str, folder: Path = FOLDER) -> Tuned | None:
    """Return what is known of a shape on a device; None, and a line of log, where nothing is."""
    path = path_of(folder, device, shape)
    if path.exists():
        return load(path)
    log.warning("no tuned launches for %s on %s: modelled ones are used; run `expertslice tune`", shape, device)
    return None


def launch_for(
    spec: MoeSpec,
    num_tokens: int,
    device: str,
    *,
    preset: Literal["tuned", "paper"] = "tuned",
    sm_count: int = 132,
    capability: tuple[int, int] = HOPPER,
    folder: Path = FOLDER,
) -> LayerLaunch:
    """Return the unsliced launch of a layer for batches of about so many tokens on a device.

    The device is as the driver names it, such as NVIDIA H100 80GB HBM3; its SMs and capability are for a launch that is
    modelled, or the paper's (A.1).
    """
    if preset == "paper":
        return paper_launch(spec, num_tokens, sm_count=sm_count)
    tuned = tuned_for(device, shape_name(spec), folder)
    if tuned is None:
        return default_launch(spec, num_tokens, sm_count=sm_count, capability=capability)
    return tuned.launch_for(num_tokens)


def paper_launch(spec: MoeSpec, num_tokens: int, *, sm_count: int) -> LayerLaunch:
    """Return the paper's tiles (A.1): 128 x 128 x 64 for batched experts, 64 x 64 x 32 for few rows of one."""
    _, rows = rows_per_expert(spec, num_tokens)
    m, n, k = (128, 128, 64) if rows > 64 else (64, 64, 32)
    tile = LaunchSpec(block_m=m, block_n=n, block_k=k, num_warps=4, num_stages=3, num_ctas=2 * sm_count)
    return LayerLaunch(slices=(SliceLaunch(up=tile, down=tile),))
