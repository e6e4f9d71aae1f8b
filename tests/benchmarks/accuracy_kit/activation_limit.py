"""What FP8_DYNAMIC loses with exact weights, since activations are rounded at run time.

A choice of codes can get below it only as far as weights can make up for what rounding does to activations on average.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama4_quant.evaluation.measure import NamedModel, evaluate
from llama4_quant.ops.reference import round_activations_fp8
from llama4_quant.runtime.loader import load

from .checkpoint_facts import ROLES

PROJECTIONS = {
    "all-text-linears": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "feed-forward": ("gate_proj", "up_proj", "down_proj"),
}
assert PROJECTIONS.keys() == ROLES.keys()


def activation_limit(model: Path, windows_WL: Tensor, roles: str, *, batch_size: int = 4) -> float:
    """KL(original || original with rounded activations) in nats per token, in float32.

    Args:
        model: the BF16 checkpoint.
        windows_WL: [W, L] held-out tokens.
        roles: which weights' inputs are rounded; a key of `ROLES`.
        batch_size: windows per forward pass.
    """
    exact, rounded = load(model, dtype="float32"), load(model, dtype="float32")
    hooked = [
        module.register_forward_pre_hook(_round_input)
        for name, module in rounded.model.named_modules()
        if name.rpartition(".")[2] in PROJECTIONS[roles]
    ]
    assert hooked
    result = evaluate(
        NamedModel(name="rounded activations", logits=rounded),
        windows_WL,
        reference=NamedModel(name="original", logits=exact),
        batch_size=batch_size,
    )
    assert result.comparison is not None
    return result.comparison.divergence.value


def _round_input(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *others = arguments
    with torch.inference_mode():
        return (round_activations_fp8(x), *others)
