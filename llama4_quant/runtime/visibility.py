"""Who sees whom: which keys the queries of one step may attend to.

Rows of a batch are padded on the left and do not see each other, so the queries of rows with the same padding are taken
together, chunk by chunk. Then what a query sees is everything before the new columns, back to the first key of its
chunk, and of the new columns those up to its own: a rectangle without a mask and a causal square. A single query for
each row is different: all rows are taken at once, since that is one pass over the cache, and a mask of one number per
key and row says where rows begin.

A *column* is an index along the padded sequence, cached columns included; a position is a column minus the row's
padding. Shape letters: B batch, S keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from llama4_quant.runtime.cache import first_visible_column

HIDDEN = -60000.0
"""What is added to the score of a key that is not seen: no score is as far below another, and float16 holds it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Queries in columns [start, stop) of some rows; each sees the keys in [key_start, its own column].

    Attributes:
        rows: of the batch.
        bias: of a single query: what is added to its scores, float32 [B, 1, 1, S], for keys that not every row sees.
    """

    rows: slice
    start: int
    stop: int
    key_start: int
    bias: Tensor | None = None


def plan_segments(
    padding: Sequence[int], past: int, new: int, chunk_size: int | None, device: torch.device
) -> tuple[Segment, ...]:
    """Who sees whom when columns [past, past + new) are computed; columns of padding see nothing.

    Args:
        padding: columns of padding on the left of each row.
        past: columns computed before.
        new: columns to compute now.
        chunk_size: positions per chunk, or None for full causal attention.
        device: where a mask is needed.
    """
    if new == 1:
        return (_single_query(padding, past, chunk_size, device),)
    segments = []
    for rows, pad in _alike(padding):
        segments += _of_alike_rows(rows, pad, past, past + new, chunk_size)
    return tuple(segments)


def _alike(padding: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Rows beside each other that have the same padding."""
    start = 0
    for pad, group in groupby(padding):
        stop = start + len(list(group))
        yield slice(start, stop), pad
        start = stop


def _of_alike_rows(rows: slice, pad: int, past: int, stop: int, chunk_size: int | None) -> list[Segment]:
    start = max(past, pad)
    if start >= stop:
        return []
    borders = [start, stop]
    if chunk_size is not None:
        first_border = first_visible_column(pad, start, chunk_size) + chunk_size
        borders = [start, *range(first_border, stop, chunk_size), stop]
    return [
        Segment(rows=rows, start=first, stop=last, key_start=first_visible_column(pad, first, chunk_size))
        for first, last in pairwise(borders)
    ]


def _single_query(padding: Sequence[int], column: int, chunk_size: int | None, device: torch.device) -> Segment:
    # A query that is padding sees itself, for a softmax over nothing is NaN; its result goes nowhere.
    first = [min(first_visible_column(pad, column, chunk_size), column) for pad in padding]
    key_start, rows = min(first), slice(0, len(padding))
    bias = None
    if any(start != key_start for start in first):
        keys = torch.arange(key_start, column + 1, device=device)
        starts = torch.tensor(first, device=device).unsqueeze(1)
        bias = torch.zeros(len(first), keys.numel(), device=device).masked_fill(keys < starts, HIDDEN)[:, None, None]
    return Segment(rows=rows, start=column, stop=column + 1, key_start=key_start, bias=bias)
