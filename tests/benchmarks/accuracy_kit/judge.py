"""One judge for all: transformers loads every checkpoint in the same way and scores the same held-out windows.

Weights are decompressed to float32 and everything is computed in float32, so that what is compared is what was lost in
quantization and not the noise of BF16 arithmetic. FP8_DYNAMIC rounds activations too, one scale per token; see
docs/transformers.md for why modules with 2-D inputs need a hook for that.
"""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from llama4_quant.config import Llama4Config
from llama4_quant.evaluation.measure import NamedModel, evaluate

REMEMBERED_BYTES = 2**30
"""The reference's logits are kept from row to row if they take no more than this."""

SETTINGS = {"dtype": "float32", "fp8": "one scale per token"}
"""What a score depends on besides the checkpoint and the windows; part of the cache's key."""


class Judge:
    """Holds the reference model and the windows."""

    def __init__(self, reference: Path, windows_WL: Tensor, *, batch_size: int = 4) -> None:
        """Load the reference.

        Args:
            reference: the BF16 checkpoint.
            windows_WL: [W, L] held-out tokens.
            batch_size: windows per forward pass.
        """
        self._windows_WL = windows_WL
        self._batch_size = batch_size
        with redirect_stderr(io.StringIO()):
            self._reference = remembered(named(reference, load(reference)))

    def score(self, folder: Path) -> dict[str, Any]:
        """Perplexity, KL(reference || quantized) in nats per token, top-1 agreement, each with its standard error."""
        with redirect_stderr(io.StringIO()):  # several progress bars for every checkpoint
            result = evaluate(
                named(folder, load(folder)), self._windows_WL, reference=self._reference, batch_size=self._batch_size
            )
        return result.to_json()


def remembered(model: NamedModel, limit: int = REMEMBERED_BYTES) -> NamedModel:
    """The same model, which computes a batch of windows once as long as `limit` bytes of logits are not exceeded."""
    known: dict[bytes, Tensor] = {}

    def logits(tokens_BL: Tensor) -> Tensor:
        key = tokens_BL.numpy().tobytes()
        if key in known:
            return known[key]
        found = model.logits(tokens_BL)
        if found.nbytes + sum(kept.nbytes for kept in known.values()) <= limit:
            known[key] = found
        return found

    return NamedModel(name=model.name, logits=logits)


def named(folder: Path, model: PreTrainedModel) -> NamedModel:
    """A transformers model as `evaluate` wants it."""

    def logits(tokens_BL: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens_BL, use_cache=False).logits
        return found

    return NamedModel(name=folder.name, logits=logits)


def load(folder: Path) -> PreTrainedModel:
    """A checkpoint in float32.

    Raises:
        ValueError: transformers misses tensors, or finds some that it does not know or that have other shapes.
    """
    config = Llama4Config.from_file(folder / "config.json")
    kind = AutoModelForCausalLM if config.vision is None else AutoModelForImageTextToText
    model, problems = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if any(problems.values()):
        raise ValueError(f"{folder}: expected every tensor to find its place in transformers, found {problems}")
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.register_forward_pre_hook(_add_batch)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _add_batch(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Show a matrix [T, K] as [1, T, K], so that each token gets its own scale."""
    return (args[0].unsqueeze(0), *args[1:]) if args[0].dim() == 2 else None
