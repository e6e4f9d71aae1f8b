"""Symmetric int8, for a head that is quantized while loading: codes -127..127, one bf16 scale per output row.

absmax / 127, and no search: 8 bits leave little to win. A scale rounded down to bf16 may put the largest weight at up
to 127.25 steps, which clips a quarter of a step. -128 is not used, so that kernels may negate codes.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from llama4_quant.quantizers.grid import CodeGrid

INT8_MAX = 127


def nearest_(ratio: Tensor) -> Tensor:
    """Round float32 `ratio` = weight / scale to the nearest code -127..127 in place, ties to even."""
    return ratio.round_().clamp_(-INT8_MAX, INT8_MAX)


def encode(ratio: Tensor) -> Tensor:
    """Nearest codes of float32 `ratio` = weight / scale as int8; overwrites `ratio`."""
    return nearest_(ratio).to(torch.int8)


GRID = CodeGrid(
    absmax_code=float(INT8_MAX),
    scale_dtype=torch.bfloat16,
    nearest_=nearest_,
    encode=encode,
    factors=MappingProxyType({}),
)
