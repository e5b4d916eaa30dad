"""An MoE layer as a module of PyTorch: a router and its experts, for inference.

Shape letters: T tokens, E experts, K top-k, D model.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..kernels.spec import TORCH_DTYPE, RouterSpec
from ..kernels.weights import EPILOGUES, ExpertWeights
from ..traces.schema import MoeSpec
from .experts import How, LayerCall, LayerRunner, one_layer, refuse_gradients

if TYPE_CHECKING:
    from collections.abc import Callable


class MoeLayer(nn.Module):
    """Router and routed experts of one layer; [..., D] in and out.

    Layers of a model that share a `runner` share its buffers and its policy; `layer` is their place in the model. The
    router works in float32. There are no gradients: train with another module and load its weights here.
    """

    def __init__(
        self,
        spec: MoeSpec,
        *,
        router: RouterSpec | None = None,
        layer: int = 0,
        runner: LayerRunner | None = None,
        how: How = "kernels",
        choosing_bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        """Make a layer with normal weights scaled by one over the square root of what they sum.

        The router is the model's unless given, and the runner one of its own, which runs by `how`. With
        `choosing_bias` the router adds a bias to its sigmoid scores for choosing only.

        Raises:
            ValueError: the experts differ in width.
        """
        super().__init__()
        if len(set(spec.d_ff)) > 1:
            raise ValueError(
                f"model {spec.name!r}: a MoeLayer has experts of one width; call `kernels.layer` for others"
            )
        self.spec, self.router, self.layer = one_layer(spec), router or RouterSpec.of(spec), layer
        self.runner = runner or LayerRunner(how)
        self.on_ids: Callable[[Tensor], None] | None = None
        """Is told the ids [T, K] that were chosen, valid until the next layer runs."""

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.gate = empty(spec.num_experts, spec.d_model)
        self.register_buffer("bias_E", torch.zeros(spec.num_experts, device=device) if choosing_bias else None)
        dtype = TORCH_DTYPE[spec.dtype]
        self.products = nn.ParameterList(
            empty(spec.num_experts, p.n_dim, p.k_dim, dtype=dtype) for p in spec.products(spec.d_ff_of(0))
        )
        assert len(self.products) == len(EPILOGUES[spec.kind])
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return the router's logits, float32 [T, E]."""
        return nn.functional.linear(x_TD.float(), self.gate)

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        x_TD = x.reshape(-1, self.spec.d_model).contiguous()
        weights = ExpertWeights.stacked(self.spec, [p.detach() for p in self.products])
        call = LayerCall(
            x_TD=x_TD, logits_TE=self.logits(x_TD), weights=weights, router=self.router, bias_E=self.bias_E
        )
        out_TD, ids_TK = self.runner.run(self.layer, call)
        if self.on_ids is not None:
            self.on_ids(ids_TK)
        return out_TD.view(x.shape)
