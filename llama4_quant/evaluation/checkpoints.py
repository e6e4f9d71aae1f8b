"""Evaluate a checkpoint on a text file, alone or beside the checkpoint that it should be like."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama4_quant.checkpoint.source import resolve
from llama4_quant.errors import UsageError
from llama4_quant.evaluation import measure
from llama4_quant.evaluation.report import EvaluationResult
from llama4_quant.evaluation.windows import token_windows
from llama4_quant.runtime.loader import load
from llama4_quant.runtime.tokenizer import Tokenizer
from llama4_quant.scheme import Scheme


def evaluate(
    model: str | Path,
    *,
    text: str | Path,
    reference: str | Path | None = None,
    scheme: str | Scheme | None = None,
    seq_length: int = 2048,
    num_windows: int | None = None,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.bfloat16,
    attention: str = "sdpa",
    kernel: str = "auto",
    lm_head: str | None = None,
    offload: str | None = None,
    expert_cache: int | str | None = None,
    revision: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> EvaluationResult:
    """Measure perplexity on a text, and against a reference KL divergence and top-1 agreement.

    Args:
        model: a local directory, or a Hub id; BF16 or quantized.
        text: a UTF-8 file. The tokenizer of `model` reads it.
        reference: what the model should be like: usually the BF16 checkpoint it was made from.
        scheme: quantize `model`, a BF16 checkpoint, while loading.
        seq_length: positions per window, `<|begin_of_text|>` included; seq_length - 1 tokens of each are scored.
        num_windows: how many, from the start of the text; None for as many as fit.
        batch_size: windows per forward pass.
        device: where both models go.
        dtype: compute dtype of both models.
        attention: of both models, as for `load`.
        kernel: what multiplies with the weights of both models, as for `load`.
        lm_head: quantize the head of `model` while loading: "int8" or "int4".
        offload: leave routed experts of both models in the file, as for `load`.
        expert_cache: memory of each model for offloaded experts.
        revision: branch, tag or commit, if `model` is a Hub id.
        progress: called with the number of windows just done.

    Raises:
        Llama4QuantError: a checkpoint or the text cannot be used, or the text is too short.
    """
    folder = resolve(str(model), revision)
    windows_WL = text_windows(folder, Path(text), seq_length=seq_length, num_windows=num_windows)
    shared: dict[str, Any] = {
        "device": device, "dtype": dtype, "attention": attention, "kernel": kernel, "offload": offload,
        "expert_cache": expert_cache,
    }  # fmt: skip
    compared = None
    if reference is not None:
        loaded = load(resolve(str(reference)), **shared)
        compared = measure.NamedModel(name=str(reference), logits=loaded)
    return measure.evaluate(
        measure.NamedModel(
            name=_label(str(model), scheme, lm_head),
            logits=load(folder, scheme, lm_head=lm_head, **shared),
        ),
        windows_WL,
        reference=compared,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )


def text_windows(folder: Path, text: Path, *, seq_length: int, num_windows: int | None = None) -> Tensor:
    """Windows [W, seq_length] of a text file in the tokens of the checkpoint in `folder`.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, or is too short.
    """
    tokenizer = Tokenizer.from_folder(folder)
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{text}: cannot be read as UTF-8 text: {error}") from error
    return token_windows(
        tokenizer.encode(content, bos=False),
        seq_length=seq_length,
        num_windows=num_windows,
        bos_token_id=tokenizer.bos_token_id,
    )


def _label(name: str, scheme: str | Scheme | None, lm_head: str | None) -> str:
    """What a report calls a model."""
    label = name if scheme is None else f"{name} as {scheme.label if isinstance(scheme, Scheme) else scheme}"
    return label if lm_head is None else f"{label}, {lm_head} head"
