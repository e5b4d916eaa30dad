"""Routing for a model nobody recorded: a generator fitted to a real trace, resized to the model, then batched.

What is kept of the trace: skew of the load, locality in time, what requests have in common, dependence between
layers. What is not known: whether the other model routes alike; every output says so.

Shape letters: L MoE layers, E experts, X experts of the model that routing is made for.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..traces.choice import LayerChoice
from ..traces.compose import Composition
from ..traces.requests import group_requests, select_rows
from ..traces.schema import MoeSpec, StepSource
from ..traces.spec import SynthSpec, logits_of_load
from ..traces.trace import RoutingTrace
from .inputs import Opened, choose_segment, in_memory, open_source
from .workload import FixedSteps, rebatched

if TYPE_CHECKING:
    from .case import Options

FIT_TOKENS = 12_000
"""Tokens that the generator is fitted to: whole requests, drawn at random, each cut to FIT_LENGTH."""
FIT_LENGTH = 384
MOST_STEPS, LEAST_STEPS, LAYERS = 256, 64, 4096
"""Without --steps: as many as make LAYERS layers in all, within these."""
PREFILL_CHUNK = 256
ROUNDS = 2
"""Requests synthesised per place in the batch."""


Fitted = tuple[Opened, FixedSteps, tuple[RoutingTrace, Composition], MoeSpec, tuple[str, ...]]


def fitted_source(options: "Options") -> Fitted:
    """Return the trace that was fitted, synthetic batches, what they were made of, the model, and what to say.

    Raises:
        ValueError: no model was named, or a trace was given as well.
    """
    from ..traces.models import load_model
    from ..traces.synth import synthesise

    if options.model is None or options.trace is not None:
        raise ValueError(
            "--fit-routing makes routing for the model that --model names and takes the place of a trace; "
            "give --model and no trace"
        )
    model = load_model(options.model)
    opened = choose_segment(open_source(options.fit_routing or ""), options.segment)
    spec = resized(_fit(opened), model)
    requests = synthesise(spec, ROUNDS * options.batch_size, options.seed)
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


def fit_like(given: str, segment: str | None) -> SynthSpec:
    """Return a generator fitted to the trace of that name."""
    return _fit(choose_segment(open_source(given), segment))


def _fit(opened: Opened) -> SynthSpec:
    """Fit the generator, or take the fit of the same trace from the cache."""
    from rich.console import Console

    path = _cache_path(opened)
    if path.is_file():
        return SynthSpec.from_json(path.read_text(encoding="utf-8"))
    trace = in_memory(opened.source)
    source: StepSource = opened.source if trace is None else some_requests(trace)
    with Console(stderr=True).status(f"fitting a generator to {opened.name}: once a trace, up to a minute"):
        spec = _fit_of(source)
    _remember(path, spec.to_json())
    return spec


def _fit_of(source: StepSource) -> SynthSpec:
    from ..traces.fit import fit

    return fit(source)


def _cache_path(opened: Opened) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # A fit kept by another form of the generator must not be read.
    form = [field.name for kind in (SynthSpec, LayerChoice) for field in fields(kind)]
    key = f"{__version__}/{form}/{opened.sha256}/{opened.segment}/{FIT_TOKENS}/{FIT_LENGTH}"
    return root / "expertslice" / f"fit-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _remember(path: Path, text: str) -> None:
    """Keep a fit; a cache that cannot be written costs time, nothing else."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.rename(path)
    except OSError:
        return


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
        return np.take_along_axis(values[..., source_L, :], _leading(source_LX, values.ndim), axis=-1)

    return replace(
        spec,
        top_k=model.top_k,
        layers=layers,
        factor_FLE=take(spec.factor_FLE),
        own_LE=take(spec.own_LE),
        domain_DLE=take(spec.domain_DLE),
        source=f"{spec.source}; resized to {shape}",
    )


def _leading(index_LX: NDArray[np.int64], ndim: int) -> NDArray[np.int64]:
    return index_LX.reshape((1,) * (ndim - 2) + index_LX.shape)


def _experts(spec: SynthSpec, layer: int, num_experts: int, new_layer: int) -> NDArray[np.int64]:
    """Return the source expert of each new expert of a layer."""
    by_popularity = np.argsort(spec.layers[layer].logit_E, kind="stable")
    place_X = (np.arange(num_experts) + 0.5) * spec.num_experts / num_experts
    picked_X = by_popularity[place_X.astype(int)]
    return np.random.default_rng([new_layer, num_experts]).permutation(picked_X)


def _layer(
    layer: LayerChoice, experts_X: NDArray[np.int64], below_X: NDArray[np.int64], old_k: int, new_k: int
) -> LayerChoice:
    pick: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda values: values[..., experts_X]  # noqa: E731
    logit_X = pick(layer.logit_E)
    if old_k != new_k or len(experts_X) != len(layer.logit_E):
        inside_X = 1 - np.exp(-np.exp(logit_X.astype(np.float64)))
        logit_X = logits_of_load(inside_X / inside_X.sum(), new_k)
    return replace(
        layer,
        logit_E=logit_X,
        first_E=pick(layer.first_E),
        profile_BE=pick(layer.profile_BE),
        memory_HE=pick(layer.memory_HE),
        below_first_EE=pick(layer.below_first_EE)[below_X],
        lead_EE=pick(layer.lead_EE)[below_X],
        below_rest_EE=pick(layer.below_rest_EE)[below_X] * np.float32(max(1, old_k - 1) / max(1, new_k - 1)),
    )
