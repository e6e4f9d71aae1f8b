"""Where a layer's keys, or its values, are kept: as they are, or as codes of one byte.

FP8 codes have the checkpoint's scale, one for the layer, if it has such scales (`kv_cache_scheme`), else one for each
token and head; int8 codes have one for each token and head. What attention gets is codes times scale in the model's
dtype, of the new tokens too: one layer's keys and values at a time.

Shape letters: B batch, C capacity, D head dimension, G key-value heads, S columns kept, T new columns.
"""

from enum import StrEnum

import torch
from torch import Tensor

from llama4_quant.errors import UsageError
from llama4_quant.ops.reference import FP8_MAX
from llama4_quant.ops.torch_cpu import fp8_to_bf16

_INT8_MAX = 127.0


class CacheDtype(StrEnum):
    """How keys and values are kept."""

    AUTO = "auto"
    """In the model's dtype."""
    FP8 = "fp8"
    INT8 = "int8"

    @classmethod
    def parse(cls, name: str) -> "CacheDtype":
        """Look up by name.

        Raises:
            UsageError: unknown; lists the known ones.
        """
        if name not in set(cls):
            raise UsageError(f"KV cache dtype {name!r} is unknown; use one of {', '.join(cls)}")
        return cls(name)

    def column_bytes(self, dtype: torch.dtype, head_dim: int, *, has_scale: bool = False) -> int:
        """Bytes of one head's keys of one token.

        Args:
            dtype: the model's.
            head_dim: D.
            has_scale: FP8 with a scale for the whole layer.
        """
        if self is CacheDtype.AUTO:
            return head_dim * dtype.itemsize
        return head_dim + (0 if self is CacheDtype.FP8 and has_scale else torch.float32.itemsize)


class PlainBuffer:
    """[B, G, C, D] in the model's dtype."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._values = torch.empty(shape, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self._values.nbytes

    def put(self, start: int, values: Tensor) -> None:
        """Store [B, G, T, D] from column `start` on."""
        self._values[:, :, start : start + values.shape[2]] = values

    def get(self, stop: int) -> Tensor:
        """The columns before `stop`: [B, G, S, D]."""
        return self._values[:, :, :stop]

    def move(self, kept: slice, capacity: int) -> None:
        """Have room for `capacity` columns, of which the first are the `kept` ones."""
        self._values = _moved(self._values, kept, capacity)


class CodedBuffer:
    """Codes [B, G, C, D] of one byte; scales [B, G, C, 1] in float32, or one number."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        kind: CacheDtype,
        scale: float | None = None,
    ) -> None:
        """Allocate.

        Args:
            shape: [B, G, C, D].
            dtype: the model's.
            device: where.
            kind: FP8 or INT8.
            scale: of all FP8 codes; None for one of each token and head.
        """
        self._dtype, self._scale = dtype, scale if kind is CacheDtype.FP8 else None
        self._most = FP8_MAX if kind is CacheDtype.FP8 else _INT8_MAX
        code_dtype = torch.float8_e4m3fn if kind is CacheDtype.FP8 else torch.int8
        self._codes = torch.empty(shape, dtype=code_dtype, device=device)
        scales = (*shape[:3], 1) if self._scale is None else (0,)
        self._scales = torch.empty(scales, dtype=torch.float32, device=device)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self._codes.nbytes + self._scales.nbytes

    def put(self, start: int, values: Tensor) -> None:
        """Store [B, G, T, D] from column `start` on."""
        columns = slice(start, start + values.shape[2])
        if self._scale is not None:
            self._codes[:, :, columns] = self._encoded(values / self._scale)
            return
        x_BGTD = values.float()
        scale = x_BGTD.abs().amax(dim=-1, keepdim=True) / self._most
        scale = torch.where(scale == 0, 1.0, scale)
        self._codes[:, :, columns] = self._encoded(x_BGTD / scale)
        self._scales[:, :, columns] = scale

    def get(self, stop: int) -> Tensor:
        """The columns before `stop`: [B, G, S, D], decoded."""
        codes = self._codes[:, :, :stop]
        is_fp8_on_cpu = codes.dtype is torch.float8_e4m3fn and codes.device.type == "cpu"
        numbers = fp8_to_bf16(codes) if is_fp8_on_cpu else codes  # exact, and several times faster than torch's cast
        if self._scale is not None:
            return numbers.to(self._dtype) * self._scale
        return (numbers.float() * self._scales[:, :, :stop]).to(self._dtype)

    def move(self, kept: slice, capacity: int) -> None:
        """Have room for `capacity` columns, of which the first are the `kept` ones."""
        self._codes = _moved(self._codes, kept, capacity)
        if self._scale is None:
            self._scales = _moved(self._scales, kept, capacity)

    def _encoded(self, quotients: Tensor) -> Tensor:
        bounded = quotients.clamp(-self._most, self._most)
        return (bounded.round() if self._codes.dtype is torch.int8 else bounded).to(self._codes.dtype)


def _moved(buffer: Tensor, kept: slice, capacity: int) -> Tensor:
    """A buffer of `capacity` columns that starts with the `kept` ones."""
    batch, heads, _, dim = buffer.shape
    moved = buffer.new_empty(batch, heads, capacity, dim)
    moved[:, :, : kept.stop - kept.start] = buffer[:, :, kept]
    return moved
