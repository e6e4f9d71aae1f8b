"""Weights to codes and scales, and back.

A weight is cut into chunks of rows of a few MiB, whatever its size; each chunk gets its scales (search.py), is rounded
against the scales *as stored*, and is written into the result. Nothing depends on how the rows are cut or on the
number of threads: the same bytes come out of a whole weight, of any split by rows (of 128 rows for blocks), and of a
transposed view such as an expert slice of a fused Llama 4 checkpoint, [in, out] seen as [out, in].

For bf16 and fp16 weights the codes are exactly the nearest ones: `w / scale` in float32 cannot land on the wrong side
of a midpoint between codes. Weight, scale and midpoint have at most 11, 8 and 5 significant bits, so a ratio that is
not the midpoint differs from it by 2^-14 of its value or more, and float32 rounds by 2^-24. (compressed-tensors divides
in bf16 on a CPU, which rounds ratios onto midpoints and then to the even side, and in float32 on a GPU, as here.)
"""

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from llama4_quant.errors import QuantizationError
from llama4_quant.quantizers import fp8, int4, int8
from llama4_quant.quantizers.grid import CodeGrid
from llama4_quant.quantizers.lanes import rows_per_scale, scheme_chunks, spread_scale, to_lanes
from llama4_quant.quantizers.search import choose_scales
from llama4_quant.scheme import Observer, WeightScheme, WeightType

_GRIDS = {WeightType.INT4: int4.GRID, WeightType.INT8: int8.GRID, WeightType.FP8: fp8.GRID}
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedWeight:
    """One quantized [out, in] weight, N = out_features, K = in_features.

    Attributes:
        codes: [N, K]; int8 for INT4 (values -8..7) and INT8, float8_e4m3fn for FP8.
        scale: shape `scheme.scale_shape(N, K)`. As made by `quantize_weight`: bf16 for INT4 and INT8, float32 (of bf16
            values) for FP8. A foreign checkpoint may bring another float dtype for INT4.
        scheme: how the two belong together.
    """

    codes: Tensor
    scale: Tensor
    scheme: WeightScheme

    def __post_init__(self) -> None:
        assert tuple(self.scale.shape) == self.scheme.scale_shape(*self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        out_features, in_features = self.codes.shape
        return (out_features, in_features)


def quantize_weight(weight: Tensor, scheme: WeightScheme) -> QuantizedWeight:
    """Quantize one weight by rounding to nearest.

    Args:
        weight: [out, in] in bfloat16, float16 or float32; any strides; not changed. A magnitude over 3.1e38 may come
            back as Inf, since int4's -8 stands for up to 8/7.5 of the largest one.
        scheme: number format, which weights share a scale, and how scales are chosen.

    Raises:
        QuantizationError: not a non-empty matrix of those dtypes, or NaN or Inf in it (the message gives row and
            column, and leaves the weight's name to the caller).
        SchemeError: the group or block size does not divide in_features.
    """
    check_weight(weight, scheme)
    grid = grid_of(scheme)
    num_rows, in_features = weight.shape
    scale = torch.empty(scheme.scale_shape(num_rows, in_features), dtype=torch.float32, device=weight.device)
    codes: Tensor | None = None
    for rows in scheme_chunks(num_rows, in_features, scheme):
        chunk_scale = _scales_of(weight[rows], scheme, grid, first_row=rows.start)
        chunk_codes = round_rows(weight[rows], chunk_scale, scheme)
        if codes is None:
            codes = torch.empty(weight.shape, dtype=chunk_codes.dtype, device=weight.device)
        codes[rows] = chunk_codes
        first = rows.start // rows_per_scale(scheme)
        scale[first : first + chunk_scale.shape[0]] = chunk_scale
    assert codes is not None
    return QuantizedWeight(codes=codes, scale=scale.to(grid.scale_dtype), scheme=scheme)


def round_rows(rows_RK: Tensor, scale: Tensor, scheme: WeightScheme) -> Tensor:
    """Codes [R, K] of weights [R, K] under scales of the shape `scheme.scale_shape(R, K)`."""
    ratio = rows_RK.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    ratio.div_(spread_scale(scale.to(torch.float32), (ratio.shape[0], ratio.shape[1]), scheme))
    return grid_of(scheme).encode(ratio)


def dequantize_weight(quantized: QuantizedWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Weights [out, in] = codes * scale, rounded once to `dtype`.

    The product of a code and a bf16 scale is exact in float32, so this equals a multiplication in bf16.
    """
    weight = torch.empty(quantized.shape, dtype=dtype, device=quantized.codes.device)
    block = rows_per_scale(quantized.scheme)
    for rows in scheme_chunks(*quantized.shape, quantized.scheme):
        values = quantized.codes[rows].to(torch.float32)
        scale = quantized.scale[rows.start // block : -(-rows.stop // block)].to(torch.float32)
        weight[rows] = values.mul_(spread_scale(scale, (values.shape[0], values.shape[1]), quantized.scheme))
    return weight


def grid_of(scheme: WeightScheme) -> CodeGrid:
    """The codes that `scheme` stores."""
    return _GRIDS[scheme.type]


def check_weight(weight: Tensor, scheme: WeightScheme) -> None:
    """Raise what `quantize_weight` raises for a weight whose shape or dtype `scheme` cannot store."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise QuantizationError(f"expected a weight of shape [out, in], found shape {list(weight.shape)}")
    if weight.dtype not in WEIGHT_DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
        raise QuantizationError(f"expected a weight in {expected}, found {str(weight.dtype).removeprefix('torch.')}")
    scheme.check_divides("weight", weight.shape[1])


def refuse_not_finite(weight: Tensor, scheme: WeightScheme) -> NoReturn:
    """Raise what `quantize_weight` raises for a weight that holds NaN or Inf."""
    for rows in scheme_chunks(weight.shape[0], weight.shape[1], scheme):
        if not torch.isfinite(weight[rows]).all():
            raise QuantizationError(_where_not_finite(weight[rows], rows.start))
    raise AssertionError("the weight is finite")


def _scales_of(rows_RK: Tensor, scheme: WeightScheme, grid: CodeGrid, first_row: int) -> Tensor:
    """Scales of a chunk of rows, float32 of shape `scheme.scale_shape(R, K)`."""
    lanes_SL = to_lanes(rows_RK, scheme)
    absmax_L = lanes_SL.abs().amax(dim=0)
    if not torch.isfinite(absmax_L).all():  # amax lets NaN through
        raise QuantizationError(_where_not_finite(rows_RK, first_row))
    factors = grid.factors[scheme.strategy] if scheme.observer is Observer.MSE else ()
    return choose_scales(lanes_SL, absmax_L, grid, factors).view(scheme.scale_shape(*rows_RK.shape))


def _where_not_finite(rows_RK: Tensor, first_row: int) -> str:
    row, column = torch.nonzero(~torch.isfinite(rows_RK))[0].tolist()
    value = float(rows_RK[row, column])
    return f"row {first_row + row}, column {column} is {value}; a weight must be finite to be quantized"
