"""Keys and values of tokens already computed, and how many bytes they take.

Columns count along the padded sequence. A RoPE layer attends to the current chunk only: what a token in column c may
see lies in columns (c - attention_chunk_size, c], whatever the padding of its row. So such a layer has room for one
chunk, and column c lies in place c modulo `attention_chunk_size`: with a context much longer than a chunk, three layers
of four take next to nothing. A NoPE layer keeps every column, in order.

Room is allocated in blocks that never move. The first has what was asked for, and where that does not suffice each
further one has an eighth of what there is. So nothing is ever copied, there is no peak while a cache grows, and what
is allocated follows from the number of columns: `cache_bytes` says it without allocating anything.

Shape letters: B batch, D head dimension, G key-value heads, S columns, T new columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.config import TextConfig
from llama4_quant.errors import UsageError
from llama4_quant.ops.native_attention import Piece
from llama4_quant.runtime.cache_formats import CacheDtype, CacheScales, LayerFormat, Stored

_GROWTH = 256
"""Blocks after the first have multiples of so many columns."""


def first_visible_column(padding: int, column: int, chunk_size: int | None) -> int:
    """The first column that a row's token in `column` may see.

    Args:
        padding: columns of padding on the left of that row.
        column: of the token; inside the padding it counts as the row's first token.
        chunk_size: positions per chunk, or None when it may see everything before it.
    """
    if chunk_size is None:
        return padding
    return padding + max(0, column - padding) // chunk_size * chunk_size


def allocated_columns(num_columns: int, reserved: int, window: int | None) -> Iterator[int]:
    """Sizes of the blocks that a layer has once it has stored `num_columns` columns.

    Args:
        num_columns: stored.
        reserved: columns asked for at the start.
        window: columns of a layer that keeps no more; None for one that keeps all.
    """
    needed = num_columns if window is None else min(num_columns, window)
    total = reserved if window is None else min(reserved, window)
    yield total
    while total < needed:
        size = -(-max(1, total // 8) // _GROWTH) * _GROWTH
        if window is not None:
            size = min(size, window - total)
        total += size
        yield size


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyValues:
    """Keys and values [B, G, S, D] of consecutive columns, as attention takes them.

    Attributes:
        start: the first column.
    """

    start: int
    keys: Tensor
    values: Tensor

    @property
    def stop(self) -> int:
        """The column after the last."""
        return self.start + self.keys.shape[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Places [start, stop) of a layer."""

    start: int
    stop: int
    keys: Stored
    values: Stored

    def piece(self, places: slice) -> Piece:
        """Some of its columns, as a kernel takes them; `places` count from `start`."""
        keys, values = self.keys, self.values
        return Piece.of(keys.codes, values.codes, keys.scales, values.scales, places.start, places.stop)


class LayerCache:
    """Keys and values of one layer.

    Attributes:
        format: how they are stored.
        first: the oldest column that is still there.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        layer_format: LayerFormat,
        device: torch.device,
        *,
        reserved: int,
        window: int | None,
    ) -> None:
        """Allocate.

        Args:
            shape: [B, G, D].
            layer_format: how keys and values are stored.
            device: where.
            reserved: columns to allocate now.
            window: keep no more than so many columns; None keeps all.
        """
        self.format = layer_format
        self.first = 0
        self._shape, self._device, self._reserved, self._window = shape, device, reserved, window
        self._blocks: list[Block] = []
        self._make_room(0)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return sum(block.keys.num_bytes + block.values.num_bytes for block in self._blocks)

    def decoded_column_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a column's keys and values, of all rows, in `dtype`."""
        batch, heads, dim = self._shape
        return 2 * batch * heads * dim * dtype.itemsize

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Stored, Stored]:
        """New keys and values [B, G, T, D] as `store` takes them."""
        return self.format.key.encode(keys), self.format.value.encode(values)

    def decode(self, start: int, new: tuple[Stored, Stored], dtype: torch.dtype) -> KeyValues:
        """Encoded keys and values as attention takes them, as if they had been stored from column `start` on."""
        keys, values = new
        return KeyValues(
            start=start, keys=self.format.key.decode(keys, dtype), values=self.format.value.decode(values, dtype)
        )

    def store(self, start: int, new: tuple[Stored, Stored]) -> None:
        """Store encoded keys and values from column `start` on; a window keeps the last of them."""
        keys, values = new
        stop = start + keys.codes.shape[2]
        kept = start if self._window is None else max(start, stop - self._window)
        self.claim(stop)
        for column, block, places in self._places(kept, stop):
            part = slice(column - start, column - start + places.stop - places.start)
            block.keys.part(places).copy_(keys.part(part))
            block.values.part(places).copy_(values.part(part))

    def claim(self, stop: int) -> None:
        """Make room for columns up to `stop`, to be filled before anything is read; a window forgets the oldest."""
        self._make_room(stop)
        if self._window is not None:
            self.first = max(self.first, stop - self._window)

    def stored(self, start: int, stop: int) -> Iterator[tuple[int, Stored, Stored]]:
        """Columns [start, stop) as they are stored, in pieces, in order: the first column, keys, values.

        Raises:
            UsageError: some are no longer there, because a step failed half-way through the layers.
        """
        self._check_kept(start)
        for column, block, places in self._places(start, stop):
            yield column, block.keys.part(places), block.values.part(places)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Columns [start, stop) as a kernel takes them, in order.

        Raises:
            UsageError: as of `stored`.
        """
        self._check_kept(start)
        return [block.piece(places) for _, block, places in self._places(start, stop)]

    def _check_kept(self, start: int) -> None:
        if start < self.first:
            raise UsageError(
                f"the cache holds columns from {self.first} on, and column {start} is needed: an earlier call failed "
                "after it had replaced them; compute the sequence again in a new cache"
            )

    def read(
        self, start: int, stop: int, dtype: torch.dtype, *, rows: slice = slice(None), max_columns: int
    ) -> Iterator[KeyValues]:
        """Columns [start, stop) of some rows in pieces, in order.

        Args:
            start: the first column.
            stop: after the last.
            dtype: of what is read. What is stored in it is read as views; else pieces are decoded when their turn
                comes, and have at most `max_columns`.
            rows: of the batch.
            max_columns: bounds the memory for a piece that is decoded.

        Raises:
            UsageError: as of `stored`.
        """
        step = stop - start if self.format.key.dtype == dtype else max_columns
        for column, keys, values in self.stored(start, stop):
            size = keys.codes.shape[2]
            for first in range(0, size, step):
                part = slice(first, min(first + step, size))
                yield self.decode(column + first, (keys.part(part, rows), values.part(part, rows)), dtype)

    def _places(self, start: int, stop: int) -> Iterator[tuple[int, Block, slice]]:
        """Where columns [start, stop) lie: first column, block, and places in it."""
        column = start
        while column < stop:
            place = column if self._window is None else column % self._window
            block = next(block for block in self._blocks if place < block.stop)
            size = min(stop - column, block.stop - place)
            yield column, block, slice(place - block.start, place - block.start + size)
            column += size

    def _make_room(self, num_columns: int) -> None:
        sizes = list(allocated_columns(num_columns, self._reserved, self._window))
        batch, heads, dim = self._shape
        for size in sizes[len(self._blocks) :]:
            start = self._blocks[-1].stop if self._blocks else 0
            keys, values = (
                kind.allocate((batch, heads, size, dim), self._device) for kind in (self.format.key, self.format.value)
            )
            self._blocks.append(Block(start=start, stop=start + size, keys=keys, values=values))


class KVCache:
    """The cache of a whole model, for one batch of sequences.

    Attributes:
        length: columns computed so far, padding included.
        padding: columns of padding on the left of each row.
        layers: one cache per decoder layer.
    """

    def __init__(
        self,
        config: TextConfig,
        batch_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int = 256,
        kind: CacheDtype = CacheDtype.AUTO,
        scales: Sequence[CacheScales | None] | None = None,
    ) -> None:
        """Allocate room for `capacity` columns per row; more is allocated when needed.

        Args:
            config: the decoder.
            batch_size: rows.
            dtype: the model's.
            device: where.
            capacity: columns.
            kind: how keys and values are kept.
            scales: of each layer, for FP8; None for none.
        """
        self.length = 0
        self.padding = (0,) * batch_size
        self._chunk_sizes = _chunk_sizes(config)
        shape = (batch_size, config.num_key_value_heads, config.head_dim)
        self.layers = tuple(
            LayerCache(shape, LayerFormat.choose(kind, dtype, own_scales), device, reserved=capacity, window=chunk_size)
            for chunk_size, own_scales in zip(self._chunk_sizes, scales or [None] * len(self._chunk_sizes), strict=True)
        )

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.padding)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys and values of all layers."""
        return sum(layer.num_bytes for layer in self.layers)

    def advance(self, num_columns: int, padding: tuple[int, ...]) -> None:
        """Count `num_columns` as computed, now that every layer has stored them.

        Args:
            num_columns: columns that every layer stored since the last call.
            padding: each row's columns of padding on the left, those of earlier steps included.
        """
        self.length += num_columns
        self.padding = padding

    def rewind(self, length: int) -> bool:
        """Forget the columns from `length` on, if all that a token in column `length` may see is still there.

        Returns:
            Whether that was so; if not, nothing has changed: a layer with chunks keeps one chunk's columns only.
        """
        oldest = (
            min(first_visible_column(pad, length, chunk_size) for pad in self.padding)
            for chunk_size in self._chunk_sizes
        )
        if length > self.length or any(layer.first > column for layer, column in zip(self.layers, oldest, strict=True)):
            return False
        self.length = length
        return True


def cache_bytes(
    config: TextConfig,
    num_tokens: int,
    *,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    kind: CacheDtype = CacheDtype.AUTO,
    has_scales: bool = False,
    capacity: int | None = None,
) -> int:
    """Bytes that a cache has allocated once `num_tokens` columns are in it; before, it has no more.

    That does not depend on how many columns are computed at a time.

    Args:
        config: the decoder.
        num_tokens: columns, padding included.
        batch_size: rows.
        dtype: the model's.
        kind: how keys and values are kept.
        has_scales: the checkpoint has scales for FP8.
        capacity: as given to `KVCache`; None for `num_tokens`.
    """
    reserved = num_tokens if capacity is None else capacity
    num_columns = sum(sum(allocated_columns(num_tokens, reserved, window)) for window in _chunk_sizes(config))
    layer_format = LayerFormat.choose(kind, dtype, CacheScales(key=1.0, value=1.0) if has_scales else None)
    return num_columns * batch_size * config.num_key_value_heads * layer_format.column_bytes(config.head_dim)


def _chunk_sizes(config: TextConfig) -> list[int | None]:
    return [config.attention_chunk_size if uses_rope else None for uses_rope in config.rope_layers]
