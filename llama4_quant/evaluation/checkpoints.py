"""Evaluate a checkpoint on a text file, alone or beside the checkpoint that it should be like."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama4_quant.checkpoint.source import resolve
from llama4_quant.errors import UsageError
from llama4_quant.evaluation import measure
from llama4_quant.evaluation.report import EvaluationResult
from llama4_quant.evaluation.windows import token_windows
from llama4_quant.runtime.cache_formats import CacheDtype
from llama4_quant.runtime.loader import load
from llama4_quant.runtime.model import Llama4Model
from llama4_quant.runtime.sampling import DEFAULT_PREFILL_CHUNK_SIZE
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
    prefill_chunk_size: int = DEFAULT_PREFILL_CHUNK_SIZE,
    kv_cache_dtype: str = CacheDtype.AUTO,
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
        prefill_chunk_size: positions of a window that are computed, and scored, at a time.
        kv_cache_dtype: how `model` keeps keys and values, as for `GenerationSettings`; not the reference.
        revision: branch, tag or commit, if `model` is a Hub id.
        progress: called with the number of windows just done.

    Raises:
        Llama4QuantError: a checkpoint or the text cannot be used, or the text is too short.
    """
    if prefill_chunk_size < 1:
        raise UsageError(f"prefill_chunk_size is {prefill_chunk_size}, expected at least 1")
    kind = CacheDtype.parse(kv_cache_dtype)
    folder = resolve(str(model), revision)
    windows_WL = text_windows(folder, Path(text), seq_length=seq_length, num_windows=num_windows)
    shared: dict[str, Any] = {
        "device": device, "dtype": dtype, "attention": attention, "kernel": kernel, "offload": offload,
        "expert_cache": expert_cache,
    }  # fmt: skip
    compared = None
    if reference is not None:
        loaded = load(resolve(str(reference)), **shared)
        compared = measure.NamedModel(
            name=str(reference), logits=ChunkedLogits(loaded, prefill_chunk_size, CacheDtype.AUTO)
        )
    return measure.evaluate(
        measure.NamedModel(
            name=_label(str(model), scheme, lm_head, kind),
            logits=ChunkedLogits(load(folder, scheme, lm_head=lm_head, **shared), prefill_chunk_size, kind),
        ),
        windows_WL,
        reference=compared,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )


class ChunkedLogits:
    """A model whose logits come in pieces, so that memory does not grow with the length of windows."""

    def __init__(self, model: Llama4Model, chunk_size: int, kind: CacheDtype = CacheDtype.AUTO) -> None:
        """Compute `chunk_size` positions at a time, with a cache of that kind."""
        self._model, self._chunk_size, self._kind = model, chunk_size, kind

    def __call__(self, ids_BL: Tensor) -> Iterator[Tensor]:
        """Logits [B, chunk, V] of chunk after chunk of [B, L] tokens."""
        num_windows, length = ids_BL.shape
        if length <= self._chunk_size and self._kind is CacheDtype.AUTO:
            yield self._model(ids_BL)
            return
        cache = self._model.new_cache(num_windows, length, self._kind)
        for chunk in torch.split(ids_BL, self._chunk_size, dim=1):
            yield self._model(chunk, cache=cache)


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


def _label(name: str, scheme: str | Scheme | None, lm_head: str | None, kind: CacheDtype) -> str:
    """What a report calls a model."""
    label = name if scheme is None else f"{name} as {scheme.label if isinstance(scheme, Scheme) else scheme}"
    label = label if lm_head is None else f"{label}, {lm_head} head"
    return label if kind is CacheDtype.AUTO else f"{label}, {kind} KV cache"
