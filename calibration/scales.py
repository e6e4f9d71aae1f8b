"""Scales for calibrated weights: a search in which each weight's error counts as much as its input is large.

The error of weight w[n, k] reaches the output times input k, so its square counts diag(H)[k] = sum over rows of x_k^2.
Candidates and everything else are those of the data-free search (quantizers/search.py).

Shape letters: G scale groups, K in, N out, R rows of a chunk.
"""

import torch
from torch import Tensor

from llama4_quant.calibration.gptq import Scales
from llama4_quant.errors import QuantizationError
from llama4_quant.quantizers.lanes import rows_per_scale, scheme_chunks, to_lanes
from llama4_quant.quantizers.native import Library
from llama4_quant.quantizers.quantize import grid_of
from llama4_quant.quantizers.search import choose_scales
from llama4_quant.quantizers.solver import search
from llama4_quant.scheme import FP8_BLOCK_SIZE, Observer, Strategy, WeightScheme


def search_scales(
    weight_NK: Tensor, scheme: WeightScheme, importance_K: Tensor | None, library: Library | None = None
) -> Tensor:
    """Choose the scales of one weight.

    Args:
        weight_NK: float32 [out, in].
        scheme: where scales are; its observer says whether there is a search at all.
        importance_K: what the squared error of each input's weights counts; None: all the same.
        library: compiled loops, which find the same scales; only for processors, and not for blocks.

    Returns:
        float32 (bf16 numbers) of shape `scheme.scale_shape(N, K)`.

    Raises:
        QuantizationError: the weight holds NaN or Inf.
    """
    num_rows, num_inputs = weight_NK.shape
    grid = grid_of(scheme)
    factors = grid.factors[scheme.strategy] if scheme.observer is Observer.MSE else ()
    is_fast = factors and scheme.strategy is not Strategy.BLOCK and weight_NK.device.type == "cpu"
    if is_fast and library is not None and importance_K is not None and bool(torch.isfinite(weight_NK).all()):
        return search(library, weight_NK, scheme, importance_K, _inputs_per_scale(scheme, num_inputs))
    scale = torch.empty(scheme.scale_shape(num_rows, num_inputs), dtype=torch.float32, device=weight_NK.device)
    for rows in scheme_chunks(num_rows, num_inputs, scheme):
        lanes_SL = to_lanes(weight_NK[rows], scheme)
        absmax_L = lanes_SL.abs().amax(dim=0)
        if not bool(torch.isfinite(absmax_L).all()):
            raise QuantizationError(f"rows {rows.start} to {rows.stop} hold NaN or Inf")
        importance_SL = None
        if importance_K is not None and factors:
            importance_SL = to_lanes(importance_K.expand(rows.stop - rows.start, -1), scheme)
        chosen = choose_scales(lanes_SL, absmax_L, grid, factors, importance_SL)
        part = chosen.view(scheme.scale_shape(rows.stop - rows.start, num_inputs))
        first = rows.start // rows_per_scale(scheme)
        scale[first : first + part.shape[0]] = part
    return scale


def solver_scales(scale: Tensor, shape: tuple[int, int], scheme: WeightScheme) -> Scales:
    """Stored scales in the solver's layout.

    Args:
        scale: as `search_scales` gives them.
        shape: (N, K) of the weight.
        scheme: where scales are.
    """
    num_outputs, num_inputs = shape
    by_output = scale
    if scheme.strategy is Strategy.BLOCK:
        by_output = scale.repeat_interleave(FP8_BLOCK_SIZE, dim=0)[:num_outputs]
    return Scales(values=by_output.T.contiguous(), group_size=_inputs_per_scale(scheme, num_inputs))


def stored_scales(scales: Scales, scheme: WeightScheme) -> Tensor:
    """The inverse of `solver_scales`."""
    by_output = scales.values.T
    return (by_output[::FP8_BLOCK_SIZE] if scheme.strategy is Strategy.BLOCK else by_output).contiguous()


def _inputs_per_scale(scheme: WeightScheme, num_inputs: int) -> int:
    if scheme.strategy is Strategy.GROUP:
        assert scheme.group_size is not None
        return scheme.group_size
    return FP8_BLOCK_SIZE if scheme.strategy is Strategy.BLOCK else num_inputs
