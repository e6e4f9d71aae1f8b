"""FP8 (e4m3fn: 4 exponent bits, 3 mantissa bits, largest 448, no infinity): one scale per output row or 128x128 block.

A float grid is nearly the same at every power of two: halving or doubling the scale changes nothing but the clipping
at 448 and the subnormals under 2^-6, which weights hardly reach. So the only question for the MSE search is where in
one binade the scale should sit: the factors are sixteen steps of 2^(1/16) from 1 up. None is under 1: clipping the
largest weights does not pay in a float format (a dense search never went under 0.95).

Measured as in int4.py, excess of the summed squared error over a search of 400 factors in 0.25..4, for normal, Laplace
and Student-t (5 and 3) weights (tests/quantizers/study_factors.py prints it):

    weights per scale    absmax             4 factors          8 factors          these 16
    5120 (row)           5.4 % .. 11.1 %    2.6 % .. 6.3 %     2.0 % .. 4.4 %     1.2 % .. 3.1 %
    8192 (row)           4.0 % .. 10.2 %    2.0 % .. 6.0 %     1.5 % .. 4.4 %     0.9 % .. 3.2 %
    16384 (block)        2.9 % .. 7.2 %     1.3 % .. 3.5 %     0.9 % .. 2.5 %     0.6 % .. 1.9 %

Stored scales are float32 but their values are bf16 numbers, so that a loader that casts them to the model's dtype (as
transformers does) and one that does not (vLLM) compute the same weights.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from llama4_quant.quantizers.grid import CodeGrid
from llama4_quant.scheme import Strategy

FP8_MAX = 448.0
_EXPONENT_BITS = 0x7F800000
_SMALLEST_NORMAL = 2.0**-6
_ROUND_TO_3_MANTISSA_BITS = 1.5 * 2.0**20


def nearest_(ratio: Tensor) -> Tensor:
    """Round float32 `ratio` = weight / scale to the nearest e4m3fn value in place, ties to even, saturating at 448.

    The same values as `ratio.to(torch.float8_e4m3fn).float()` (but +0 for -0), five times faster on a CPU, where that
    pair of casts is not vectorised. Adding 1.5 * 2^23 units and subtracting them again leaves a multiple of the unit;
    the unit is 2^-3 of the value's power of two, 2^-9 for subnormals.
    """
    ratio.clamp_(-FP8_MAX, FP8_MAX)
    power = (ratio.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    shift = power.clamp_(min=_SMALLEST_NORMAL).mul_(_ROUND_TO_3_MANTISSA_BITS)
    return ratio.add_(shift).sub_(shift)


def encode(ratio: Tensor) -> Tensor:
    """Nearest codes of float32 `ratio` = weight / scale as float8_e4m3fn, -0 kept; overwrites `ratio`."""
    # The cast turns what exceeds 464 into NaN, so saturate first.
    return ratio.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


_ONE_BINADE = tuple(2 ** (step / 16) for step in range(1, 16))

GRID = CodeGrid(
    absmax_code=FP8_MAX,
    scale_dtype=torch.float32,
    nearest_=nearest_,
    encode=encode,
    factors=MappingProxyType({Strategy.CHANNEL: _ONE_BINADE, Strategy.BLOCK: _ONE_BINADE}),
)
