"""`expertslice timeline`: the records of a run folder as one Perfetto trace of native track events.

One process for each file of records, such as a policy on the backend and the same one in the simulator; in it a track
for the host, one for the stream and one for each slice. Open it at ui.perfetto.dev.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..policies.contract import StepRecord
from .records import SCHEMA, read_records
from .runs import whole

SEQUENCE = 1
Span = tuple[str, str, int, int]
"""Track, name, begin and end in ns."""


def write_timeline(folder: Path, out: Path | None = None, *, first: int = 0, steps: int | None = None) -> Path:
    """Write the steps of every records file of a folder into one trace; return its path.

    Raises:
        ValueError: the folder holds no records, none of these steps, or the perfetto package is not installed.
    """
    try:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb
    except ImportError:
        raise ValueError("timeline needs the package perfetto; install expertslice[perfetto]") from None
    import pyarrow.parquet as pq

    files = [path for path in sorted(folder.glob("*.parquet")) if pq.read_schema(path).equals(SCHEMA)]
    if not files:
        raise ValueError(f"{folder} holds no records of steps; give the folder of a run, pair or what-if")
    last, path = None if steps is None else first + steps - 1, out or folder / "timeline.pftrace"
    writer = _Writer(pb)
    # One packet at a time: a file of packets is a trace, so that long runs take no memory.
    with whole(path) as part, part.open("wb") as file:
        for records in files:
            writer.process(file, records.stem, read_records(records, first, last))
    if not writer.num_spans:
        path.unlink()
        raise ValueError(f"{folder} has no steps from {first}; give a smaller --first")
    return path


@dataclass(slots=True)
class _Writer:
    """Writes packets; `pb` is the module of Perfetto's messages."""

    pb: Any
    num_tracks: int = 0
    num_spans: int = 0

    def process(self, file: Any, name: str, records: Iterator[StepRecord]) -> None:
        """Write one file of records as a process of its own."""
        tracks, parent = dict[str, int](), self._track(file, name, None)
        # Tracks must not overlap: a span begins where the one before it on its track ended, at the earliest.
        free_ns: dict[str, int] = {}
        for record in records:
            for track, words, *span_ns in spans(record):
                begin_ns, end_ns = (max(ns, free_ns.get(track, 0)) for ns in span_ns)
                free_ns[track] = end_ns
                if track not in tracks:
                    tracks[track] = self._track(file, track, parent)
                self._event(file, tracks[track], begin_ns, words)
                self._event(file, tracks[track], end_ns, None)
                self.num_spans += 1

    def _track(self, file: Any, name: str, parent: int | None) -> int:
        self.num_tracks += 1
        packet = self.pb.TracePacket(trusted_packet_sequence_id=SEQUENCE)
        packet.track_descriptor.uuid, packet.track_descriptor.name = self.num_tracks, name
        if parent is None:
            packet.track_descriptor.process.pid = self.num_tracks
            packet.track_descriptor.process.process_name = name
        else:
            packet.track_descriptor.parent_uuid = parent
        self._write(file, packet)
        return self.num_tracks

    def _event(self, file: Any, track: int, ns: int, words: str | None) -> None:
        packet = self.pb.TracePacket(timestamp=ns, trusted_packet_sequence_id=SEQUENCE)
        packet.track_event.track_uuid = track
        packet.track_event.type = self.pb.TrackEvent.TYPE_SLICE_END if words is None else (
            self.pb.TrackEvent.TYPE_SLICE_BEGIN
        )  # fmt: skip
        if words is not None:
            packet.track_event.name = words
        self._write(file, packet)

    def _write(self, file: Any, packet: Any) -> None:
        file.write(self.pb.Trace(packet=[packet]).SerializeToString())


def spans(record: StepRecord) -> Iterator[Span]:
    """Yield what one step did on the host, on its stream and on each slice, each track in order of time."""
    stall_ns, capture_ns = record.control_stall_ns, record.capture_ns
    if stall_ns:
        yield "host", "decide and wait", record.submit_ns - capture_ns - stall_ns, record.submit_ns - capture_ns
    if capture_ns:
        yield "host", "capture", record.submit_ns - capture_ns, record.submit_ns
    yield "host", f"submit {record.step}", record.submit_ns, record.submit_ns
    run_ns = record.start_ns + record.reconfigure_ns
    if record.reconfigure_ns:
        yield "stream", "reconfigure", record.start_ns, run_ns
    marked = f" ({record.fallback})" if record.fallback else ""
    yield "stream", f"step {record.step}, plan {record.plan_id[:6]}{marked}", run_ns, record.end_ns
    for layer, (start_S, busy_S) in enumerate(zip(record.start_ns_LS, record.busy_ns_LS, strict=True)):
        for s, (start_ns, busy_ns) in enumerate(zip(start_S.tolist(), busy_S.tolist(), strict=True)):
            if busy_ns > 0:
                yield f"slice {s}", f"layer {layer}", start_ns, start_ns + busy_ns
