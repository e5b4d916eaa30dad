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

from ...traces.requests import phases_of
from ...traces.schema import Provenance
from ...traces.store import write_trace
from ...traces.trace import UNKNOWN, RoutingTrace, StepTable, concat

SEGMENTS = ("early", "middle", "final")
"""Training checkpoints, in order."""

NOTES = (
    "Byte-level MoE language model trained for this project on documentation, dictionaries and source code of Debian "
    "and Python packages; routing of held-out text at three checkpoints. Prefill and decode as recorded; decode is "
    "sampled at temperature 0.8. Times are of plain eager PyTorch under a queue that was kept full; steps bound by "
    "the host have null times. No text and no token ids."
)


def segment_of(arrays: dict[str, NDArray[Any]], segment: int, first_request: int, source: Provenance) -> RoutingTrace:
    """Return one checkpoint as a trace; steps follow each other at once, without the recorder's idle time."""
    num_steps, known_S1 = len(arrays["held"]), arrays["held"][:, None]
    step_ns_S = arrays["moe_ns"].sum(axis=1) + arrays["other_ns"].sum(axis=1) + arrays["head_ns"]
    table = StepTable(
        phase_S=phases_of(arrays["phase"], arrays["step"], num_steps),
        segment_S=np.full(num_steps, segment, dtype=np.uint8),
        segments=SEGMENTS,
        start_ns_S=np.concatenate([[0], np.cumsum(step_ns_S)[:-1]]).astype(np.int64),
        moe_ns_SL=np.where(known_S1, arrays["moe_ns"], UNKNOWN),
        other_ns_SL=np.where(known_S1, arrays["other_ns"], UNKNOWN),
    )
    return RoutingTrace(
        num_experts=32,
        provenance=source,
        request_id_T=arrays["request_id"].astype(np.int64) + first_request,
        position_T=arrays["position"].astype(np.int32),
        phase_T=arrays["phase"],
        step_T=arrays["step"].astype(np.int64),
        domain_T=arrays["domain"].astype(np.int16),
        expert_ids_TLK=arrays["expert_ids"],
        step_table=table,
        domains=tuple(map(str, arrays["domain_names"])),
    )


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
    traces, first_request = [], 0
    for segment, name in enumerate(SEGMENTS):
        with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
            traces.append(segment_of(dict(arrays), segment, first_request, provenance))
        first_request = int(traces[-1].request_id_T.max()) + 1
    out.parent.mkdir(parents=True, exist_ok=True)
    write_trace(concat(traces), out)
    shutil.copyfile(folder / "training.json", out.with_suffix(".training.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
