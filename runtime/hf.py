"""Our experts inside Hugging Face models: `set_experts_implementation("expertslice")`, with or without a policy.

Routing stays the model's own; its ids and weights reach our kernels exactly. Families whose experts are SwiGLU without
bias run in place: Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3 and others that store [E, 2F, D] and [E, D, F]. gpt-oss runs
on a copy of its weights in this layout. Others are refused. For inference: there are no gradients.

Shape letters: T tokens, E experts, K top-k, D model, F ffn.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.spec import TORCH_DTYPE, RouterSpec
from ..kernels.weights import ExpertWeights
from ..policies.contract import MECHANISMS, Control, Policy, Setup, StepRecord
from ..policies.data import load_device, load_variants
from ..traces.models import model_from_config
from ..traces.schema import Dtype, MoeSpec
from .experts import How, LayerCall, LayerRunner, one_layer, refuse_gradients
from .passes import HostPasses, Passes, Steering
from .workload import write_logits

NAME = "expertslice"
DTYPES: dict[torch.dtype, Dtype] = {dtype: name for name, dtype in TORCH_DTYPE.items()}  # pyright: ignore
CLAMPED = {"has_bias": True, "is_transposed": True, "is_concatenated": False, "alpha": 1.702, "limit": 7.0}
"""What gpt-oss's experts are."""
PLAIN = dict.fromkeys(("has_bias", "is_transposed", "has_post_expert_norm"), False)
PLAIN |= dict.fromkeys(("has_gate", "is_concatenated"), True)
"""What experts must be, by the marks that transformers gives them."""


@dataclass(slots=True)
class _Place:
    """What a module of experts knows while ours stand in for it."""

    runner: LayerRunner
    layer: int
    spec: MoeSpec


def experts_of(model: nn.Module) -> list[nn.Module]:
    """Return a model's modules of routed experts, in the order of its layers.

    Raises:
        ValueError: it has none, or they lie on several devices.
    """
    found = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts; give a Mixture-of-Experts model")
    devices = sorted({str(parameter.device) for module in found for parameter in module.parameters()})
    if len(devices) > 1:
        raise ValueError(f"{type(model).__name__} has experts on {', '.join(devices)}; load it on one device")
    return found


def spec_of(model: Any) -> MoeSpec:
    """Return the shape of a Hugging Face model's MoE layers, in the dtype that its experts are in.

    Raises:
        ValueError: it is not a Mixture-of-Experts model, or of a dtype that the kernels do not know.
    """
    experts = experts_of(model)
    weight = next(experts[0].parameters())
    if weight.dtype not in DTYPES:
        raise ValueError(f"experts in {weight.dtype}; allowed are {', '.join(str(dtype) for dtype in DTYPES)}")
    config = model.config.to_dict()
    spec = model_from_config(config, name=str(config.get("model_type", "model")), source="its config")
    return replace(spec, num_layers=len(experts), dtype=DTYPES[weight.dtype])


def register() -> None:
    """Let `set_experts_implementation("expertslice")` find our experts.

    Raises:
        ValueError: transformers is missing or too old.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        raise ValueError("Hugging Face models need transformers 5.17 or newer; install expertslice[hf]") from None
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_forward)


def _experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run a module's experts for the routing that its model chose."""
    refuse_gradients(hidden_states, next(module.parameters()))
    place: _Place | None = module.__dict__.get("_expertslice")
    if place is None:
        # The implementation was set by name alone: this layer runs unsliced.
        place = _Place(_unsliced_runner(), 0, _spec_of_layer(module, top_k_index.shape[1]))
    spec = place.spec
    weights = _weights_of(module, spec)
    # Logits with which routing chooses what the model has chosen, slot by slot.
    logits_TE = torch.empty(len(hidden_states), spec.num_experts, dtype=torch.float32, device=hidden_states.device)
    ids_TK = top_k_index.long()
    write_logits(logits_TE[None], ids_TK[None])
    call = LayerCall(
        x_TD=hidden_states.contiguous(),
        logits_TE=logits_TE,
        weights=weights,
        router=RouterSpec(num_experts=spec.num_experts, top_k=spec.top_k),
        weights_TK=top_k_weights,
    )
    out_TD, _ = place.runner.run(place.layer, call)
    return out_TD


@cache
def _unsliced_runner() -> LayerRunner:
    """Return what all layers share that run by name alone."""
    return LayerRunner()


def _spec_of_layer(module: Any, top_k: int) -> MoeSpec:
    _check_kind(module)
    num_experts, d_model, d_ff = module.down_proj.shape
    if _is_clamped(module):
        d_model, d_ff = d_ff, d_model
    dtype = DTYPES[module.down_proj.dtype]
    return MoeSpec(
        name="layer", num_layers=1, num_experts=num_experts, top_k=top_k, d_model=d_model, d_ff=(d_ff,), dtype=dtype
    )


def _weights_of(module: Any, spec: MoeSpec) -> ExpertWeights:
    """Return a module's weights, in place but for gpt-oss's copy in our layout; kept while they do not change."""
    names = ("gate_up_proj", "down_proj", *(("gate_up_proj_bias", "down_proj_bias") if _is_clamped(module) else ()))
    tensors = [getattr(module, name) for name in names]
    # Tensors made for inference alone do not count their changes.
    state = tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
    held = module.__dict__.get("_expertslice_weights")
    if held is None or held[0] != state:
        make = _clamped_weights if _is_clamped(module) else ExpertWeights.stacked
        held = module.__dict__["_expertslice_weights"] = state, make(spec, [tensor.detach() for tensor in tensors])
    return held[1]


def _clamped_weights(spec: MoeSpec, tensors: list[Tensor]) -> ExpertWeights:
    up, down, up_bias, down_bias = tensors
    # Columns of gate and up alternate there.
    rows = [torch.cat([x[..., ::2], x[..., 1::2]], dim=-1) for x in (up, up_bias)]
    weights = [rows[0].transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()]
    return ExpertWeights.stacked(spec, weights, [rows[1].contiguous(), down_bias.contiguous()], clamped=True)


def _is_clamped(module: Any) -> bool:
    return all(getattr(module, name, None) == value for name, value in CLAMPED.items())


def _check_kind(module: Any) -> None:
    """Refuse experts that compute something else than ours."""
    if _is_clamped(module):
        return
    amiss = [name for name, needed in PLAIN.items() if getattr(module, name, needed) != needed]
    if not amiss and type(getattr(module, "act_fn", None)).__name__ not in ("SiLU", "SiLUActivation"):
        amiss = [f"activation {type(getattr(module, 'act_fn', None)).__name__}"]
    if getattr(module, "_is_expert_parallel", False):
        amiss.append("expert parallelism")
    if amiss:
        raise ValueError(
            f"{type(module).__name__} cannot run on expertslice's kernels ({', '.join(amiss)}): they compute SwiGLU "
            "experts without bias, stored [E, 2F, D] and [E, D, F], and gpt-oss's; use another experts implementation"
        )


@contextmanager
def sliced(
    model: Any,
    policy: Policy[Any] | None = None,
    *,
    how: How = "kernels",
    device: str = "h100-sxm5-80gb",
    control: Control | None = None,
    on_record: Callable[[StepRecord], object] = lambda _: None,
) -> Generator[LayerRunner]:
    """Run a Hugging Face model's experts by ours while the context lasts; a policy decides for its forward passes.

    Args:
        model: any model of transformers with SwiGLU experts.
        policy: decides how each pass is sliced; None: every layer is one unsliced launch.
        how: by kernels, or by their plain definition.
        device: what the policy is told; on a GPU it must be the one that is there.
        control: the control plane's timing.
        on_record: is given the record of each pass, in order; the last ones when the context ends.

    Raises:
        ValueError: the model has no experts, or others than ours; the policy cannot run here.
    """
    register()
    spec, experts = spec_of(model), experts_of(model)
    steering = None
    if policy is not None:
        passes = passes_on(next(experts[0].parameters()).device)
        steering = Steering(policy, passes, setup_of(spec, device, control or Control()), on_record=on_record)
    runner, before = LayerRunner(how, steering), model.config._experts_implementation
    try:
        for layer, module in enumerate(experts):
            _check_kind(module)
            module.__dict__["_expertslice"] = _Place(runner, layer, one_layer(spec))
        model.set_experts_implementation(NAME)
        yield runner
    finally:
        model.set_experts_implementation(before)
        for module in experts:
            for name in ("_expertslice", "_expertslice_weights"):
                module.__dict__.pop(name, None)
        if steering is not None:
            steering.close()


def setup_of(spec: MoeSpec, device: str, control: Control) -> Setup:
    """Return what a policy may know of a model that runs by itself on a device."""
    found = load_device(device)
    # A process sees one instance of MIG.
    mechanisms = frozenset(MECHANISMS) - {"mig"}
    variants = load_variants(found.compute_capability)
    return Setup(device=found, model=spec, variants=variants, mechanisms=mechanisms, control=control)


def passes_on(device: torch.device) -> Passes:
    """Return the executor of a model's passes where its experts lie."""
    if device.type != "cuda":
        return HostPasses()
    from .cuda_passes import CudaPasses

    return CudaPasses()
