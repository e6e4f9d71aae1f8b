"""Attention over part of the keys, and how parts make up the whole.

A softmax over many keys is a weighted mean of softmaxes over parts of them; the weights follow from each part's
log-sum-exp (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135). So keys may lie in
several places and be decoded part by part, and a causal square needs no mask beside the rectangle of keys before it.

Shape letters: B batch, D head dimension, G key-value heads, H query heads (a multiple of G), S keys, T queries.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional

SCORE_ELEMENTS = 1 << 24
"""Scores that `products` computes at a time, in float32: 64 MiB."""


class Arguments(TypedDict):
    """Of `fused`, `whole` and `products`.

    Attributes:
        q: [B, H, T, D].
        k: [B, G, S, D].
        v: [B, G, S, D].
        bias: [B, 1, 1, S], added to the scores; or None.
        is_causal: S is T, and each query sees the keys up to its own.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    is_causal: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Partial:
    """What the queries make of some keys.

    Attributes:
        output: softmax(Q K^T) V over these keys, [B, H, T, D].
        log_sum: logarithm of the sum of exponentials of the scores, float32 [B, H, T].
    """

    output: Tensor
    log_sum: Tensor


def merged(parts: Iterable[Partial]) -> Tensor:
    """Attention over all keys, [B, H, T, D], from that over parts of them; computed in float32, one part at a time."""
    output: Tensor | None = None
    log_sum: Tensor | None = None
    dtype = torch.float32
    for part in parts:
        if output is None or log_sum is None:
            output, log_sum, dtype = part.output, part.log_sum, part.output.dtype
            continue
        total = torch.logaddexp(log_sum, part.log_sum)
        new_weight = (part.log_sum - total).exp().unsqueeze(-1)
        output = (output * (log_sum - total).exp().unsqueeze(-1)).addcmul_(part.output.float(), new_weight)
        log_sum = total
    assert output is not None, "attention to no keys at all"
    return output.to(dtype)


def fused(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, is_causal: bool = False) -> Partial:
    """By torch's fused kernel: no scores in memory. On processors only: elsewhere torch keeps the log-sum to itself."""
    mask = None if bias is None else bias.to(q.dtype)
    output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001 - no public one
        q, k, v, 0.0, is_causal, attn_mask=mask
    )
    return Partial(output=output, log_sum=log_sum)


def whole(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Attention to all keys at once, [B, H, T, D], by the best kernel that torch has for the device."""
    mask = None if bias is None else bias.to(q.dtype)
    return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)


def products(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, is_causal: bool = False) -> Partial:
    """By matrix products and a softmax in float32, for a block of queries at a time."""
    num_rows, num_queries = q.shape[0] * q.shape[1], q.shape[2]
    size = max(1, SCORE_ELEMENTS // (num_rows * k.shape[2]))
    outputs, log_sums = [], []
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        last = stop if is_causal else k.shape[2]
        scores = _scores(q[:, :, start:stop], k[:, :, :last])
        if bias is not None:
            scores = scores + bias
        if is_causal:
            hidden = torch.ones(stop - start, last, dtype=torch.bool, device=q.device).triu(start + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        log_sums.append(scores.logsumexp(dim=-1))
        weights = scores.softmax(dim=-1).type_as(v)
        outputs.append(_by_group(weights, v.shape[1]).matmul(v[:, :, :last]).view(*scores.shape[:-1], v.shape[-1]))
    return Partial(output=torch.cat(outputs, dim=2), log_sum=torch.cat(log_sums, dim=2))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Q K^T / sqrt(D), float32 [B, H, T, S]."""
    scores = _by_group(q, k.shape[1]).matmul(k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
    return scores.view(*q.shape[:-1], k.shape[2])


def _by_group(x: Tensor, num_groups: int) -> Tensor:
    """[B, H, T, N] -> [B, G, H / G * T, N]: one product for all heads that share keys, which are not copied."""
    return x.reshape(x.shape[0], num_groups, -1, x.shape[-1])
