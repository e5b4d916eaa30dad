"""One self-contained HTML page per run, its answers in the order in which users ask. Draws nothing itself."""

import shlex
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2

from .. import __version__
from .case import Case, Options
from .plotting import Drawn
from .report_tables import tables
from .table import effect_words, headline

PROVISIONAL = (
    "The device's model rests on data sheets and a few measured ceilings and has not been calibrated on hardware: "
    "read the ranking as a reason to measure, not as a measurement."
)


def render(case: Case, summary: dict[str, Any], figures: Sequence[Drawn]) -> str:
    return html(
        "report.html.j2",
        title=f"What would slicing buy? {summary['model']['name']} on {summary['device']['title']}",
        provisional=PROVISIONAL if summary["provisional"] else "",
        headline=headline(summary),
        verdict=verdict(summary),
        tables=tables(summary, case.world.device),
        figures={figure.name: figure for figure in figures},
        why=summary["why"]["sentences"],
        trust=trust(summary),
        next_steps=next_steps(case.options, summary),
        footer=f"expertslice {__version__}, seed {summary['seed']}; manifest.json beside this page holds all else.",
    )


def html(template: str, **shown: Any) -> str:
    """Return a self-contained page: the template's words between the head and the script that all pages share."""
    loader = jinja2.FileSystemLoader(str(files(__package__) / "templates"))
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return page.get_template(template).render(shown)


def verdict(summary: dict[str, Any]) -> str:
    rows = [row for row in summary["ranking"] if row["deployable"]]
    sure = [row for row in rows if row["surely_faster"]]
    first = [row["policy"] for row in rows if row["rank"] == 1]
    answer = "unsliced" if not sure else sure[0]["policy"]
    tied = ", ".join(name for name in first if name != answer)
    also = f" {tied} cannot be told from it." if tied and answer in first else ""
    if not sure:
        return f"Stay unsliced: no policy is faster than the unsliced launch by more than can be told from noise.{also}"
    return f"{answer}: {effect_words(sure[0])} against unsliced (mean step time, 95 % interval).{also}"


def trust(summary: dict[str, Any]) -> list[str]:
    """Return what the intervals cover and what they do not."""

    def width(row: dict[str, Any], kind: str) -> float:
        low, high = row[f"{kind}_interval_percent"]
        return high - low

    s = summary["statistics"]
    widest = max(summary["ranking"], key=lambda row: width(row, "effect"))
    batches = (
        f"{s['compositions']} independent batchings of the same requests" if s["compositions"] else
        "no other batches: the trace holds too few requests or counts alone"
    )  # fmt: skip
    return [
        f"Device model: {summary['device']['status']}. {PROVISIONAL if summary['provisional'] else ''}".strip(),
        f"Workload: moving blocks of {s['block_steps']} step(s), the same for every policy, and {batches}.",
        f"Model error: {s['model_draws']} draws of every figure with a declared error, the same for every policy, on "
        f"{s['sampled_steps']} sampled steps; what all policies share cancels in their differences. Bounds see the "
        "first few draws alone.",
        f"Widest interval: {widest['policy']}, {width(widest, 'workload'):.1f} points from the workload and "
        f"{width(widest, 'model'):.1f} from the model; an interval that lies to one side says that a policy can only "
        "lose where the model is wrong.",
        "Policies decide with a belief that is simpler than the simulator's truth; only bounds, which are not "
        "deployable, see the truth.",
        *summary["notes"],
    ]


def next_steps(options: Options, summary: dict[str, Any]) -> list[tuple[str, str]]:
    best = next((r["policy"] for r in summary["ranking"] if r["deployable"] and r["policy"] != "unsliced"), "unsliced")
    trace = [options.trace] if options.trace else []
    routing = ["--fit-routing", options.fit_routing] if options.fit_routing else []
    model = ["--model", options.model] if options.model else []
    common = [*trace, *routing, *model, "--device", options.device]
    measured = options.trace or options.fit_routing or "bundled"
    fitted = ["--model", "path/to/config.json", "--fit-routing", measured, "--device", options.device]
    steps = {
        "See whether the verdict survives other batches and other draws of the model's error:":
            ["whatif", *common, "--policy", best, "--seed", str(options.seed + 1)],
        "Look at the routing itself, with figures:": ["trace", "info", measured, "--figures", "figures"],
        "Ask the same for a model of your own, its routing fitted to this trace:": ["whatif", *fitted],
        "The same policies on a GPU, beside the simulator:":
            ["pair", measured, "--on", "gpu", "--policy", "unsliced", "--policy", best],
    }  # fmt: skip
    return [(words, shlex.join(["expertslice", *command])) for words, command in steps.items()]
