"""How keys and values are stored in the cache: as numbers, or as codes of one byte with scales.

Scales are either static, one for the keys of a layer and one for its values, as calibration writes them into a
checkpoint (FP8 only), or belong to one token of one head: the largest of its D magnitudes is the largest code. Such a
scale is a bf16 number, and codes are chosen against that number.

Shape letters: B batch, D head dimension, G key-value heads, S columns.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from llama4_quant.errors import UsageError
from llama4_quant.ops.reference import FP8_MAX, round_fp8
from llama4_quant.ops.torch_cpu import fp8_to_bf16

_INT8_MAX = 127
_TOKEN_SCALE_DTYPE = torch.bfloat16


class CacheDtype(StrEnum):
    """How keys and values are kept: what a user may ask for."""

    AUTO = "auto"
    """FP8 for a checkpoint that has scales for it, else the model's dtype."""
    BF16 = "bf16"
    FP8 = "fp8"
    """e4m3, with the checkpoint's scales, or else a scale per token and head."""
    INT8 = "int8"
    """A scale per token and head."""

    @classmethod
    def parse(cls, name: str) -> "CacheDtype":
        """Look up by name.

        Raises:
            UsageError: unknown; lists the known ones.
        """
        if name not in set(cls):
            raise UsageError(f"KV cache dtype {name!r} is unknown; use one of {', '.join(cls)}")
        return cls(name)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheScales:
    """Scales of one layer's FP8 cache: keys and values are kept as multiples of these."""

    key: float
    value: float

    def round(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they come out of the cache."""
        return round_fp8(keys, self.key), round_fp8(values, self.value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Keys or values as they are stored: numbers or codes [B, G, S, D]; scales [B, G, S, 1] or None."""

    codes: Tensor
    scales: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def part(self, columns: slice, rows: slice = slice(None)) -> "Stored":
        """A view of some columns of some rows."""
        scales = None if self.scales is None else self.scales[rows, :, columns]
        return Stored(codes=self.codes[rows, :, columns], scales=scales)

    def copy_(self, other: "Stored") -> None:
        """Take over another's content."""
        self.codes.copy_(other.codes)
        if self.scales is not None and other.scales is not None:
            self.scales.copy_(other.scales)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFormat:
    """How the keys, or the values, of one layer are stored.

    Attributes:
        dtype: of a number, or of a code.
        scale: of all codes; None for numbers, and where each token has a scale of its own.
    """

    dtype: torch.dtype
    scale: float | None = None

    @property
    def has_token_scales(self) -> bool:
        """Whether each token of each head has a scale."""
        return self.dtype.itemsize == 1 and self.scale is None

    def column_bytes(self, head_dim: int) -> int:
        """Bytes that one token of one head takes."""
        return head_dim * self.dtype.itemsize + (_TOKEN_SCALE_DTYPE.itemsize if self.has_token_scales else 0)

    def allocate(self, shape: tuple[int, int, int, int], device: torch.device) -> Stored:
        """Uninitialized room for [B, G, S, D]."""
        scales = None
        if self.has_token_scales:
            scales = torch.empty(*shape[:3], 1, dtype=_TOKEN_SCALE_DTYPE, device=device)
        return Stored(codes=torch.empty(shape, dtype=self.dtype, device=device), scales=scales)

    def encode(self, x_BGSD: Tensor) -> Stored:
        """Numbers as they are stored; those beyond a static scale's range saturate."""
        if self.scale is not None:
            return Stored(codes=self._rounded(x_BGSD / self.scale), scales=None)
        if not self.has_token_scales:
            return Stored(codes=x_BGSD.to(self.dtype), scales=None)
        x32 = x_BGSD.float()
        scales = (x32.abs().amax(dim=-1, keepdim=True) / self._largest).to(_TOKEN_SCALE_DTYPE)
        # A token of zeros, or of less than any scale, becomes codes of zero.
        divisors = torch.where(scales == 0, 1.0, scales.float())
        return Stored(codes=self._rounded(x32 / divisors), scales=scales)

    def decode(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """What was stored, in `dtype`: the stored tensor itself if it is that, else a new one."""
        codes = stored.codes
        if self.dtype.itemsize > 1:
            return codes.to(dtype)
        if codes.device.type == "cpu" and self.dtype is torch.float8_e4m3fn:
            codes = fp8_to_bf16(codes)  # exact, and several times as fast as torch's cast
        scale = self.scale if stored.scales is None else stored.scales.to(dtype)
        assert scale is not None
        return codes.to(dtype).mul_(scale)

    @property
    def _largest(self) -> float:
        return FP8_MAX if self.dtype.is_floating_point else _INT8_MAX

    def _rounded(self, multiples: Tensor) -> Tensor:
        bounded = multiples.clamp(-self._largest, self._largest)
        return (bounded if self.dtype.is_floating_point else bounded.round()).to(self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFormat:
    """How one layer's keys and values are stored."""

    key: CacheFormat
    value: CacheFormat

    @classmethod
    def choose(cls, wanted: CacheDtype, model_dtype: torch.dtype, scales: CacheScales | None) -> "LayerFormat":
        """What a wish comes to for a layer with such scales in its checkpoint, or with none."""
        if wanted is CacheDtype.FP8 or (wanted is CacheDtype.AUTO and scales is not None):
            key, value = (None, None) if scales is None else (scales.key, scales.value)
            fp8 = torch.float8_e4m3fn
            return cls(key=CacheFormat(dtype=fp8, scale=key), value=CacheFormat(dtype=fp8, scale=value))
        dtypes = {CacheDtype.AUTO: model_dtype, CacheDtype.BF16: torch.bfloat16, CacheDtype.INT8: torch.int8}
        same = CacheFormat(dtype=dtypes[wanted])
        return cls(key=same, value=same)

    def column_bytes(self, head_dim: int) -> int:
        """Bytes that the key and the value of one token of one head take."""
        return self.key.column_bytes(head_dim) + self.value.column_bytes(head_dim)
