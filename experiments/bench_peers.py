"""Peers that cannot be run here, through a bridge: torch's grouped product, timed beside them and beside us.

A peer's time over ours is (peer / torch grouped, recorded) times (torch grouped / ours, measured in this run).
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..runtime.timer import Ratio
from .bench_rows import Point

PEERS = ("vllm", "sglang", "triton_kernels")
RECORDS = Path(__file__).parent / "data" / "peers_h100.json"


@cache
def records() -> tuple[dict[str, Any], dict[tuple[str, str, int], dict[str, float]]]:
    """Return what is said of all records, and µs by layer, skew and tokens."""
    found = json.loads(RECORDS.read_text(encoding="utf-8"))
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    return found, {(row["model"], row["skew"], row["tokens"]): row for row in rows}


def bridged(peers: Sequence[str], point: Point, device: str, grouped_over_ours: Ratio | None) -> list[dict[str, Any]]:
    """Return a row for each peer; the ratio is None where ours or torch's grouped product was not timed."""
    about, by_point = records()
    record = by_point.get((point.model, point.skew, point.tokens)) if point.kind == about["kind"] else None
    if device != about["device"]:
        reason = f"its records are of {about['device']}, not of {device}"
    elif not record:
        reason = "there is no record of this load"
    elif not grouped_over_ours:
        reason = "the bridge needs ours and torch_grouped_graph timed together in this run, for 6 rounds or more"
    else:
        return [_row(name, record, grouped_over_ours) for name in peers]
    return [{"arm": name, "status": "absent", "reason": reason} for name in peers]


def _row(name: str, record: dict[str, float], grouped_over_ours: Ratio) -> dict[str, Any]:
    peer_us, grouped_us = record[f"{name}_us"], record["torch_grouped_us"]
    scale = peer_us / grouped_us
    return {
        "arm": name,
        "status": "bridged",
        "recorded_us": peer_us,
        "recorded_torch_us": grouped_us,
        "over_ours": scale * grouped_over_ours.median,
        "over_ours_low": scale * grouped_over_ours.low,
        "over_ours_high": scale * grouped_over_ours.high,
    }
