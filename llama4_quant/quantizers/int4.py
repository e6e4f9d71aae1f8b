"""Symmetric int4: codes -8..7, one bf16 scale per group or per output channel.

The grid has one more negative code than positive ones. absmax scaling divides by 7.5, half of the range, as
compressed-tensors does: the largest magnitude is off by at most half a step whichever sign it has, where 8 would clip
a positive maximum by 12.5 % and 7 would waste the code -8.

Which scales the MSE search tries was chosen by measurement, against a search over 400 factors in 0.1..1.3, in bf16
weights drawn from normal, Laplace and Student-t (5 and 3 degrees of freedom) distributions. Excess of the summed
squared error over that dense search (tests/quantizers/study_factors.py prints it):

    weights per scale    absmax           these factors
    32 (group)           17 % .. 22 %     0.3 % .. 0.8 %
    64 (group)           14 % .. 19 %     0.2 % .. 0.5 %
    128 (group)          17 % .. 21 %     0.1 % .. 0.3 %
    5120, 8192 (row)     88 % .. 314 %    0.1 % .. 0.6 %

In a group the best factor lies in 0.7..1.1 nine times of ten: below 1 the outliers are clipped for a finer step, above
1 a positive maximum is freed from clipping (1.07 = 7.5/7) or the step happens to fit the few large weights. In a row
of thousands the best factor is 0.5..0.7 for normal weights and down to 0.14 for heavy tails: a geometric grid.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from llama4_quant.quantizers.grid import CodeGrid
from llama4_quant.scheme import Strategy

INT4_MIN = -8
INT4_MAX = 7


def nearest_(ratio: Tensor) -> Tensor:
    """Round float32 `ratio` = weight / scale to the nearest code -8..7 in place, ties to even."""
    return ratio.round_().clamp_(INT4_MIN, INT4_MAX)


def encode(ratio: Tensor) -> Tensor:
    """Nearest codes of float32 `ratio` = weight / scale as int8; overwrites `ratio`."""
    return nearest_(ratio).to(torch.int8)


GRID = CodeGrid(
    absmax_code=7.5,
    scale_dtype=torch.bfloat16,
    nearest_=nearest_,
    encode=encode,
    factors=MappingProxyType(
        {
            Strategy.GROUP: tuple(step / 40 for step in range(24, 47) if step != 40),
            Strategy.CHANNEL: tuple(2 ** (-step / 8) for step in range(1, 24)),
        }
    ),
)
