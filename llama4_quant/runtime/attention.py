"""Grouped-query attention of the decoder: who sees whom, and the layer.

Two kinds of layers alternate. RoPE layers are *chunked*: a token sees, causally, only its own chunk of
`attention_chunk_size` positions. NoPE layers see everything before them, and their queries are scaled with position
(temperature tuning). Rows of a batch are padded on the left, so a row's positions and chunk borders count from its
first real token.

Who sees whom depends on the kind of layer only, so it is worked out once per step as a list of `Segment`s: a range of
queries, the range of keys that they can see at all, and a mask where that range alone does not say it. Without padding
a chunked prefill becomes one causal square per chunk and needs no mask.

A *column* is an index along the padded sequence, cached columns included; a position is a column minus the row's
padding. Shape letters: B batch, D head dimension, G key-value heads, H query heads, S keys, T queries.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from llama4_quant.config import TextConfig
from llama4_quant.runtime.cache import CacheScales, LayerCache, first_visible_column
from llama4_quant.runtime.linear import Builder
from llama4_quant.runtime.rope import Rotation


class Attention(StrEnum):
    """How softmax(Q K^T) V is computed."""

    SDPA = "sdpa"
    """torch's fused `scaled_dot_product_attention`."""
    EAGER = "eager"
    """Matrix products and a softmax in fp32, for reading and for checking."""


MASK_ELEMENTS = 1 << 24
"""Of a mask, and of the scores under it, per row of the batch: queries are taken in blocks that have no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Queries in columns [start, stop) and the keys they see, in columns [key_start, stop).

    Attributes:
        is_causal: queries and keys are the same columns and each query sees the keys up to its own.
        follows: every query sees all keys before `start`, and those from there up to its own, and there are so many of
            them that no mask should be made; `visible` says the same.
        visible: makes a mask, bool [B or 1, 1, queries, keys]; None: every key is visible, or `is_causal` says which.
            Where masks of a step are small it has been made before; else each layer makes it when it comes to it.
    """

    start: int
    stop: int
    key_start: int
    is_causal: bool = False
    follows: bool = False
    visible: Callable[[], Tensor] | None = None


def plan_segments(
    padding: Sequence[int], past: int, new: int, chunk_size: int | None, device: torch.device
) -> tuple[Segment, ...]:
    """Who sees whom when columns [past, past + new) are computed.

    Args:
        padding: columns of padding on the left of each row.
        past: columns computed before.
        new: columns to compute now.
        chunk_size: positions per chunk, or None for full causal attention.
        device: where masks are needed.
    """
    if any(padding):
        # Not after `past`: queries that are padding see themselves.
        key_start = min(past, *(first_visible_column(pad, past, chunk_size) for pad in padding))
        return _masked(padding, past, past + new, key_start, chunk_size, device)
    borders = [past, past + new]
    if chunk_size is not None:
        first_border = (past // chunk_size + 1) * chunk_size
        borders = [past, *range(first_border, past + new, chunk_size), past + new]
    return tuple(segment for start, stop in pairwise(borders) for segment in _unpadded(start, stop, chunk_size, device))


def _unpadded(start: int, stop: int, chunk_size: int | None, device: torch.device) -> tuple[Segment, ...]:
    """One chunk's part of the new columns, or all of them."""
    key_start = first_visible_column(0, start, chunk_size)
    if stop - start == 1:
        return (Segment(start=start, stop=stop, key_start=key_start),)
    if start == key_start:
        return (Segment(start=start, stop=stop, key_start=key_start, is_causal=True),)
    if device.type == "cpu" and (stop - start) * (stop - key_start) > MASK_ELEMENTS:
        mask = partial(_mask, (0,), (start, stop), key_start, chunk_size, device)
        return (Segment(start=start, stop=stop, key_start=key_start, follows=True, visible=mask),)
    return _masked((0,), start, stop, key_start, chunk_size, device)


def _masked(
    padding: Sequence[int], start: int, stop: int, key_start: int, chunk_size: int | None, device: torch.device
) -> tuple[Segment, ...]:
    """Blocks of queries that need a mask, none of them of more than MASK_ELEMENTS."""
    size = max(1, MASK_ELEMENTS // (stop - key_start))
    is_small = stop - start <= size
    blocks = []
    for first in range(start, stop, size):
        last = min(first + size, stop)
        make: Callable[[], Tensor] = partial(_mask, tuple(padding), (first, last), key_start, chunk_size, device)
        if is_small:
            make = partial(_give, make())
        blocks.append(Segment(start=first, stop=last, key_start=key_start, visible=make))
    return tuple(blocks)


def _give(mask: Tensor) -> Tensor:
    return mask


def _mask(
    padding: Sequence[int], columns: tuple[int, int], key_start: int, chunk_size: int | None, device: torch.device
) -> Tensor:
    """Which keys [key_start, stop) the queries in columns [start, stop) see: bool [B or 1, 1, queries, keys]."""
    start, stop = columns
    queries = torch.arange(start, stop, device=device).view(1, -1, 1)
    keys = torch.arange(key_start, stop, device=device).view(1, 1, -1)
    pad = torch.tensor(padding, device=device).view(-1, 1, 1)
    visible = (keys <= queries) & (keys >= pad)
    if chunk_size is not None:
        visible &= (keys - pad) // chunk_size == (queries - pad) // chunk_size
    # A query that is padding has nothing to see; let it see itself, for a softmax over nothing is NaN. No real query
    # sees a padding key, so its result goes nowhere.
    visible |= keys == queries
    return visible.unsqueeze(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What the layers of one forward pass share.

    Attributes:
        past: columns computed before.
        rotation: of the new tokens' positions, for RoPE layers.
        temperature: query scale for NoPE layers, fp32 [B, T, 1, 1]; None if the model has none.
        chunked: segments of RoPE layers.
        full: segments of NoPE layers.
    """

    past: int
    rotation: Rotation
    temperature: Tensor | None
    chunked: tuple[Segment, ...]
    full: tuple[Segment, ...]


def query_temperature(positions_BT: Tensor, floor_scale: int, attn_scale: float) -> Tensor:
    """`1 + attn_scale * log(1 + floor((position + 1) / floor_scale))`, fp32 [B, T, 1, 1] (arXiv 2501.19399)."""
    steps = torch.floor((positions_BT.float() + 1.0) / floor_scale)
    return (torch.log1p(steps) * attn_scale + 1.0)[..., None, None]


def attend(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, segments: Sequence[Segment], key_column: int, kind: Attention
) -> Tensor:
    """Attention segment by segment.

    Args:
        q_BHTD: queries of the columns that the segments cover.
        k_BGSD: keys, from column `key_column` on.
        v_BGSD: values of the same columns.
        segments: from `plan_segments`.
        key_column: column of the first key.
        kind: how to compute.

    Returns:
        [B, H, T, D].
    """
    first = segments[0].start
    outputs = []
    for segment in segments:
        q = q_BHTD[:, :, segment.start - first : segment.stop - first]
        assert segment.key_start >= key_column, "the cache has forgotten keys that are still visible"
        keys = slice(segment.key_start - key_column, segment.stop - key_column)
        k, v = k_BGSD[:, :, keys], v_BGSD[:, :, keys]
        compute = _sdpa if kind is Attention.SDPA else _eager
        outputs.append(compute(q, k, v, segment))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segment: Segment) -> Tensor:
    if segment.follows:
        return _past_and_own(q, k, v, segment.start - segment.key_start)
    return functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if segment.visible is None else segment.visible(),
        is_causal=segment.is_causal,
        enable_gqa=True,
    )


def _past_and_own(q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
    """All of the first `past` keys, and the others causally.

    Two attentions without a mask, put together by what their softmaxes sum to. On a processor only, where torch's fused
    attention gives those sums and takes no memory for scores. With a mask it would go through oneDNN, which keeps
    memory for every length of keys that it has seen: 18 GB for a prompt of 131,072 tokens.
    """
    queries_per_key = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(queries_per_key, dim=1), v.repeat_interleave(queries_per_key, dim=1)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - the public one gives no sums
    before, before_log = fused(q, k[:, :, :past], v[:, :, :past])
    own, own_log = fused(q, k[:, :, past:], v[:, :, past:], 0.0, True)
    share = torch.sigmoid(before_log - own_log).unsqueeze(-1)
    return torch.lerp(own.float(), before.float(), share).type_as(q)


def _eager(q: Tensor, k: Tensor, v: Tensor, segment: Segment) -> Tensor:
    if segment.follows:  # keys that go too far for a query are behind its mask in every block
        first, device = segment.start, q.device
        blocks = _masked((0,), segment.start, segment.stop, segment.key_start, None, device)
        parts = [
            _eager(
                q[:, :, block.start - first : block.stop - first],
                k[:, :, : block.stop - segment.key_start],
                v[:, :, : block.stop - segment.key_start],
                block,
            )
            for block in blocks
        ]
        return torch.cat(parts, dim=2)
    queries_per_key = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(queries_per_key, dim=1), v.repeat_interleave(queries_per_key, dim=1)
    scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
    visible = None if segment.visible is None else segment.visible()
    if segment.is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(dim=-1).type_as(v) @ v


class TextAttention(nn.Module):
    """Attention of one decoder layer.

    Attributes:
        cache_scales: of an FP8 cache; None keeps keys and values as they are.
    """

    def __init__(self, config: TextConfig, layer: int, builder: Builder, kind: Attention) -> None:
        super().__init__()
        self.uses_rope = config.rope_layers[layer]
        self.normalizes = config.use_qk_norm and self.uses_rope
        self.norm_eps = config.rms_norm_eps
        self.head_dim = config.head_dim
        self.kind = kind
        self.cache_scales: CacheScales | None = None
        hidden, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = builder.linear("q_proj", queries, hidden, bias=bias)
        self.k_proj = builder.linear("k_proj", keys, hidden, bias=bias)
        self.v_proj = builder.linear("v_proj", keys, hidden, bias=bias)
        self.o_proj = builder.linear("o_proj", hidden, queries, bias=bias)

    def forward(self, x_BTH: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]; with a cache, stores the new keys and values in it."""
        projected = (self.q_proj(x_BTH), self.k_proj(x_BTH), self.v_proj(x_BTH))
        context = self.context(*projected, step, cache, self.cache_scales)
        y_BTH: Tensor = self.o_proj(context)
        return y_BTH

    def context(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, cache: LayerCache | None, scales: CacheScales | None = None
    ) -> Tensor:
        """Everything between the projections: queries [B, T, H*D], keys and values [B, T, G*D] -> [B, T, H*D].

        With scales, all keys and values are rounded to FP8, those of the new tokens too, as vLLM and transformers do.
        """
        k_BTGD, v_BTGD = self.cached(k, v, step)
        q, k, v = self._place_queries(q, step).transpose(1, 2), k_BTGD.transpose(1, 2), v_BTGD.transpose(1, 2)
        if scales is not None:
            k, v = scales.round(k, v)
        key_column = step.past
        if cache is not None:
            k, v = cache.append(k, v, step.past)
            key_column = cache.first
        segments = step.chunked if self.uses_rope else step.full
        return attend(q, k, v, segments, key_column, self.kind).transpose(1, 2).flatten(2)

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
        if self.uses_rope:
            x_BTXD = step.rotation.apply(x_BTXD)
        return _rms_normalized(x_BTXD, self.norm_eps) if self.normalizes else x_BTXD


def _rms_normalized(x: Tensor, eps: float) -> Tensor:
    """Each head divided by its root mean square, in fp32; no weight."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)).type_as(x)
