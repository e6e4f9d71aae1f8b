"""A quantized weight as it is stored, with its error: what a conversion writes, in one step.

`quantize_plain` composes it of the parts that quantize.py, packing.py and error.py define. compiled.py makes the same
in one pass; backend.py chooses.
"""

from dataclasses import dataclass

from torch import Tensor

from llama4_quant.quantizers.error import WeightError, measure
from llama4_quant.quantizers.packing import pack_int4, packed_features, unpack_int4
from llama4_quant.quantizers.quantize import QuantizedWeight, quantize_weight
from llama4_quant.scheme import WeightScheme, WeightType


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedWeight:
    """One quantized [out, in] weight, N = out_features, K = in_features.

    Attributes:
        codes: INT4: int32 [N, ceil(K/8)] of `pack_int4`; FP8: float8_e4m3fn [N, K].
        scale: `scheme.scale_shape(N, K)`; bf16 for INT4, float32 (of bf16 values) for FP8.
        shape: (N, K).
        scheme: how codes and scale belong together.
        error: what quantization changed.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    scheme: WeightScheme
    error: WeightError

    def unpack(self) -> QuantizedWeight:
        """The same weight with one code to an element."""
        codes = unpack_int4(self.codes, self.shape[1]) if self.scheme.type is WeightType.INT4 else self.codes
        return QuantizedWeight(codes=codes, scale=self.scale, scheme=self.scheme)


def code_bytes(shape: tuple[int, int], scheme: WeightScheme) -> int:
    """Size of the codes of an [out, in] weight, in bytes."""
    out_features, in_features = shape
    return out_features * (4 * packed_features(in_features) if scheme.type is WeightType.INT4 else in_features)


def quantize_plain(weight: Tensor, scheme: WeightScheme) -> PackedWeight:
    """Quantize, pack and measure with torch operations, on any device; arguments and errors as `quantize_weight`."""
    quantized = quantize_weight(weight, scheme)
    return PackedWeight(
        codes=pack_int4(quantized.codes) if scheme.type is WeightType.INT4 else quantized.codes,
        scale=quantized.scale,
        shape=quantized.shape,
        scheme=scheme,
        error=measure(weight, quantized),
    )
