"""Keys and values of tokens already computed.

Each layer keeps a buffer [B, G, capacity, D] for its keys and one for its values (cache_buffers.py). Columns count
along the padded sequence. A RoPE layer attends to the current chunk only, so once a chunk is behind every row of the
batch its columns are forgotten: with a context much longer than `attention_chunk_size`, three layers of four hold no
more than one chunk and what is computed at a time.
Buffers of layers that see everything grow by doubling where it is not known ahead how long they get; how large all of
them are at any time is what `Capacity` says, which `cache_bytes` asks without allocating anything.

Shape letters: B batch, D head dimension, G key-value heads, S columns kept, T new columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.config import TextConfig
from llama4_quant.ops.reference import round_fp8
from llama4_quant.runtime.cache_buffers import CacheDtype, CodedBuffer, PlainBuffer


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheScales:
    """Scales of one layer's FP8 cache: keys and values are kept as multiples of these.

    Here they are rounded to what such a cache can hold, and stay in the model's dtype.
    """

    key: float
    value: float

    def round(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they come out of the cache."""
        return round_fp8(keys, self.key), round_fp8(values, self.value)


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


GROWTH = 256
"""Columns by which buffers of chunked layers grow."""


@dataclass(slots=True)
class Capacity:
    """How many columns a layer's buffer has room for, as columns come and go.

    Attributes:
        chunk_size: of a layer that forgets, or None.
        least: never less; room from the start.
        columns: the present room.
        first: the oldest column kept.
    """

    chunk_size: int | None
    least: int
    columns: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        self.least = min(self.least, self.chunk_size or self.least)
        self.columns = self.least

    def make_room(self, length: int) -> bool:
        """Have room for columns up to `length`; whether there has to be a larger buffer."""
        needed = length - self.first
        if needed <= self.columns:
            return False
        self.columns = max(needed, 2 * self.columns) if self.chunk_size is None else -(-needed // GROWTH) * GROWTH
        return True

    def forget_before(self, column: int, length: int) -> bool:
        """Keep the columns from `column` on of `length`; whether the buffer changes."""
        if column <= self.first:
            return False
        self.first, self.columns = column, max(length - column, self.least)
        return True


class LayerCache:
    """Keys and values of one layer, for columns from `first` on."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        capacity: Capacity,
        dtype: torch.dtype,
        device: torch.device,
        *,
        kind: CacheDtype = CacheDtype.AUTO,
        scales: CacheScales | None = None,
    ) -> None:
        """Allocate.

        Args:
            shape: [B, G, D].
            capacity: of the layer.
            dtype: the model's.
            device: where.
            kind: how keys and values are kept.
            scales: the checkpoint's, for FP8.
        """
        batch, heads, dim = shape
        self._capacity = capacity
        self._keys, self._values = (
            PlainBuffer((batch, heads, capacity.columns, dim), dtype, device)
            if kind is CacheDtype.AUTO
            else CodedBuffer((batch, heads, capacity.columns, dim), dtype, device, kind=kind, scale=scale)
            for scale in ((None, None) if scales is None else (scales.key, scales.value))
        )

    @property
    def first(self) -> int:
        """The oldest column kept."""
        return self._capacity.first

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self._keys.num_bytes + self._values.num_bytes

    def append(self, keys: Tensor, values: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Store columns [past, past + T) and give everything from `first` on.

        Args:
            keys: [B, G, T, D].
            values: [B, G, T, D].
            past: columns stored before; later ones, left by a step that failed, are overwritten.

        Returns:
            The keys and values [B, G, S, D] kept, new ones included: views, or of codes what they stand for.
        """
        start, stop = past - self.first, past - self.first + keys.shape[2]
        if self._capacity.make_room(past + keys.shape[2]):
            self._move(slice(0, start))
        self._keys.put(start, keys)
        self._values.put(start, values)
        return self._keys.get(stop), self._values.get(stop)

    def forget_before(self, column: int, length: int) -> None:
        """Drop the columns before `column` of `length` columns, and the memory that only they needed."""
        first = self.first
        if self._capacity.forget_before(column, length):
            self._move(slice(column - first, length - first))

    def _move(self, kept: slice) -> None:
        self._keys.move(kept, self._capacity.columns)
        self._values.move(kept, self._capacity.columns)


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
        self.layers = tuple(
            LayerCache(
                (batch_size, config.num_key_value_heads, config.head_dim),
                Capacity(chunk_size, capacity),
                dtype,
                device,
                kind=kind,
                scales=layer_scales,
            )
            for chunk_size, layer_scales in zip(
                self._chunk_sizes, scales or [None] * len(self._chunk_sizes), strict=True
            )
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
        """Count `num_columns` as computed, now that every layer has stored them; forget what nobody will see again.

        Args:
            num_columns: columns that every layer appended since the last call.
            padding: each row's columns of padding on the left, those of earlier steps included.
        """
        self.length += num_columns
        self.padding = padding
        for layer, chunk_size in zip(self.layers, self._chunk_sizes, strict=True):
            if chunk_size is not None:
                oldest = min(first_visible_column(pad, self.length, chunk_size) for pad in padding)
                layer.forget_before(oldest, self.length)

    def rewind(self, length: int) -> bool:
        """Forget the columns from `length` on, if all that a token in column `length` may see is still there.

        Returns:
            Whether that was so; if not, nothing has changed: a layer with chunks keeps the newest chunk only.
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
    prefill_chunk_size: int | None = None,
    capacity: int | None = None,
) -> int:
    """The most bytes that a cache has allocated while `num_tokens` columns without padding go in.

    Args:
        config: the decoder.
        num_tokens: columns.
        batch_size: rows.
        dtype: the model's.
        kind: how keys and values are kept.
        has_scales: the checkpoint has scales for FP8.
        prefill_chunk_size: columns computed at a time, counted from the first; None for all at once.
        capacity: as given to `KVCache`; None for `num_tokens`.

    While a buffer grows, the old one is there too; with enough `capacity` none does but those of chunked layers.
    """
    step = prefill_chunk_size or max(1, num_tokens)
    layers = [Capacity(chunk_size, capacity or num_tokens) for chunk_size in _chunk_sizes(config)]
    most = sum(layer.columns for layer in layers)
    for start in range(0, num_tokens, step):
        length = min(start + step, num_tokens)
        for layer in layers:
            layer.make_room(length)
        most = max(most, sum(layer.columns for layer in layers))
        for layer in layers:
            if layer.chunk_size is not None:
                layer.forget_before(first_visible_column(0, length, layer.chunk_size), length)
    num_bytes = kind.column_bytes(dtype, config.head_dim, has_scale=has_scales)
    return 2 * most * batch_size * config.num_key_value_heads * num_bytes


def _chunk_sizes(config: TextConfig) -> list[int | None]:
    return [config.attention_chunk_size if uses_rope else None for uses_rope in config.rope_layers]
