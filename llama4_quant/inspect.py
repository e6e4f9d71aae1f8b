"""What is in a checkpoint, BF16 or quantized, as plain data: what `llama4-quant inspect` prints."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.source import open_headers
from llama4_quant.config import Llama4Config, TextConfig, VisionConfig
from llama4_quant.errors import UsageError
from llama4_quant.ops import Kernel, KernelCount, native_attention, native_elementwise
from llama4_quant.planning.make import make_plan
from llama4_quant.runtime.attention import TextAttention
from llama4_quant.runtime.cache import cache_bytes
from llama4_quant.runtime.cache_formats import CacheDtype
from llama4_quant.runtime.elementwise import Gate, RMSNorm
from llama4_quant.runtime.model import Llama4Model
from llama4_quant.stored import cache_scale_names, quantization_section, quantized_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectedWeight:
    """One weight: a linear module (each expert on its own), or another tensor."""

    name: str
    role: str
    stored_as: str
    shape: tuple[int, ...]
    num_weights: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleCount:
    """All weights of one role that are stored alike."""

    role: str
    stored_as: str
    count: int
    num_weights: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkKernel:
    """What runs work that is no product with a weight.

    Attributes:
        work: what, with the dtype of the cache where that decides.
        kernel: NATIVE, or TORCH for what torch brings.
        rejected: what would be faster, with why it does not run.
        count: modules that do it.
    """

    work: str
    kernel: Kernel
    rejected: tuple[tuple[Kernel, str], ...]
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """A checkpoint's content.

    Attributes:
        facts: (name, value) pairs about the architecture.
        kernels: which backend would run how many weights, if that was asked.
        other_kernels: likewise, what would run the rest of the text model.
    """

    source: str
    facts: tuple[tuple[str, str], ...]
    roles: tuple[RoleCount, ...]
    weights: tuple[InspectedWeight, ...]
    num_weights: int
    num_bytes: int
    num_files: int
    kernels: tuple[KernelCount, ...] = ()
    other_kernels: tuple[WorkKernel, ...] = ()


def inspect(
    source: str | Path, *, kernels: bool = False, context: int | None = None, revision: str | None = None
) -> Inspection:
    """Read config.json and the headers of a checkpoint; no weights are read.

    Args:
        source: a local directory, or a Hub id.
        kernels: also say which backend would run its weights, and the work between them, on this machine's processor
            in bfloat16. The first time that compiles the native kernels.
        context: also say what the KV cache of so many tokens takes, by how it is kept.
        revision: branch, tag or commit of a Hub id.

    Raises:
        Llama4QuantError: not a Llama 4 checkpoint, or its tensors are not what config.json promises; a context below 1.
    """
    if context is not None and context < 1:
        raise UsageError(f"context is {context}, expected at least 1 token")
    with open_headers(str(source), revision) as reader:
        config = Llama4Config.from_dict(reader.config)
        weights = tuple(_weights(config, reader))
        model = _model(config, reader) if kernels else None
        return Inspection(
            source=str(source),
            facts=(*_facts(config), *([] if context is None else _cache_facts(config, reader, context))),
            roles=_count(weights),
            weights=weights,
            num_weights=sum(weight.num_weights for weight in weights),
            num_bytes=sum(weight.num_bytes for weight in weights),
            num_files=len({entry.path for entry in reader.tensors.values()}),
            kernels=() if model is None else model.kernels("cpu"),
            other_kernels=() if model is None else tuple(_other_kernels(model)),
        )


def _weights(config: Llama4Config, reader: CheckpointReader) -> Iterable[InspectedWeight]:
    if quantization_section(config) is None:
        plan = make_plan(config, None, reader.tensors)
        for tensor in plan.tensors:
            for decision in tensor.decisions:
                yield InspectedWeight(
                    name=decision.name,
                    role=decision.role,
                    stored_as=tensor.dtype.lower(),
                    shape=decision.shape,
                    num_weights=decision.num_weights,
                    num_bytes=decision.bytes_in,
                )
        return
    for weight in quantized_weights(config, reader.tensors):
        entries = [reader.tensors[name] for name in weight.tensors]
        yield InspectedWeight(
            name=weight.name,
            role=weight.role,
            stored_as=entries[0].dtype.lower() if weight.scheme is None else weight.scheme.label,
            shape=weight.shape,
            num_weights=weight.num_weights,
            num_bytes=sum(entry.nbytes for entry in entries),
        )


def _model(config: Llama4Config, reader: CheckpointReader) -> Llama4Model:
    """Without storage."""
    is_quantized = quantization_section(config) is not None
    stored = quantized_weights(config, reader.tensors) if is_quantized else ()
    schemes = {weight.name: weight.scheme for weight in stored}
    return Llama4Model(config, scheme_of=schemes.get)


def _other_kernels(model: Llama4Model) -> Iterable[WorkKernel]:
    """As `Elementwise.choose`, `TextAttention.choose` and `attend` decide."""
    attentions = [module for module in model.modules() if isinstance(module, TextAttention)]
    head_dim, place = model.config.text.head_dim, torch.device("cpu")
    stored = {CacheDtype.BF16: torch.bfloat16, CacheDtype.FP8: torch.float8_e4m3fn, CacheDtype.INT8: torch.int8}
    for kind, dtype in stored.items():
        reason = native_attention.why_not(place, torch.bfloat16, dtype, head_dim)
        yield _work(f"attention of one token, {kind} cache", reason, len(attentions))
    yield _work("attention of several tokens", "there is none; torch's is fused", len(attentions))
    reason = native_elementwise.probe()
    yield _work("norm", reason, sum(isinstance(module, RMSNorm) for module in model.modules()))
    yield _work("rotation", reason, sum(attention.uses_rope for attention in attentions))
    yield _work("gate", reason, sum(isinstance(module, Gate) for module in model.modules()))


def _work(work: str, why_not_native: str | None, count: int) -> WorkKernel:
    rejected = () if why_not_native is None else ((Kernel.NATIVE, why_not_native),)
    return WorkKernel(work=work, kernel=Kernel.TORCH if rejected else Kernel.NATIVE, rejected=rejected, count=count)


def _count(weights: Iterable[InspectedWeight]) -> tuple[RoleCount, ...]:
    groups: dict[tuple[str, str], list[InspectedWeight]] = {}
    for weight in weights:
        groups.setdefault((weight.role, weight.stored_as), []).append(weight)
    return tuple(
        RoleCount(
            role=role,
            stored_as=stored_as,
            count=len(members),
            num_weights=sum(weight.num_weights for weight in members),
            num_bytes=sum(weight.num_bytes for weight in members),
        )
        for (role, stored_as), members in groups.items()
    )


def _facts(config: Llama4Config) -> tuple[tuple[str, str], ...]:
    quantization = quantization_section(config) or {}
    facts = [
        ("architecture", config.architecture),
        ("quantization", str(quantization.get("quant_method", "none"))),
        *_text_facts(config.text),
    ]
    return (*facts, *(_vision_facts(config.vision) if config.vision else [("vision", "none")]))


def _cache_facts(config: Llama4Config, reader: CheckpointReader, context: int) -> list[tuple[str, str]]:
    text, has_scales = config.text, bool(cache_scale_names(config, reader.tensors))
    everything = cache_bytes(replace(text, attention_chunk_size=None), context, kind=CacheDtype.BF16)
    sizes = {
        kind: cache_bytes(text, context, kind=kind, has_scales=has_scales)
        for kind in (CacheDtype.BF16, CacheDtype.FP8, CacheDtype.INT8)
    }
    return [
        (f"KV cache, {context:,} tokens, {kind}", f"{size:,} bytes ({size / everything:.0%} of bf16 for every layer)")
        for kind, size in sizes.items()
    ]


def _text_facts(text: TextConfig) -> list[tuple[str, str]]:
    num_nope = text.rope_layers.count(False)
    scaling = text.rope_scaling
    return [
        ("layers", f"{text.num_hidden_layers}: {len(text.moe_layers)} MoE, {num_nope} NoPE"),
        ("experts", f"{text.num_local_experts}, top {text.num_experts_per_tok}, width {text.intermediate_size}"),
        ("hidden size", f"{text.hidden_size}, dense MLP {text.intermediate_size_mlp}"),
        ("attention", f"{text.num_attention_heads} heads, {text.num_key_value_heads} KV heads x {text.head_dim}"),
        ("attention chunk", f"{text.attention_chunk_size} tokens on RoPE layers"),
        ("RoPE", f"theta {text.rope_theta:g}" + (f", llama3 scaling x{scaling.factor:g}" if scaling else "")),
        ("q/k norm", "yes" if text.use_qk_norm else "no"),
        ("temperature tuning", f"every {text.floor_scale} tokens" if text.attn_temperature_tuning else "no"),
        ("vocabulary", f"{text.vocab_size}"),
    ]


def _vision_facts(vision: VisionConfig) -> list[tuple[str, str]]:
    tile = f"{vision.image_size}x{vision.image_size} pixels, {vision.tokens_per_tile} text positions"
    return [("vision", f"{vision.num_hidden_layers} layers x {vision.hidden_size}; a tile is {tile}")]
