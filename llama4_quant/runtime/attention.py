"""Grouped-query attention of the decoder.

Two kinds of layers alternate. RoPE layers are *chunked*: a token sees, causally, only its own chunk of
`attention_chunk_size` positions. NoPE layers see everything before them, and their queries are scaled with position
(temperature tuning). Who sees whom depends on the kind of layer only and is worked out once per step (visibility.py).

New tokens attend to what the cache holds and to each other, part by part (partial.py): no memory grows with the number
of keys times the number of queries, and of a cache of codes some columns at a time are decoded.

Shape letters: B batch, D head dimension, G key-value heads, H query heads, S keys, T new tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain

import torch
from torch import Tensor, nn

from llama4_quant.config import TextConfig
from llama4_quant.ops import native_attention, native_elementwise
from llama4_quant.ops.native_attention_tape import RecordedAttention
from llama4_quant.ops.native_tape import NotRecordableError, Tape
from llama4_quant.runtime import flex, partial
from llama4_quant.runtime.cache import KeyValues, LayerCache
from llama4_quant.runtime.cache_formats import CacheScales, LayerFormat
from llama4_quant.runtime.elementwise import HeadRotation
from llama4_quant.runtime.linear import Builder
from llama4_quant.runtime.rope import Rotation
from llama4_quant.runtime.visibility import Segment

DECODED_BYTES = 1 << 22
"""Of keys and values decoded at a time from a cache of codes; as many columns as there are new ones if that is more."""


class Attention(StrEnum):
    """How softmax(Q K^T) V is computed."""

    SDPA = "sdpa"
    """torch's fused kernel behind `scaled_dot_product_attention`; for single tokens, on processors, one of ours."""
    EAGER = "eager"
    """Matrix products and a softmax in fp32, for reading and for checking."""
    FLEX = "flex"
    """torch's `flex_attention`, compiled when it is first used, where that works."""


Visible = tuple[Segment, ...] | flex.Visible


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What the layers of one forward pass share.

    Attributes:
        past: columns computed before.
        rotation: of the new tokens' positions, for RoPE layers.
        temperature: query scale for NoPE layers, fp32 [B, T, 1, 1]; None if the model has none.
        chunked: who sees whom in RoPE layers.
        full: who sees whom in NoPE layers.
    """

    past: int
    rotation: Rotation
    temperature: Tensor | None
    chunked: Visible
    full: Visible


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedStep:
    """What the layers of a step on a tape share.

    Attributes:
        rotation: buffers for the token's, [1, 1, P].
        temperature: a buffer for its query scale, float32 [1]; None if the model has none.
        attentions: of the layers recorded so far; each is to be pointed into the cache before a run.
    """

    rotation: Rotation
    temperature: Tensor | None
    attentions: list[RecordedAttention] = field(default_factory=list)


def query_temperature(positions_BT: Tensor, floor_scale: int, attn_scale: float) -> Tensor:
    """`1 + attn_scale * log(1 + floor((position + 1) / floor_scale))`, fp32 [B, T, 1, 1] (arXiv 2501.19399)."""
    steps = torch.floor((positions_BT.float() + 1.0) / floor_scale)
    return (torch.log1p(steps) * attn_scale + 1.0)[..., None, None]


def attend(
    q_BHTD: Tensor,
    new: KeyValues | None,
    cache: LayerCache | None,
    visible: Visible,
    kind: Attention,
    *,
    is_native: bool = False,
) -> Tensor:
    """Attention of new tokens to the cache and to each other.

    Args:
        q_BHTD: their queries.
        new: their keys and values; None for a single token that is in the cache already.
        cache: of the columns before `new`; None if there are none.
        visible: who sees whom.
        kind: how to compute; flex goes with a `visible` of its own.
        is_native: for a single token, let the compiled kernel read the cache.

    Returns:
        [B, T, H, D]; of padding, anything finite.
    """
    if isinstance(visible, flex.Visible):
        pieces = (piece for piece, _ in _pieces(q_BHTD, new, cache, slice(None), visible.key_start, visible.stop))
        return flex.attend(q_BHTD, list(pieces), visible).transpose(1, 2)
    if q_BHTD.shape[2] == 1:
        if is_native and cache is not None and cache.format.key.dtype in native_attention.READS:
            return _natively(q_BHTD, cache, visible[0]).transpose(1, 2)
        return _segment(q_BHTD, new, cache, visible[0], kind).transpose(1, 2)
    assert new is not None, "several queries come with their keys"
    batch_size, num_heads, num_new, dim = q_BHTD.shape
    y_BTHD = q_BHTD.new_zeros(batch_size, num_new, num_heads, dim)
    for segment in visible:
        columns = slice(segment.start - new.start, segment.stop - new.start)
        y = _segment(q_BHTD[segment.rows, :, columns], new, cache, segment, kind)
        y_BTHD[segment.rows, columns] = y.transpose(1, 2)
    return y_BTHD


def _segment(q: Tensor, new: KeyValues | None, cache: LayerCache | None, segment: Segment, kind: Attention) -> Tensor:
    """Queries [rows, H, T, D] of one segment -> [rows, H, T, D]."""
    pieces = _pieces(q, new, cache, segment.rows, segment.key_start, segment.stop)
    calls = (_arguments(q, piece, segment, is_causal=is_new) for piece, is_new in pieces)
    if kind is Attention.SDPA and q.device.type != "cpu":
        return _on_device(calls).view(q.shape)
    compute = partial.fused if kind is Attention.SDPA else partial.products
    return partial.merged(compute(**call) for call in calls).view(q.shape)


def _natively(q: Tensor, cache: LayerCache, segment: Segment) -> Tensor:
    """A single query per head to a cache as it is stored, which is read once: [B, H, 1, D]."""
    pieces = [(keys, values) for _, keys, values in cache.stored(segment.key_start, segment.stop)]
    keys, values = ([pair[side].codes for pair in pieces] for side in (0, 1))
    key_scales, value_scales = (
        [pair[side].scales for pair in pieces if pair[side].scales is not None] for side in (0, 1)
    )
    q_BGRD = q.reshape(q.shape[0], keys[0].shape[1], -1, q.shape[-1])
    y_BGRD = native_attention.CACHE_ATTENTION(
        q_BGRD,
        keys,
        values,
        key_scales,
        value_scales,
        segment.bias,
        key_scale=cache.format.key.scale or 1.0,
        value_scale=cache.format.value.scale or 1.0,
    )
    return y_BGRD.view(q.shape)


def _on_device(calls: Iterator[partial.Arguments]) -> Tensor:
    """Where torch's fused kernel does not give what merging needs: that kernel for a single part, else products."""
    first = next(calls)
    second = next(calls, None)
    if second is None:
        return partial.whole(**first)
    return partial.merged(partial.products(**call) for call in chain((first, second), calls))


def _pieces(
    q: Tensor, new: KeyValues | None, cache: LayerCache | None, rows: slice, start: int, stop: int
) -> Iterator[tuple[KeyValues, bool]]:
    """Keys and values of columns [start, stop) of some rows, the cache's first; and whether they are the new ones."""
    border = stop if new is None else min(max(start, new.start), stop)
    if cache is not None and start < border:
        max_columns = max(q.shape[2], DECODED_BYTES // cache.decoded_column_bytes(q.dtype))
        for piece in cache.read(start, border, q.dtype, rows=rows, max_columns=max_columns):
            yield piece, False
    if new is not None:
        columns = slice(border - new.start, stop - new.start)
        keys, values = new.keys[rows, :, columns], new.values[rows, :, columns]
        yield KeyValues(start=border, keys=keys, values=values), True


def _arguments(q: Tensor, piece: KeyValues, segment: Segment, *, is_causal: bool) -> partial.Arguments:
    bias = segment.bias
    if bias is not None:
        bias = bias[..., piece.start - segment.key_start : piece.stop - segment.key_start]
    if q.shape[2] == 1:
        # The query heads that share keys become the rows of one product, so that keys and values are read once.
        q = q.reshape(q.shape[0], piece.keys.shape[1], -1, q.shape[-1])
        is_causal = False
    return {"q": q, "k": piece.keys, "v": piece.values, "bias": bias, "is_causal": is_causal}


class TextAttention(nn.Module):
    """Attention of one decoder layer.

    Attributes:
        cache_scales: of an FP8 cache, from the checkpoint; None if it has none.
        is_native: the compiled kernel reads the cache for single tokens.
    """

    is_native: bool

    def __init__(self, config: TextConfig, layer: int, builder: Builder, kind: Attention) -> None:
        super().__init__()
        self.uses_rope = config.rope_layers[layer]
        self.head_dim = config.head_dim
        self.kind = kind
        self.rotated = HeadRotation(builder, config.rms_norm_eps if config.use_qk_norm else None)
        self._allows_native = kind is Attention.SDPA and builder.allows_native
        self.choose(builder.device)
        self.cache_scales: CacheScales | None = None
        hidden, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = builder.linear("q_proj", queries, hidden, bias=bias)
        self.k_proj = builder.linear("k_proj", keys, hidden, bias=bias)
        self.v_proj = builder.linear("v_proj", keys, hidden, bias=bias)
        self.o_proj = builder.linear("o_proj", hidden, queries, bias=bias)

    def choose(self, device: torch.device) -> None:
        """Choose for a device, where the cache is from now on; compiles on first use, for processors only."""
        dtype = torch.bfloat16  # of the model, or nothing native is allowed
        self.is_native = self._allows_native and native_attention.why_not(device, dtype, dtype, self.head_dim) is None

    def forward(self, x_BTH: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]; with a cache, stores the new keys and values in it."""
        projected = (self.q_proj(x_BTH), self.k_proj(x_BTH), self.v_proj(x_BTH))
        context = self.context(*projected, step, cache, self.cache_scales)
        y_BTH: Tensor = self.o_proj(context)
        return y_BTH

    def record(self, tape: Tape, x_1H: Tensor, recorded: RecordedStep, cache: LayerFormat) -> Tensor:
        """`forward` of one token on a tape, with a cache of this format.

        Raises:
            NotRecordableError: torch's operators run here.
        """
        if not self.is_native or cache.key.dtype not in native_attention.READS:
            raise NotRecordableError(f"attention to a cache of {cache.key.dtype} runs in torch")
        q, k, v = (
            proj.record(tape, x_1H).view(1, 1, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.uses_rope:
            q, k = (self.rotated.record(tape, x, recorded.rotation) for x in (q, k))
        elif recorded.temperature is not None:
            q = native_elementwise.record_multiply(tape, q, recorded.temperature)
        k, v = k.view(1, -1, self.head_dim), v.view(1, -1, self.head_dim)
        q_1GRD = q.view(1, k.shape[1], -1, self.head_dim)
        scales = (cache.key.scale or 1.0, cache.value.scale or 1.0)
        attention = RecordedAttention(tape, q_1GRD, k, v, stored=cache.key.dtype, scales=scales)
        recorded.attentions.append(attention)
        return self.o_proj.record(tape, attention.output.view(1, -1))

    def context(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, cache: LayerCache | None, scales: CacheScales | None = None
    ) -> Tensor:
        """Everything between the projections: queries [B, T, H*D], keys and values [B, T, G*D] -> [B, T, H*D].

        All keys and values are as they come out of the cache, those of the new tokens too, as in vLLM and transformers.
        Without a cache, `scales` are those of the FP8 cache that there might be.
        """
        k_BTGD, v_BTGD = self.cached(k, v, step)
        q, k, v = self._place_queries(q, step).transpose(1, 2), k_BTGD.transpose(1, 2), v_BTGD.transpose(1, 2)
        visible = step.chunked if self.uses_rope else step.full
        if cache is None:
            if scales is not None:
                k, v = scales.round(k, v)
            return attend(q, KeyValues(start=step.past, keys=k, values=v), None, visible, self.kind).flatten(2)
        encoded = cache.encode(k, v)
        if q.shape[2] == 1:
            cache.store(step.past, encoded)
            return attend(q, None, cache, visible, self.kind, is_native=self.is_native).flatten(2)
        y_BTHD = attend(q, cache.decode(step.past, encoded, q.dtype), cache, visible, self.kind)
        cache.store(step.past, encoded)  # not before: a chunked layer has no room for columns that only these see
        return y_BTHD.flatten(2)

    def cached(self, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Projected keys and values [B, T, G*D] as a cache gets them, [B, T, G, D]: keys rotated and normalized."""
        k_BTGD, v_BTGD = (x.view(*x.shape[:-1], -1, self.head_dim) for x in (k, v))
        return self._rotate(k_BTGD, step), v_BTGD

    def _place_queries(self, q: Tensor, step: Step) -> Tensor:
        """Give queries what depends on position: rotation then norm, or temperature."""
        q_BTHD = self._rotate(q.view(*q.shape[:-1], -1, self.head_dim), step)
        if step.temperature is not None and not self.uses_rope:
            q_BTHD = (q_BTHD * step.temperature).type_as(q_BTHD)
        return q_BTHD

    def _rotate(self, x_BTXD: Tensor, step: Step) -> Tensor:
        """What a RoPE layer does to queries and keys."""
        return self.rotated(x_BTXD, step.rotation) if self.uses_rope else x_BTXD
