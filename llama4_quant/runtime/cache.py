"""Keys and values of tokens already computed.

Each layer keeps one buffer [B, G, capacity, D] that grows by doubling. Columns count along the padded sequence. A RoPE
layer attends to the current chunk only, so once a chunk is behind every row of the batch its columns are forgotten:
with a context much longer than `attention_chunk_size`, three layers of four hold no more than about one chunk.

Shape letters: B batch, D head dimension, G key-value heads, S columns kept, T new columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.config import TextConfig
from llama4_quant.ops.reference import round_fp8


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


class LayerCache:
    """Keys and values of one layer, for columns from `first` on."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.first = 0
        self._min_capacity = shape[2]
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty_like(self._keys)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self._keys.nbytes + self._values.nbytes

    def append(self, keys: Tensor, values: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Store columns [past, past + T) and give everything from `first` on.

        Args:
            keys: [B, G, T, D].
            values: [B, G, T, D].
            past: columns stored before; later ones, left by a step that failed, are overwritten.

        Returns:
            Views of the keys and values [B, G, S, D] kept, new ones included.
        """
        start, stop = past - self.first, past - self.first + keys.shape[2]
        capacity = self._keys.shape[2]
        if stop > capacity:
            self._move(slice(0, start), max(stop, 2 * capacity))
        self._keys[:, :, start:stop] = keys
        self._values[:, :, start:stop] = values
        return self._keys[:, :, :stop], self._values[:, :, :stop]

    def forget_before(self, column: int, length: int) -> None:
        """Drop the columns before `column` of `length` columns, and the memory that only they needed."""
        if column <= self.first:
            return
        self._move(slice(column - self.first, length - self.first), max(length - column, self._min_capacity))
        self.first = column

    def _move(self, kept: slice, capacity: int) -> None:
        self._keys = _moved(self._keys, kept, capacity)
        self._values = _moved(self._values, kept, capacity)


def _moved(buffer: Tensor, kept: slice, capacity: int) -> Tensor:
    """A buffer of `capacity` columns that starts with the `kept` ones."""
    batch, heads, _, dim = buffer.shape
    moved = buffer.new_empty(batch, heads, capacity, dim)
    moved[:, :, : kept.stop - kept.start] = buffer[:, :, kept]
    return moved


class KVCache:
    """The cache of a whole model, for one batch of sequences.

    Attributes:
        length: columns computed so far, padding included.
        padding: columns of padding on the left of each row.
        layers: one cache per decoder layer.
    """

    def __init__(
        self, config: TextConfig, batch_size: int, *, dtype: torch.dtype, device: torch.device, capacity: int = 256
    ) -> None:
        """Allocate room for `capacity` columns per row; more is allocated when needed."""
        self.length = 0
        self.padding = (0,) * batch_size
        self._chunk_sizes = [config.attention_chunk_size if uses_rope else None for uses_rope in config.rope_layers]
        self.layers = tuple(
            LayerCache(
                (batch_size, config.num_key_value_heads, min(capacity, chunk_size or capacity), config.head_dim),
                dtype,
                device,
            )
            for chunk_size in self._chunk_sizes
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
