"""Attention by torch's `flex_attention`: a kernel compiled for who sees whom, which skips blocks that nobody sees.

It takes all keys that a step sees in one piece, so what lies in several places is put together first, layer by layer.
The mask is never written out: the kernel gets the blocks of keys that each block of queries sees in full or in part,
and a function for the latter. Padding and columns are tensors of that function, so nothing is compiled anew as they
change.

Shape letters: B batch, D head dimension, G key-value heads, H query heads, I blocks of queries, J blocks of keys,
S keys, T queries.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.fx.experimental import _config as shape_config
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from llama4_quant.errors import UsageError
from llama4_quant.runtime.cache import KeyValues

_BLOCK = 128
_EVERYTHING = 1 << 40
"""Positions of the one chunk of a layer without chunks."""
_MAX_COMPILED = 64
"""A kernel for each dtype, head dimension, and whether there is one query or more, one row or more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visible:
    """Who sees whom: queries are the last columns of [key_start, stop)."""

    key_start: int
    stop: int
    mask: BlockMask


def plan(padding: Sequence[int], past: int, new: int, chunk_size: int | None, device: torch.device) -> Visible:
    """Who sees whom when columns [past, past + new) are computed; arguments as of `visibility.plan_segments`.

    A query that is padding sees itself.
    """
    chunk = chunk_size or _EVERYTHING
    pad_B = torch.tensor(padding, device=device)
    first_B = torch.minimum(_first_seen(torch.full_like(pad_B, past), pad_B, chunk), torch.tensor(past, device=device))
    key_start, stop = int(first_B.min()), past + new
    starts = torch.tensor([past, key_start, chunk], device=device)

    def sees(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        column, key_column, pad = query + starts[0], key + starts[1], pad_B[b]
        in_chunk = (key_column - pad) // starts[2] == (column - pad) // starts[2]
        return ((key_column <= column) & (key_column >= pad) & in_chunk) | (key_column == column)

    partial_BIJ, full_BIJ = (_at_least_two(blocks) for blocks in _blocks(pad_B, (past, stop), key_start, chunk))
    mask = BlockMask.from_kv_blocks(
        *_listed(partial_BIJ),
        *_listed(full_BIJ),
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(new, stop - key_start),
        compute_q_blocks=False,  # for gradients only
    )
    return Visible(key_start=key_start, stop=stop, mask=mask)


def _first_seen(column: Tensor, pad: Tensor, chunk: int) -> Tensor:
    """As `cache.first_visible_column`, for tensors."""
    return pad + (column - pad).clamp(min=0) // chunk * chunk


def _blocks(pad_B: Tensor, columns: tuple[int, int], key_start: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Which blocks of keys some query of a block sees, but not each all of them; and which each sees fully: [B, I, J].

    From query to query the first key that is seen does not go back and the last one moves on by one, so what the
    queries of a block see is [first key of the first, last query].
    """
    past, stop = columns
    pad = pad_B.view(-1, 1, 1)
    first_query = torch.arange(past, stop, _BLOCK, device=pad_B.device).view(1, -1, 1)
    last_query = (first_query + _BLOCK - 1).clamp(max=stop - 1)
    first_key = torch.arange(key_start, stop, _BLOCK, device=pad_B.device).view(1, 1, -1)
    last_key = (first_key + _BLOCK - 1).clamp(max=stop - 1)
    seen = (first_key <= last_query) & (last_key >= torch.minimum(_first_seen(first_query, pad, chunk), first_query))
    full = (last_key <= first_query) & (first_key >= _first_seen(last_query, pad, chunk))
    return seen & ~full, full


def _at_least_two(blocks_BIJ: Tensor) -> Tensor:
    """With blocks that nobody sees, since a kernel for one block is another one than that for many."""
    _, num_queries, num_keys = blocks_BIJ.shape
    return functional.pad(blocks_BIJ, (0, max(0, 2 - num_keys), 0, max(0, 2 - num_queries)))


def _listed(chosen_BIJ: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks are chosen, int32 [B, 1, I], and all blocks with these first, int32 [B, 1, I, J]."""
    order = chosen_BIJ.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return chosen_BIJ.sum(dim=-1, dtype=torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)


def attend(q_BHTD: Tensor, pieces: Sequence[KeyValues], visible: Visible) -> Tensor:
    """Attention of T queries to the keys of `visible`, which come in consecutive pieces: [B, H, T, D].

    Raises:
        UsageError: flex_attention does not work here.
    """
    require(q_BHTD.device, q_BHTD.dtype)
    keys = [piece.keys for piece in pieces]
    values = [piece.values for piece in pieces]
    k_BGSD, v_BGSD = (kind[0] if len(kind) == 1 else torch.cat(kind, dim=2) for kind in (keys, values))
    return _run(q_BHTD, k_BGSD, v_BGSD, visible.mask)


def require(device: torch.device, dtype: torch.dtype) -> None:
    """Make sure that flex_attention works.

    Raises:
        UsageError: it does not; says why.
    """
    reason = _why_not(device.type, dtype)
    if reason is not None:
        raise UsageError(
            f"attention 'flex' does not work on {device.type} in {str(dtype).removeprefix('torch.')}: {reason}; "
            "use sdpa or eager"
        )


@functools.cache
def _why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Try it: on a processor it takes a C++ compiler and instructions that the compiler's output uses."""
    device = torch.device(device_type)
    q, kv = torch.ones(2, 4, 2, 16, dtype=dtype, device=device), torch.ones(2, 2, 2, 16, dtype=dtype, device=device)
    try:
        y = _run(q, kv, kv, plan((0, 0), 0, 2, None, device).mask)
    except Exception as error:  # noqa: BLE001 - whatever compiling may raise is the reason
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
    return None if torch.equal(y, q) else "it computes wrong results"


def _run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    # Sizes that happen to be equal when a kernel is compiled need not be so later: no "duck shapes".
    with torch._dynamo.config.patch(recompile_limit=_MAX_COMPILED), shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # noqa: SLF001
        return _compiled()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # Checks of indices that are tensors become C++ that does not compile (torch 2.13, batches of several rows); ours
    # are numbers of rows.
    options: dict[str, str | int | bool | Callable[..., object]] = {"assert_indirect_indexing": False}
    return cast("Callable[..., Tensor]", torch.compile(flex_attention, dynamic=True, options=options))
