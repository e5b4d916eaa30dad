"""What the paper claims, beside what committed rows say: values with intervals, and a verdict by each claim's own rule.

Claims are data (`data/claims.toml`). Rows of one source, a device's folder of `expertslice reproduce` or the committed
runs of `expertslice bench`, are never mixed with those of another: a ratio takes both its arms from one.
"""

import itertools
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.parquet as pq

from .bench_contenders import EAGER_GROUPED, GROUPED
from .bench_peers import PEERS

H100 = "NVIDIA H100 80GB HBM3"
UNSLICED = (GROUPED, EAGER_GROUPED, "torch_grouped_compiled", "hf_grouped_mm", "hf_batched_mm")
"""Peers that run here; those on record are known by their times over ours alone."""
NOT_YET = "not measured yet"
VERSUS = ("ratio", "saving")
ENDS = ("", "_low", "_high")
WITHIN = 0.1
"""What `about` allows."""
Row = dict[str, Any]
Case = tuple[str, str, str, str, int]
"""Model, kind, dtype, skew, tokens."""
Verdict = Literal["holds", "partly", "no"]


class Found(NamedTuple):
    """A value with its interval: of 95 % where arms were paired, else what the 20 and 80 % quantiles allow."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim; `data/claims.toml` says what each field means."""

    id: str
    where: str
    target: str
    says: str
    claimed: float | Sequence[float]
    unit: str
    probe: str
    form: Literal["value", "rate", "ratio", "saving", "contrast"]
    arm: str | Sequence[str]
    over: str
    column: str
    scale: float
    rule: Literal["at_least", "at_most", "about"]
    kind: str
    models: Sequence[str]
    dtypes: Sequence[str]
    tokens: Sequence[int]
    skew: str
    device: str
    simulated: str | Sequence[str] | None = None
    simulated_over: str | None = None
    limit: str | None = None
    better: Mapping[str, Any] = field(default_factory=dict[str, Any])
    worse: Mapping[str, Any] = field(default_factory=dict[str, Any])
    cannot: str | None = None

    @property
    def cases(self) -> list[Case]:
        """Return the cases that it is judged in."""
        return [
            (model, self.kind, dtype, self.skew, tokens)
            for model, dtype, tokens in itertools.product(self.models, self.dtypes, self.tokens)
        ]

    def claimed_in(self, case: Case) -> float:
        """Return what is claimed in a case; `cases` alone are claimed of."""
        return self.claimed if isinstance(self.claimed, (int, float)) else self.claimed[self.tokens.index(case[4])]


def load_claims(path: Path | None = None) -> list[Claim]:
    """Return all claims; ValueError where one is not what this module knows."""
    text = (path or Path(__file__).parent / "data" / "claims.toml").read_text(encoding="utf-8")
    found, claims = tomllib.loads(text), list[Claim]()
    for group in found["group"]:
        shared = {**found["defaults"], **{name: value for name, value in group.items() if name != "claims"}}
        for one in group["claims"]:
            try:
                claims.append(Claim(**shared | one))
            except TypeError as error:
                raise ValueError(f"claim {one.get('id', one)!r}: {error}; see the head of claims.toml") from None
    return claims


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rows of one folder, by probe, case and arm."""

    name: str
    device: str
    rows: Mapping[tuple[str, Case], Mapping[str, Row]]
    about: Mapping[str, Any]


def sources(results: Path) -> list[Source]:
    """Return what lies in a folder of results: of `reproduce`, then committed runs of `bench`."""
    found = [_source(path.parent, "commit") for path in sorted((results / "paper").glob("*/rows.parquet"))]
    return found + [_source(results / "speed" / name, "bench") for name in ("arms", "layers", "energy")]


def _source(folder: Path, kind: str) -> Source:
    about = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    rows: dict[tuple[str, Case], dict[str, Row]] = {}
    for row in pq.read_table(folder / "rows.parquet").to_pylist():
        probe = row["probe"] if kind == "commit" else "arms" if row["regime"] == "burst" else "load"
        case = (row["model"], row["kind"], row.get("dtype") or "bf16", row["skew"], row["tokens"])
        rows.setdefault((probe, case), {})[row["arm"]] = row
    return Source(name=f"{folder.parent.name}/{folder.name}", device=about["device"], rows=rows, about=about)


def found_of(claim: Claim, case: Case, held: Iterable[Source]) -> Found | None:
    """Return what the first source that can says of a claim in a case; None: it is not measured yet."""
    for source in held:
        if source.device == claim.device and (arms := source.rows.get((claim.probe, case))):
            names = [claim.arm] if isinstance(claim.arm, str) else claim.arm
            values = [one for name in names if (one := _value(claim, name, case, arms))]
            if len(values) == len(names) or (values and claim.form == "ratio"):
                # The best of several ways, but the worst of what must all be right.
                return max(values) if claim.form == "ratio" else min(values)
    return None


def _value(claim: Claim, arm: str, case: Case, arms: Mapping[str, Row]) -> Found | None:
    own = _plain(arms.get(arm, {}), claim.column)
    if own is None:
        return None
    if claim.form == "value":
        return Found(*(one * claim.scale for one in own))
    if claim.form == "rate":
        return Found(*(case[4] / us * 1e6 for us in (own.value, own.high, own.low)))
    row = arms.get(claim.over, {})
    above = _plain(row, claim.column)
    if above is None:
        return None
    ratio = _divided(above, own)
    if (arm, claim.column) == ("ours", "us_q50") and row.get("over_ours_low"):
        ratio = Found(*(row[f"over_ours{end}"] for end in ENDS))
    return ratio if claim.form == "ratio" else Found(*(100 * (1 - 1 / one) for one in ratio))


def _plain(row: Row, column: str) -> Found | None:
    """Return a column of a row with its quantiles where it has them."""
    value = row.get(column)
    if value is None or row.get("status") != "ok":
        return None
    low, high = (row.get(column.replace("q50", q)) if "q50" in column else value for q in ("q20", "q80"))
    return Found(float(value), float(value if low is None else low), float(value if high is None else high))


def _divided(above: Found, below: Found) -> Found:
    return Found(above.value / below.value, above.low / below.high, above.high / below.low)


def contrast_of(claim: Claim, held: Sequence[Source]) -> Found | None:
    """Return the geometric mean of ratios in the better cases by that in the worse ones."""
    sides = []
    for part in (claim.better, claim.worse):
        side = replace(claim, form="ratio", **part)
        found = [found_of(side, case, held) for case in side.cases]
        if not found or None in found:
            return None
        logs = [tuple(map(math.log, one)) for one in found if one]
        sides.append(Found(*(math.exp(sum(one) / len(logs)) for one in zip(*logs, strict=True))))
    return _divided(*sides)


def peer_of(claim: Claim, case: Case, held: Sequence[Source]) -> tuple[str, Found] | None:
    """Return the claim's figure against the best unsliced peer: ratios and savings over it, else the peer's own."""
    # Said once of a case: where ours is set beside the sequential loop, or stands by itself.
    if claim.arm != "ours" or claim.over != "sequential" or claim.unit == "same":
        return None
    for source in held:
        arms = source.rows.get((claim.probe, case), {}) if source.device == claim.device else {}
        found = {
            name: one for name in UNSLICED
            if (one := _value(replace(claim, over=name), "ours" if claim.form in VERSUS else name, case, arms))
        }  # fmt: skip
        if claim.form == "ratio" and claim.column == "us_q50":
            rows = {name: arms[name] for name in PEERS if arms.get(name, {}).get("over_ours")}
            found |= {name: Found(*(row[f"over_ours{end}"] for end in ENDS)) for name, row in rows.items()}
        if found:
            best = (max if claim.form == "rate" else min)(found, key=lambda name: found[name].value)
            return best, found[best]
    return None


def simulated_of(claim: Claim, case: Case, held: Sequence[Source]) -> Found | None:
    """Return what the simulator says of it in a case."""
    if claim.simulated is None:
        return None
    asked = replace(
        claim, probe="simulated", device="simulated", arm=claim.simulated,
        over=claim.simulated_over or "",
    )  # fmt: skip
    return found_of(asked, case, held)


def limit_of(claim: Claim, case: Case, held: Sequence[Source]) -> Found | None:
    """Return the most that physics allows: the least bytes in the time of one node of a graph, percent of the peak."""
    if claim.limit is None or not isinstance(claim.arm, str):
        return None
    return found_of(replace(claim, column=claim.limit, form="value"), case, held)


def verdict_of(rule: str, claimed: float, found: Found) -> Verdict:
    """Return whether a claim holds in a case: partly where its interval lies on both sides."""
    if rule == "about":
        return "holds" if abs(found.value / claimed - 1) <= WITHIN else "no"
    low, high = found.low / claimed, found.high / claimed
    if rule == "at_most":
        low, high = 2 - high, 2 - low
    return "holds" if low >= 1 else "partly" if high >= 1 else "no"


def overall(claim: Claim, found: Sequence[Found | None]) -> str:
    """Return the verdict over all cases, in words."""
    claimed = [claim.claimed_in(case) for case in claim.cases] if len(found) > 1 else [claim.claimed_in(claim.cases[0])]
    known = [verdict_of(claim.rule, one, value) for one, value in zip(claimed, found, strict=True) if value]
    if claim.cannot:
        return f"cannot be tested here: {claim.cannot}"
    if not known:
        return NOT_YET
    held = known.count("holds")
    word = "holds" if held == len(known) else "does not hold" if set(known) == {"no"} else "holds partly"
    count = f", in {held} of {len(known)}" if word == "holds partly" else ""
    count += f", {known.count('partly')} within noise" if "partly" in known else ""
    missing = f"; {len(found) - len(known)} of {len(found)} without a value" if len(known) < len(found) else ""
    return f"{word}{count}{missing}"


def judged(claim: Claim, held: Sequence[Source]) -> Row:
    """Return a claim with everything beside it."""
    if claim.form == "contrast":
        found = contrast_of(claim, held)
        return _row(claim, [("all", found or NOT_YET)], overall(claim, [found]))
    cases = claim.cases
    values = [found_of(claim, case, held) for case in cases]
    measured = [
        (label(claim, case), one or lacking(claim, case, held)) for case, one in zip(cases, values, strict=True)
    ]
    row = _row(claim, measured, overall(claim, values))
    for case in cases:
        text = label(claim, case)
        if simulated := simulated_of(claim, case, held):
            row["simulated"].append((text, simulated))
        if peer := peer_of(claim, case, held):
            row["peers"].append((f"{text} {peer[0]}", peer[1]))
        if limit := limit_of(claim, case, held):
            row["limits"].append((text, limit))
    return row


def _row(claim: Claim, measured: list[tuple[str, Found | str]], verdict: str) -> Row:
    return {"claim": claim, "measured": measured, "verdict": verdict, "simulated": [], "peers": [], "limits": []}


def lacking(claim: Claim, case: Case, held: Iterable[Source]) -> str:
    """Return why there is no value in a case: nobody measured it, or an arm failed, or the device does not say."""
    names = {claim.over, *([claim.arm] if isinstance(claim.arm, str) else claim.arm)}
    for source in held:
        arms = source.rows.get((claim.probe, case), {}) if source.device == claim.device else {}
        for name in names & {*arms}:
            row = arms[name]
            if row["status"] != "ok":
                return f"{name} {row['status']}: {row.get('reason')}"
            if source.name.startswith("paper/") and row.get(claim.column) is None:
                return row.get("busy_reason") or row.get("energy_reason") or "the device does not say"
    return NOT_YET


def label(claim: Claim, case: Case) -> str:
    """Return what tells a case from the claim's others."""
    model, _, dtype, _, tokens = case
    return f"{model} {dtype}" + (f" {tokens}" if len(claim.tokens) > 1 else "")


def interactions(held: Sequence[Source], factors: Mapping[str, Sequence[str]]) -> list[Row]:
    """Return, for each case and pair of factors' levels, by how much their joint gain differs from the product of both.

    The geometric mean over all settings of the other factors in which all four cells were measured: above 1 they help
    each other, below 1 one takes from the other.
    """
    levels = [(f, level) for f, of in enumerate(factors.values()) for level in of[1:]]
    pairs = [(one, two) for one, two in itertools.combinations(levels, 2) if one[0] != two[0]]
    names, rows = list(factors), list[Row]()
    for source in held:
        for (probe, case), arms in source.rows.items():
            times = {name: found.value for name, row in arms.items() if (found := _plain(row, "us_q50"))}
            for one, two in pairs if probe == "factorial" else ():
                if logs := _joint(times, list(factors.values()), one, two):
                    first, second = (f"{names[f]}: {level}" for f, level in (one, two))
                    ratio = math.exp(sum(logs) / len(logs))
                    rows.append({"case": case, "first": first, "second": second, "settings": len(logs), "ratio": ratio})
    return rows


def _joint(
    times: Mapping[str, float], levels: Sequence[Sequence[str]], one: tuple[int, str], two: tuple[int, str]
) -> list[float]:
    """Return logarithms of joint gains by products of single ones."""
    found: list[float] = []
    for cell in itertools.product(*levels):
        if all(cell[f] == levels[f][0] for f, _ in (one, two)):
            cells = [
                "/".join((dict(enumerate(cell)) | dict(changed)).values())
                for changed in ((), (one,), (two,), (one, two))
            ]
            if all(name in times for name in cells):
                plain, first, second, both = (math.log(times[name]) for name in cells)
                found.append(first + second - plain - both)
    return found
