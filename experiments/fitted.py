"""Routing for a model nobody recorded: a generator fitted to a real trace, resized to the model, then batched.

What is kept of the trace: skew of the load, locality in time, what requests have in common, dependence between
layers. What is not known: whether the other model routes alike; every output says so.

Shape letters: L MoE layers, E experts, X experts of the model that routing is made for.
"""

import contextlib
import hashlib
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from .. import __version__
from ..traces.choice import LayerChoice
from ..traces.compose import Composition
from ..traces.fit import fit
from ..traces.models import load_model
from ..traces.requests import group_requests, select_rows
from ..traces.schema import MoeSpec, StepSource
from ..traces.spec import SynthSpec, logits_of_load
from ..traces.synth import synthesise
from ..traces.trace import RoutingTrace
from .inputs import Opened, choose_segment, in_memory, open_source
from .runs import whole
from .workload import rebatched

if TYPE_CHECKING:
    from .case import Chosen, Options

FIT_TOKENS = 12_000
"""Tokens that the generator is fitted to: whole requests, drawn at random, each cut to FIT_LENGTH."""
FIT_LENGTH = 384
MOST_STEPS, LEAST_STEPS, LAYERS = 256, 64, 4096
"""Without --steps: as many as make LAYERS layers in all, within these."""
PREFILL_CHUNK = 256
ROUNDS = 2
"""Requests synthesised per place in the batch."""


def fitted_source(options: "Options") -> "Chosen":
    """Return the trace that was fitted, synthetic batches, what they were made of, the model, and what to say.

    Raises:
        ValueError: no model was named, or a trace was given as well.
    """
    if options.model is None or options.trace is not None:
        raise ValueError(
            "--fit-routing makes routing for the model that --model names and takes the place of a trace; "
            "give --model and no trace"
        )
    model = load_model(options.model)
    opened = choose_segment(open_source(options.fit_routing or ""), options.segment)
    requests = synthesise(resized(fit_like(opened), model), ROUNDS * options.batch_size, options.seed)
    composition = Composition(
        batch_size=options.batch_size,
        prefill_chunk_tokens=PREFILL_CHUNK,
        max_tokens_per_step=PREFILL_CHUNK + options.batch_size,
    )
    notes = (
        f"routing is synthetic: a generator fitted to {opened.name} and resized to {model.num_layers} layers, "
        f"{model.num_experts} experts, top-{model.top_k}; {model.name} itself may route otherwise",
    )
    num_steps = options.steps or min(MOST_STEPS, max(LEAST_STEPS, LAYERS // model.num_layers))
    batches = rebatched(requests, composition, num_steps=num_steps, seed=options.seed)
    return opened, batches, (requests, composition), model, (*opened.notes, *notes)


def fit_like(opened: Opened) -> SynthSpec:
    """Fit the generator to a trace, or take the fit of the same trace from the cache."""
    path = _cache_path(opened)
    if path.is_file():
        return SynthSpec.from_json(path.read_text(encoding="utf-8"))
    trace = in_memory(opened.source)
    source: StepSource = opened.source if trace is None else some_requests(trace)
    with Console(stderr=True).status(f"fitting a generator to {opened.name}: once a trace, up to a minute"):
        spec = fit(source)
    # A cache that cannot be written costs time, nothing else.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            part.write_text(spec.to_json(), encoding="utf-8")
    return spec


def _cache_path(opened: Opened) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # A fit kept by another form of the generator must not be read.
    form = [field.name for kind in (SynthSpec, LayerChoice) for field in fields(kind)]
    key = f"{__version__}/{form}/{opened.sha256}/{opened.segment}/{FIT_TOKENS}/{FIT_LENGTH}"
    return root / "expertslice" / f"fit-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def some_requests(trace: RoutingTrace) -> RoutingTrace:
    """Return a part of a trace small enough to fit in seconds."""
    groups = group_requests(trace)
    rows: list[NDArray[np.int64]] = []
    for r in np.random.default_rng(0).permutation(groups.num_requests):
        rows.append(groups.order_T[groups.offsets_R[r] : groups.offsets_R[r + 1]][:FIT_LENGTH])
        if sum(map(len, rows)) >= FIT_TOKENS:
            break
    return select_rows(trace, np.sort(np.concatenate(rows)))


def resized(spec: SynthSpec, model: MoeSpec) -> SynthSpec:
    """Return the specification for another number of layers, experts and choices.

    Layers are taken evenly. Experts are taken evenly by popularity, so that the load keeps its shape, and placed at
    random, so that layers which come from one layer do not share their hot experts.
    """
    shape = (model.num_layers, model.num_experts, model.top_k)
    if shape == (spec.num_layers, spec.num_experts, spec.top_k):
        return spec
    source_L = np.linspace(0, spec.num_layers - 1, model.num_layers).round().astype(int)
    source_LX = np.stack([_experts(spec, int(s), model.num_experts, new) for new, s in enumerate(source_L)])
    layers = tuple(
        _layer(spec.layers[s], source_LX[new], source_LX[max(new - 1, 0)], spec.top_k, model.top_k)
        for new, s in enumerate(source_L)
    )

    def take(values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Pick [..., L, X] out of [..., L, E]."""
        return values[..., source_L[:, None], source_LX]

    return replace(
        spec,
        top_k=model.top_k,
        layers=layers,
        factor_FLE=take(spec.factor_FLE),
        own_LE=take(spec.own_LE),
        domain_DLE=take(spec.domain_DLE),
        source=f"{spec.source}; resized to {shape}",
    )


def _experts(spec: SynthSpec, layer: int, num_experts: int, new_layer: int) -> NDArray[np.int64]:
    by_popularity = np.argsort(spec.layers[layer].logit_E, kind="stable")
    place_X = (np.arange(num_experts) + 0.5) * spec.num_experts / num_experts
    picked_X = by_popularity[place_X.astype(int)]
    return np.random.default_rng([new_layer, num_experts]).permutation(picked_X)


def _layer(
    layer: LayerChoice, experts_X: NDArray[np.int64], below_X: NDArray[np.int64], old_k: int, new_k: int
) -> LayerChoice:
    by_expert = ("logit_E", "first_E", "profile_BE", "memory_HE", "below_first_EE", "lead_EE", "below_rest_EE")
    picked = {name: getattr(layer, name)[..., experts_X] for name in by_expert}
    for name in ("below_first_EE", "lead_EE", "below_rest_EE"):
        picked[name] = picked[name][below_X]
    picked["below_rest_EE"] *= np.float32(max(1, old_k - 1) / max(1, new_k - 1))
    if old_k != new_k or len(experts_X) != len(layer.logit_E):
        inside_X = 1 - np.exp(-np.exp(picked["logit_E"].astype(np.float64)))
        picked["logit_E"] = logits_of_load(inside_X / inside_X.sum(), new_k)
    return replace(layer, **picked)
