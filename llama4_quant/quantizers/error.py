"""How much quantization changed a weight: sums that can be merged over chunks, experts and layers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.quantizers.lanes import rows_per_scale, scheme_chunks
from llama4_quant.quantizers.quantize import QuantizedWeight, dequantize_weight


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightError:
    """Error of one or more quantized weights.

    Attributes:
        squared_error: sum of (weight - dequantized)^2.
        squared_weight: sum of weight^2.
        scale_min: smallest scale.
        scale_max: largest scale.
    """

    squared_error: float
    squared_weight: float
    scale_min: float
    scale_max: float

    def merge(self, other: "WeightError") -> "WeightError":
        """The error of both together."""
        return WeightError(
            squared_error=self.squared_error + other.squared_error,
            squared_weight=self.squared_weight + other.squared_weight,
            scale_min=min(self.scale_min, other.scale_min),
            scale_max=max(self.scale_max, other.scale_max),
        )

    @property
    def relative_error(self) -> float:
        """|weight - dequantized| / |weight| in the Euclidean norm; 0 for a weight of zeros."""
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio, 10 log10(|weight|^2 / |weight - dequantized|^2); inf without noise."""
        if not self.squared_error:
            return math.inf
        return 10 * math.log10(self.squared_weight / self.squared_error)


def measure(weight: Tensor, quantized: QuantizedWeight) -> WeightError:
    """Compare `weight` [out, in] with what `quantized` stands for.

    Squares are summed in float64, row by row and then over rows without rounding, so that measuring a weight in parts
    gives the same sums to within float64 rounding.
    """
    assert tuple(weight.shape) == quantized.shape
    errors: list[float] = []
    weights: list[float] = []
    block = rows_per_scale(quantized.scheme)
    for rows in scheme_chunks(*quantized.shape, quantized.scheme):
        part = QuantizedWeight(
            codes=quantized.codes[rows],
            scale=quantized.scale[rows.start // block : -(-rows.stop // block)],
            scheme=quantized.scheme,
        )
        exact = weight[rows].to(torch.float64)
        weights += exact.square().sum(dim=1).tolist()
        errors += exact.sub_(dequantize_weight(part, torch.float32)).square_().sum(dim=1).tolist()
    return WeightError(
        squared_error=math.fsum(errors),
        squared_weight=math.fsum(weights),
        scale_min=float(quantized.scale.min()),
        scale_max=float(quantized.scale.max()),
    )
