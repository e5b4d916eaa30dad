"""A model's MoE layers as it runs them: routed experts by our kernels or by their plain definition, under plans.

Without a policy a layer is one unsliced launch. Nothing stands in silently for anything else: the plain definition runs
where it is asked for by name.

Shape letters: T tokens, E experts, K top-k, N routed rows (T times K), D model, W words of a plan.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.layer import Beside, in_turn, moe_layer
from ..kernels.spec import INTERPRET, LayerLaunch, RouterSpec
from ..kernels.tuned import launch_for
from ..kernels.weights import ExpertWeights
from ..kernels.workspace import Workspace
from ..policies.contract import Plan
from ..traces.schema import MoeSpec, next_power_of_two
from .layers import launch_of, plan_words_LW

if TYPE_CHECKING:
    from .passes import Steering

How = Literal["kernels", "reference"]
INTERPRETED_SMS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerCall:
    """One call of a layer, as `kernels.layer.moe_layer` takes it."""

    x_TD: Tensor
    logits_TE: Tensor
    weights: ExpertWeights
    router: RouterSpec
    bias_E: Tensor | None = None
    weights_TK: Tensor | None = None
    """Take the place of the weights that the router gives."""


class LayerRunner:
    """What the layers of a model share: buffers, and the policy that says how they run."""

    def __init__(self, how: How = "kernels", steering: "Steering | None" = None) -> None:
        """Run layers by kernels, or by their plain definition when asked for.

        Raises:
            ValueError: `how` is neither.
        """
        if how not in get_args(How):
            raise ValueError(f"experts run by {how!r}; allowed are {' and '.join(get_args(How))}")
        self.how, self.steering = how, steering
        self._workspaces: dict[MoeSpec, Workspace] = {}
        self._launches: dict[tuple[object, object], LayerLaunch] = {}
        self._plan_id, self._words_LW = "", torch.empty(0)

    def run(self, layer: int, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Return a layer's output [T, D] and the ids [T, K] that routing chose; the latter only until the next call."""
        plan, beside = (None, in_turn) if self.steering is None else self.steering.enter(layer, len(call.x_TD))
        run = self._kernels if self.how == "kernels" else self._reference
        out_TD, ids_TK, counts_E = run(layer, call, plan, beside)
        if self.steering is not None:
            self.steering.leave(layer, counts_E)
        return out_TD, ids_TK

    def _kernels(self, layer: int, call: LayerCall, plan: Plan | None, beside: Beside) -> tuple[Tensor, Tensor, Tensor]:
        x_TD, spec = call.x_TD, call.weights.spec
        ws = self._workspace(spec, len(x_TD), x_TD.device)
        launch = self._launch(plan, spec, len(x_TD), x_TD.device)
        if plan is not None:
            ws.plan.copy_(self._words(plan, x_TD.device)[layer])
        out_TD = moe_layer(
            x_TD, call.logits_TE, call.weights, call.router, ws, launch,
            bias_E=call.bias_E, weights_TK=call.weights_TK, out_TD=torch.empty_like(x_TD), beside=beside,
        )  # fmt: skip
        return out_TD, ws.ids_TK[: len(x_TD)], ws.counts_E

    def _workspace(self, spec: MoeSpec, num_tokens: int, device: torch.device) -> Workspace:
        """Return buffers for a batch, larger ones where it exceeds those before."""
        if device.type != "cuda" and not INTERPRET.value:
            raise ValueError(
                f"the kernels need a CUDA device and the model is on {device}; move it there, or run the plain "
                "definition of the experts by how='reference'"
            )
        held = self._workspaces.get(spec)
        if held is None or held.max_tokens < num_tokens:
            held = self._workspaces[spec] = Workspace.allocate(spec, next_power_of_two(num_tokens), device)
        return held

    def _launch(self, plan: Plan | None, spec: MoeSpec, num_tokens: int, device: torch.device) -> LayerLaunch:
        key = (spec, num_tokens) if plan is None else (plan.layout, plan.steal)
        if key not in self._launches:
            if plan is None or self.steering is None:
                self._launches[key] = default_launch_on(device, spec, num_tokens)
            else:
                self._launches[key] = launch_of(plan, self.steering.setup)
        return self._launches[key]

    def _words(self, plan: Plan, device: torch.device) -> Tensor:
        if plan.plan_id != self._plan_id:
            assert self.steering is not None
            model = self.steering.setup.model
            self._plan_id = plan.plan_id
            self._words_LW = plan_words_LW(plan, model.num_layers, model.num_experts).to(device)
        return self._words_LW

    def _reference(
        self, layer: int, call: LayerCall, plan: Plan | None, beside: Beside
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_TD, router = call.x_TD, call.router
        ids_TK, weights_TK = reference.route(call.logits_TE, router, bias_E=call.bias_E)
        counts_E = torch.bincount(ids_TK.flatten(), minlength=router.num_experts).int()
        rows_ND = torch.zeros(ids_TK.numel(), x_TD.shape[1], dtype=x_TD.dtype, device=x_TD.device)
        owner_E = np.zeros(router.num_experts)
        if plan is not None:
            owner_E = plan.placement.owner_LE(counts_E.cpu().numpy()[None], layer)[0]
        mine = [np.flatnonzero(owner_E == s).tolist() for s in range(1 if plan is None else plan.layout.num_slices)]
        beside([partial(reference.fill_rows, rows_ND, x_TD, ids_TK, call.weights, experts) for experts in mine])
        if call.weights_TK is not None:
            weights_TK = call.weights_TK.float()
        return reference.combine(rows_ND.unflatten(0, (-1, router.top_k)), weights_TK), ids_TK, counts_E


def refuse_gradients(*tensors: Tensor) -> None:
    """Raise ValueError where autograd would expect gradients of these: the kernels give none."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError("expertslice's experts have no gradients; run the model under torch.no_grad()")


def default_launch_on(device: torch.device, spec: MoeSpec, num_tokens: int) -> LayerLaunch:
    """Return the unsliced launch of a layer on a device: tuned where it is, else modelled."""
    if INTERPRET.value:
        # Programs of the interpreter run one after another: a grid for a real device would only cost time.
        return launch_for(spec, num_tokens, "interpreter", sm_count=INTERPRETED_SMS, capability=(8, 0))
    held = torch.cuda.get_device_properties(device)
    capability = (held.major, held.minor)
    return launch_for(spec, num_tokens, held.name, sm_count=held.multi_processor_count, capability=capability)


def one_layer(spec: MoeSpec) -> MoeSpec:
    """Return the shape of one of a model's layers, the same for models that differ in depth alone."""
    return replace(spec, num_layers=1)
