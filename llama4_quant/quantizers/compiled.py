"""Quantize, pack and measure a weight with the compiled kernels (kernels.cpp) in one pass over memory."""

import math

import torch
from torch import Tensor

from llama4_quant.quantizers.error import WeightError
from llama4_quant.quantizers.native import Job, Library
from llama4_quant.quantizers.packed import PackedWeight, code_bytes
from llama4_quant.quantizers.quantize import WEIGHT_DTYPES, check_weight, grid_of, refuse_not_finite
from llama4_quant.scheme import FP8_BLOCK_SIZE, Observer, Strategy, WeightScheme, WeightType


def quantize_compiled(
    weight: Tensor, scheme: WeightScheme, library: Library, out: Tensor | None = None
) -> PackedWeight:
    """Quantize one weight; errors as `quantize_weight`.

    Holds, besides the result, `compiled_scratch`.

    Args:
        weight: as for `quantize_weight`, on the CPU.
        scheme: as for `quantize_weight`.
        library: the compiled kernels.
        out: contiguous uint8 of `code_bytes` or more for the codes, which are a view of it; new memory if None.
    """
    check_weight(weight, scheme)
    num_rows, in_features = weight.shape
    grid = grid_of(scheme)
    factors = torch.tensor(
        grid.factors[scheme.strategy] if scheme.observer is Observer.MSE else (), dtype=torch.float32
    )
    codes = _codes(weight, scheme, out)
    scale = torch.empty(scheme.scale_shape(num_rows, in_features), dtype=grid.scale_dtype)
    row_sums = torch.zeros(2, num_rows, dtype=torch.float64)
    status = library.quantize(_job(weight, scheme, factors, codes, scale, row_sums))
    if status == 1:
        refuse_not_finite(weight, scheme)
    if status:
        raise MemoryError("no memory for the scratch space of the quantizer")
    squared_error, squared_weight = (math.fsum(sums) for sums in row_sums.tolist())
    scale_min, scale_max = (float(bound) for bound in torch.aminmax(scale))
    error = WeightError(
        squared_error=squared_error, squared_weight=squared_weight, scale_min=scale_min, scale_max=scale_max
    )
    return PackedWeight(codes=codes, scale=scale, shape=(num_rows, in_features), scheme=scheme, error=error)


def compiled_scratch(num_rows: int, in_features: int, scheme: WeightScheme) -> int:
    """Bytes, at most, that quantizing a weight [num_rows, in_features] takes beside the weight and its result.

    A panel in float32 and a few lines as in kernels.cpp; and two sums a row, as float64 and as Python's numbers.
    """
    panel_rows, panel_columns = (64, in_features) if scheme.strategy is Strategy.CHANNEL else (128, 1024)
    return 4 * panel_rows * (panel_columns + 32) + 16 * max(in_features, FP8_BLOCK_SIZE**2) + 96 * num_rows


def _codes(weight: Tensor, scheme: WeightScheme, out: Tensor | None) -> Tensor:
    num_rows, in_features = weight.shape
    num_bytes = code_bytes((num_rows, in_features), scheme)
    storage = torch.empty(num_bytes, dtype=torch.uint8) if out is None else out
    assert storage.dtype is torch.uint8
    assert storage.is_contiguous()
    assert storage.numel() >= num_bytes
    dtype = torch.int32 if scheme.type is WeightType.INT4 else torch.float8_e4m3fn
    return storage.view(-1)[:num_bytes].view(dtype).view(num_rows, -1)


def _job(weight: Tensor, scheme: WeightScheme, factors: Tensor, codes: Tensor, scale: Tensor, row_sums: Tensor) -> Job:
    """Addresses only: the caller keeps the tensors."""
    num_rows, in_features = weight.shape
    is_block = scheme.strategy is Strategy.BLOCK
    row_error, row_weight = row_sums
    return Job(
        weight=weight.data_ptr(),
        codes=codes.data_ptr(),
        scale=scale.data_ptr(),
        row_error=row_error.data_ptr(),
        row_weight=row_weight.data_ptr(),
        factors=factors.data_ptr(),
        num_factors=len(factors),
        rows=num_rows,
        columns=in_features,
        row_stride=weight.stride(0),
        column_stride=weight.stride(1),
        group_size=FP8_BLOCK_SIZE if is_block else scheme.group_size or in_features,
        source=WEIGHT_DTYPES.index(weight.dtype),
        grid=0 if scheme.type is WeightType.INT4 else 1,
        is_block=int(is_block),
    )
