"""Mangles good files of every format and reads them: nothing but one sentence may come of it.

    python tests/traces/fuzz.py --minutes 20 --out findings

A reader runs in a process of its own, bounded in memory and in time. What kills it, hangs it, makes it run something or
raise anything but a `TraceError` is written to `--out`, and belongs into `corpus/` once it is mended.
"""

import argparse
import base64
import io
import json
import multiprocessing as mp
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from expertslice.traces.check import TraceError
from expertslice.traces.importers import FORMATS, import_trace
from expertslice.traces.schema import Provenance
from expertslice.traces.store import open_trace, write_trace
from expertslice.traces.trace import ExpertLoad, RoutingTrace, StepTable

SECONDS, MEMORY_BYTES, MOST_PEAK_BYTES = 10, 6 << 30, 1 << 30
OPTIONS = {"top_k": 2, "num_experts": 4, "prompt_len": 2}
INTERESTING = (b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\x80", b"-1", b"1e999", b"[", b"]", b"{", b'"', b"null", b"NaN")


class HangError(BaseException):
    """Nobody may catch this as an ordinary exception."""


def trace():
    """Return a small trace of tokens."""
    rng = np.random.default_rng(0)
    ids = np.stack([[rng.permutation(4)[:2] for _ in range(3)] for _ in range(12)]).astype(np.uint8)
    step_T, phase_T = np.repeat(np.arange(4), 3), np.repeat([0, 1, 1, 1], 3).astype(np.uint8)
    table = StepTable(
        phase_S=np.array([0, 1, 1, 1], np.uint8),
        segment_S=np.zeros(4, np.uint8),
        start_ns_S=np.arange(4),
        moe_ns_SL=np.ones((4, 3), np.int64),
    )
    return RoutingTrace(
        num_experts=4,
        provenance=Provenance(source="fuzz"),
        request_id_T=np.tile(np.arange(3), 4),
        position_T=step_T.astype(np.int32),
        phase_T=phase_T,
        step_T=step_T,
        domain_T=np.tile([0, 1, -1], 4).astype(np.int16),
        domains=("a", "b"),
        expert_ids_TLK=ids,
        step_table=table,
    )


def write_seeds(folder, save_pt):
    """Write a good file of every format that holds a trace, and of our own; return their paths."""
    ids = trace().expert_ids_TLK.astype(np.int32)
    wide = np.full((3, 12, 8), -1, np.int32)
    wide[:, :, :2] = ids.transpose(1, 0, 2)
    record = {"forward_pass_id": 1, "rank": 0, "gatherer_key": "primary"}
    counts = np.array([[3, 5, 9, 7]] * 3, np.int32)
    tokens = {"input_ids": [1] * 12, "positions": list(range(12)), "extend_seq_lens": [12], "forward_mode": 1}
    passes = {"last_physical_to_logical_map": np.tile(np.arange(4), (3, 1)), "records": []}
    per_token = record | tokens | {"global_physical_count": counts, "topk_ids_of_layer": wide}
    save_pt({**passes, "records": [per_token]}, folder / "per_token.pt")
    two = [record | {"forward_pass_id": number, "global_physical_count": counts} for number in (1, 2)]
    save_pt({**passes, "records": two}, folder / "per_pass.pt")
    save_pt({"rank": 0, "logical_count": np.stack([counts, counts * 2])}, folder / "stat.pt")
    logits = np.random.default_rng(1).standard_normal((3, 12, 4)).astype(np.float32)
    save_pt({"router_logits": tuple(logits)}, folder / "logits.pt")
    np.savez(folder / "logits.npz", router_logits=logits)
    np.save(folder / "arrays.npy", ids)
    np.savez(folder / "arrays.npz", routed_experts=ids, prompt_token_ids=np.arange(2), output_token_ids=np.arange(10))
    np.save(folder / "moe_infinity.npy", np.array([[[3.0, 5, 9, 7]] * 3] * 2, np.float32))
    np.savez(folder / "counts.npz", m__expert_counts__d=np.array([[3, 5, 9, 7]] * 3))
    archive = {"experts": ids, "request_offsets": np.array([0, 6, 12]), "prompt_len": np.array([2, 2])}
    np.savez(folder / "archive.npz", **archive)
    buffer = io.BytesIO()
    np.save(buffer, ids)
    sent = {
        "choices": [{"routed_experts": base64.b64encode(buffer.getvalue()).decode()}],
        "usage": {"prompt_tokens": 4},
    }
    (folder / "responses.json").write_text(json.dumps(sent))
    meta = {"type": "meta", "model_id": "m", "top_k": 2, "num_experts": 4, "layers_logged": [0, 1, 2]}
    routes = [
        {"type": "route", "req_id": "r", "token_idx": t, "layer": layer, "topk_ids": ids[t, layer].tolist()}
        for t in range(12)
        for layer in range(3)
    ]
    (folder / "vllm.jsonl").write_text("\n".join(map(json.dumps, [meta, *routes])))
    head = {"record_type": "metadata", "format": "moe-cache-lab.routing-jsonl", "format_version": 1, "model_id": "m"}
    head |= {"num_experts": 4, "experts_per_token": 2}
    lines = [
        {"record_type": "routing_selection", "phase": "prompt", "token_position": t, "layer": layer,
         "selected_experts": ids[t, layer].tolist(), "token_id": 1}
        for t in range(12)
        for layer in range(3)
    ]  # fmt: skip
    (folder / "cache_lab.jsonl").write_text("\n".join(map(json.dumps, [head, *lines])))
    write_trace(trace(), folder / "ours.parquet")
    load = ExpertLoad(top_k=2, provenance=Provenance(source="fuzz"), counts_SLE=np.array([[[3, 5, 9, 7]] * 3] * 2))
    write_trace(load, folder / "load.parquet")
    return sorted(folder.iterdir())


def mangled(good, rng):
    """Return bytes near those given."""
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if data:
                data[place % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[place % len(data)] = rng.randrange(256)
            case 2:
                del data[min(place, other) : max(place, other)][: rng.randrange(1, 64)]
            case 3:
                data[place:place] = rng.choice(INTERESTING)
            case 4:
                some = data[min(place, other) : max(place, other)][: rng.randrange(1, 256)]
                data[place : place + rng.choice((0, len(some)))] = some
            case 5 if rng.random() < 0.2:
                del data[place:]
    return bytes(data)


def read(path):
    """Read a file as whoever was given it would: as our own, and as every format or one that is told."""
    with path.open("rb") as file:
        ours = file.read(4) == b"PAR1"
    if ours:
        opened = open_trace(path)
        for step in opened.steps():
            step.counts_LE.sum()
        opened.read()
        return
    import_trace(path, **OPTIONS)


def attempt(path, formats=(None,)):
    """Return what is wrong with how a file is read, or None."""

    def hang(*_):
        raise HangError

    for form in formats:
        before = signal.signal(signal.SIGALRM, hang)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            read(path) if form is None else import_trace(path, format=form, **OPTIONS)
        except TraceError as error:
            if "\n" in str(error) or "allocate" in str(error) or "MemoryError" in str(error):
                return f"no good sentence: {error}"
        except HangError:
            return f"took more than {SECONDS} s"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return f"peak memory of {peak >> 20} MiB" if peak > MOST_PEAK_BYTES else None


def work(seeds, folder, seed, until, found):
    """Mangle and read until the time is up; the case at work lies in a file in case this process dies."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.chdir(folder)
    rng, count = random.Random(seed), 0
    known = [name for name, form in FORMATS.items() if not isinstance(form.build, str)]
    while time.monotonic() < until and count < 4000:
        source = rng.choice(seeds)
        case = folder / f"case-{seed}{source.suffix}"
        case.write_bytes(mangled(source.read_bytes(), rng))
        if problem := attempt(case, (None, rng.choice(known)) if source.suffix != ".parquet" else (None,)):
            found.put((source.name, problem, case.read_bytes()))
        count += 1
    found.put((None, str(count), b""))


def one_process(seeds, folder, seed, until, seen):
    """Run a process's worth of cases; return how many, and whether it died."""
    context = mp.get_context("spawn")
    found, total = context.Queue(), 0
    process = context.Process(target=work, args=(seeds, folder / "work", seed, until, found))
    process.start()
    while process.is_alive() or not found.empty():
        if found.empty():
            time.sleep(0.05)
            continue
        name, problem, content = found.get()
        if name is None:
            total += int(problem)
        elif (key := (name, problem[:60])) not in seen:
            seen.add(key)
            (folder / f"{len(seen):03d}-{name}").write_bytes(content)
            sys.stdout.write(f"{len(seen):03d} {name}: {problem}\n")
    if process.exitcode:
        for case in (folder / "work").glob(f"case-{seed}.*"):
            case.rename(folder / f"died-{seed}{case.suffix}")
        sys.stdout.write(f"seed {seed} died with {process.exitcode}\n")
    sys.stdout.flush()
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("findings"))
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import write_by_hand

    folder = args.out.resolve()
    for name in ("seeds", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    seeds, seen = write_seeds(folder / "seeds", write_by_hand), set()
    until, total, seed = time.monotonic() + 60 * args.minutes, 0, args.seed
    while time.monotonic() < until:
        seed += 1
        total += one_process(seeds, folder, seed, until, seen)
    stray = [path.name for path in (folder / "work").iterdir() if not path.name.startswith("case-")]
    sys.stdout.write(f"{total} cases, {len(seen)} findings, stray files {stray}\n")


if __name__ == "__main__":
    main()
