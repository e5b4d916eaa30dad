"""From the recorder's arrays to the bundled trace: three checkpoints as three segments of one Parquet file.

Usage: python -m expertslice.experiments.own_model.bundle FOLDER OUT

Shape letters: T tokens, S steps, L MoE layers, K top-k.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...traces.schema import PHASES, Provenance
from ...traces.store import write_trace
from ...traces.trace import UNKNOWN, RoutingTrace, StepTable

SEGMENTS = ("early", "middle", "final")
"""Training checkpoints, in order."""

Arrays = dict[str, NDArray[Any]]

NOTES = (
    "Byte-level MoE language model trained for this project on documentation, dictionaries and source code of Debian "
    "and Python packages; routing of held-out text at three checkpoints. Prefill and decode as recorded; decode is "
    "sampled at temperature 0.8. Times are of plain eager PyTorch under a queue that was kept full; steps bound by "
    "the host have null times. No text and no token ids."
)


def phases_of(arrays: Arrays) -> NDArray[np.uint8]:
    """Return each step's index into `PHASES`: prefill, decode, or mixed where both ran."""
    num_steps = len(arrays["held"])
    decode_S = np.bincount(arrays["step"], weights=arrays["phase"], minlength=num_steps)
    tokens_S = np.bincount(arrays["step"], minlength=num_steps)
    phase_S = np.full(num_steps, PHASES.index("mixed"), dtype=np.uint8)
    phase_S[decode_S == 0] = PHASES.index("prefill")
    phase_S[decode_S == tokens_S] = PHASES.index("decode")
    return phase_S


def starts_of(arrays: Arrays) -> NDArray[np.int64]:
    """Return each step's start as the sum of the steps before it: the recorder left idle time between them."""
    step_ns_S = arrays["moe_ns"].sum(axis=1) + arrays["other_ns"].sum(axis=1) + arrays["head_ns"]
    return np.concatenate([[0], np.cumsum(step_ns_S)[:-1]]).astype(np.int64)


def joined(parts: list[Arrays], provenance: Provenance) -> RoutingTrace:
    """Return one trace whose segments are the checkpoints; request ids are made unique over them."""
    columns: dict[str, list[NDArray[Any]]] = {}
    first_step = first_request = 0
    for segment, arrays in enumerate(parts):
        num_steps = len(arrays["held"])
        unknown_S1 = ~arrays["held"][:, None]
        rows = {
            "request_id_T": arrays["request_id"].astype(np.int64) + first_request,
            "position_T": arrays["position"].astype(np.int32),
            "phase_T": arrays["phase"],
            "step_T": arrays["step"].astype(np.int64) + first_step,
            "domain_T": arrays["domain"].astype(np.int16),
            "expert_ids_TLK": arrays["expert_ids"],
            "phase_S": phases_of(arrays),
            "segment_S": np.full(num_steps, segment, dtype=np.uint8),
            "start_ns_S": starts_of(arrays),
            "moe_ns_SL": np.where(unknown_S1, UNKNOWN, arrays["moe_ns"]),
            "other_ns_SL": np.where(unknown_S1, UNKNOWN, arrays["other_ns"]),
        }
        for name, values in rows.items():
            columns.setdefault(name, []).append(values)
        first_step += num_steps
        first_request += int(arrays["request_id"].max()) + 1
    whole = {name: np.concatenate(values) for name, values in columns.items()}
    table = StepTable(segments=SEGMENTS, **{n: whole.pop(n) for n in list(whole) if n.endswith(("_S", "_SL"))})
    domains = tuple(str(name) for name in parts[0]["domain_names"])
    return RoutingTrace(num_experts=32, provenance=provenance, step_table=table, domains=domains, **whole)


def main(folder: Path, out: Path) -> None:
    """Write the trace, and beside it the training's facts as its manifest."""
    training = json.loads((folder / "training.json").read_text())
    facts = training["facts"]
    provenance = Provenance(
        source=f"recorded by {training['command']} at commit {training['commit']}",
        model="ours-moe-32e4k",
        device=facts["device"],
        driver=facts["driver"],
        versions={name: facts[name] for name in ("python", "torch", "numpy", "cuda")},
        seed=training["train"]["seed"],
        notes=NOTES,
    )
    parts = [dict(np.load(folder / f"{segment}.npz", allow_pickle=False)) for segment in SEGMENTS]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_trace(joined(parts, provenance), out)
    shutil.copyfile(folder / "training.json", out.with_suffix(".training.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
