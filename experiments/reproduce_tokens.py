"""Our own model under every policy, and by the plain definition: loss and greedy tokens beside those unsliced.

Its weights are random, the same for the same seed: what is asked is whether a policy changes them, not whether they are
good. Shape letters: T tokens, B sequences, C positions.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..policies.contract import Control
from ..policies.registry import POLICIES, make_policy

if TYPE_CHECKING:
    import torch

    from ..runtime.experts import How, LayerRunner
    from .own_model.model import ModelConfig

NUM_PROMPTS, PROMPT_LEN, NUM_NEW = 4, 64, 24
Row = dict[str, Any]


def generations(
    device_facts: str, *, where: str = "cuda", how: "How" = "kernels", cfg: "ModelConfig | None" = None
) -> list[Row]:
    """Return a row for ours unsliced, for the definition and for each policy: loss, and whether both are the same."""
    import torch

    from ..runtime.experts import LayerRunner
    from ..runtime.hf import passes_on, setup_of
    from ..runtime.passes import Steering
    from .own_model.model import Decoder, ModelConfig, serving_copy

    torch.manual_seed(0)
    with torch.device(where):
        model = serving_copy(Decoder(cfg or ModelConfig(), dtype=torch.bfloat16))
        prompts_BC = torch.randint(0, 256, (NUM_PROMPTS, PROMPT_LEN))
    blocks: Any = model.blocks
    spec = replace(blocks[0].moe.spec, num_layers=len(blocks))
    expected = _run(model, LayerRunner(how), prompts_BC)
    rows = [_row("ours", expected, expected)]
    # Where the matrix library does not walk K in order, its bits are not ours.
    rows.append(_row("definition", _run(model, LayerRunner("reference"), prompts_BC), expected))
    for name in POLICIES:
        policy = make_policy(name)
        if policy.foresees:
            continue
        setup = setup_of(spec, device_facts, Control())
        steering = Steering(policy, passes_on(prompts_BC.device), setup, on_record=lambda _: None)
        try:
            rows.append(_row(f"ours, {name}", _run(model, LayerRunner(how, steering), prompts_BC), expected))
        finally:
            steering.close()
        rows[-1]["policy_errors"] = steering.policy_errors
    return rows


@contextmanager
def experts_by(model: Any, runner: "LayerRunner") -> Generator[None]:
    """Run the model's experts by ours while the context lasts."""
    from torch.nn import functional

    from ..kernels.spec import RouterSpec
    from ..kernels.weights import ExpertWeights
    from ..runtime.experts import LayerCall

    def forward(moe: Any, layer: int, x_TD: "torch.Tensor") -> "tuple[torch.Tensor, None]":
        h_TD = moe.norm(x_TD)
        call = LayerCall(
            x_TD=h_TD.contiguous(),
            logits_TE=functional.linear(h_TD.float(), moe.router),
            weights=ExpertWeights.stacked(moe.spec, [moe.gate_up.detach(), moe.down.detach()]),
            router=RouterSpec.of(moe.spec),
        )
        return runner.run(layer, call)[0], None

    try:
        for layer, block in enumerate(model.blocks):
            block.moe.forward = partial(forward, block.moe, layer)
        yield
    finally:
        for block in model.blocks:
            del block.moe.forward


def _run(model: Any, runner: "LayerRunner", prompts_BC: "torch.Tensor") -> "tuple[float, torch.Tensor]":
    """Return the loss on the prompts and the tokens that follow them."""
    import torch
    from torch.nn import functional

    with experts_by(model, runner), torch.no_grad():
        tokens_BC = prompts_BC
        logits, _ = model(tokens_BC)
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BC[:, 1:].flatten()).item()
        for _ in range(NUM_NEW):
            tokens_BC = torch.cat([tokens_BC, logits[:, -1:].argmax(-1)], dim=1)
            logits, _ = model(tokens_BC)
    return loss, tokens_BC


def _row(arm: str, found: "tuple[float, torch.Tensor]", expected: "tuple[float, torch.Tensor]") -> Row:
    import torch

    (loss, tokens_BC), (expected_loss, expected_BC) = found, expected
    return {
        "arm": arm, "status": "ok", "loss": loss, "same_loss": loss == expected_loss,
        "same_tokens": bool(torch.equal(tokens_BC, expected_BC)),
    }  # fmt: skip
