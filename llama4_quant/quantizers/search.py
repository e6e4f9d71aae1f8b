"""Choosing scales: absmax, or a search for the least squared error.

This is the inner loop of quantization. kernels.cpp has it compiled and gives the same bytes because it keeps what this
file fixes (all in float32, S weights per scale, L scales):

1. `base = absmax / absmax_code`; 1 for a lane of zeros; at least 2^-126, so that a scale is never subnormal.
2. Candidates: `base` first, then `base * factor` for the factors in order; each rounded to bf16 (and to 2^-126 from
   below) before anything is done with it, because the stored scale is the one that dequantizes.
3. Error of a candidate: `sum((w - nearest(w / scale) * scale)^2)`. The product is exact (a code has at most 4
   significant bits, a scale 8), so a fused multiply-add gives the same. The sum is a tree: the second half is added to
   the first (of n values, values ceil(n/2).. to values 0..) until one value is left.
4. A candidate replaces the best one only if its error is strictly less: never worse than absmax.

A lane is divided by the power of two under its base before the search, which is exact and keeps the squares of very
large and very small weights in range: codes of `w * 2^k` are the codes of `w`.
"""

import torch
from torch import Tensor

from llama4_quant.quantizers.grid import CodeGrid

SMALLEST_SCALE = 2.0**-126
_EXPONENT_BITS = 0x7F800000


def choose_scales(
    weight_SL: Tensor,
    absmax_L: Tensor,
    grid: CodeGrid,
    factors: tuple[float, ...],
    importance_SL: Tensor | None = None,
) -> Tensor:
    """Choose the scale of each lane.

    Args:
        weight_SL: float32, finite; not changed.
        absmax_L: the largest magnitude of each lane.
        grid: the codes.
        factors: multiples of the absmax scale to try beside 1; none for absmax.
        importance_SL: what the squared error of each weight counts, where not all count the same; only plain torch
            operations do this, kernels.cpp does not.

    Returns:
        float32 [L]; every value is a bf16 number of at least 2^-126.
    """
    base_L = (absmax_L / grid.absmax_code).clamp_(min=SMALLEST_SCALE).masked_fill_(absmax_L == 0, 1.0)
    if not factors:
        return round_to_bf16(base_L)
    power_L = (base_L.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    best_L = _search(weight_SL / power_L, base_L / power_L, SMALLEST_SCALE / power_L, grid, factors, importance_SL)
    return best_L * power_L


def round_to_bf16(values: Tensor) -> Tensor:
    """Nearest bf16 numbers, ties to even, as float32."""
    return values.to(torch.bfloat16).to(torch.float32)


def _search(
    weight_SL: Tensor,
    base_L: Tensor,
    smallest_L: Tensor,
    grid: CodeGrid,
    factors: tuple[float, ...],
    importance_SL: Tensor | None,
) -> Tensor:
    scratch_SL = torch.empty_like(weight_SL)
    best_L = round_to_bf16(base_L)
    least_L = _squared_error(weight_SL, best_L, grid, scratch_SL, importance_SL)
    for factor in factors:
        scale_L = torch.maximum(round_to_bf16(base_L * factor), smallest_L)
        error_L = _squared_error(weight_SL, scale_L, grid, scratch_SL, importance_SL)
        better_L = error_L < least_L
        best_L = torch.where(better_L, scale_L, best_L)
        least_L = torch.where(better_L, error_L, least_L)
    return best_L


def _squared_error(
    weight_SL: Tensor, scale_L: Tensor, grid: CodeGrid, scratch_SL: Tensor, importance_SL: Tensor | None
) -> Tensor:
    """Sum over S of the squared rounding error, by importance if given; overwrites `scratch_SL`."""
    codes_SL = grid.nearest_(torch.div(weight_SL, scale_L, out=scratch_SL))
    error_SL = torch.addcmul(weight_SL, codes_SL, scale_L, value=-1, out=scratch_SL)
    squares_SL = error_SL.mul_(error_SL)
    return _tree_sum_(squares_SL if importance_SL is None else squares_SL.mul_(importance_SL))


def _tree_sum_(values_SL: Tensor) -> Tensor:
    """Sum over S in the order that the module docstring fixes; overwrites its argument."""
    count = values_SL.shape[0]
    while count > 1:
        half = (count + 1) // 2
        values_SL[: count - half].add_(values_SL[half:count])
        count = half
    return values_SL[0].clone()
