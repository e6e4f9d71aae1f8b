"""Operators made of what torch itself brings for processors: the backend for machines without a C++ compiler.

A dense weight alone is torch's matrix product, here as in the reference. For the few rows of an expert the product is
taken the other way round, W @ x.T: torch copies the second of two factors to another layout, and this one is small.
int4 weights go through torch's own kernel, which wants them in another layout: `repack_int4` changes it once, after
loading, in the memory where the stored bytes are. An int8 weight is taken as it is. For FP8 weights torch has nothing
on a processor, not even a fast conversion; here tiles of them are converted with integer operations, into the cache.

Shape letters: E experts, G groups, K in, N out, R rows of expert work; `...` any leading dimensions (tokens).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from llama4_quant.ops import reference
from llama4_quant.ops.use import Operator, Use
from llama4_quant.quantizers.packing import CODES_PER_WORD, unpack_int4
from llama4_quant.scheme import FP8_BLOCK_SIZE

_GROUP_SIZES = (32, 64, 128, 256)
_OUT_MULTIPLE = 16
_ROWS_REPACKED = 64
"""The kernel's widest tile of outputs: tiles do not depend on each other, so a weight may be repacked tile by tile."""
_INT8_IN_MULTIPLE = 16
"""torch's int8 kernel reads past the end of other rows (seen in 2.13)."""
_MAX_INT8_ROWS = 16
"""torch's int8 kernel takes its time for each row of x; beyond this, dequantizing tiles of the weight is faster."""
_INT8_TILE = 4096
_FP8_TILE = 1 << 19
"""Weights converted at a time: 1 MiB in bfloat16. Measured on 8192 x 1024: half or twice as many take longer."""
_TWO_TO_120 = 2.0**120


def why_not(use: Use) -> str | None:
    """Why this backend cannot do something, or None if it can."""
    if use.operator is Operator.LINEAR_DENSE:
        return None
    if use.device.type != "cpu":
        return f"device {use.device.type}: the kernels are for processors"
    if use.dtype is not torch.bfloat16:
        return f"dtype {use.dtype_name}: the kernels take bfloat16"
    return _WHY_NOT[use.operator](use)


def _why_not_int4(use: Use) -> str | None:
    if use.out_features % _OUT_MULTIPLE:
        return f"out_features {use.out_features} is not divisible by {_OUT_MULTIPLE}"
    if kernel_group_size(use.in_features, use.group_size) is None:
        return f"group size {use.group_size}: the kernel takes {', '.join(map(str, _GROUP_SIZES))} or parts of these"
    return None


def _why_not_int8(use: Use) -> str | None:
    if use.in_features % _INT8_IN_MULTIPLE:
        return f"in_features {use.in_features} is not divisible by {_INT8_IN_MULTIPLE}"
    return None


_WHY_NOT: dict[Operator, Callable[[Use], str | None]] = {
    Operator.LINEAR_INT4: _why_not_int4,
    Operator.LINEAR_INT8: _why_not_int8,
    Operator.LINEAR_FP8: lambda _use: None,
    Operator.GROUPED_DENSE: lambda _use: None,
    Operator.GROUPED_INT4: _why_not_int4,
    Operator.GROUPED_FP8: lambda _use: None,
}


def kernel_group_size(in_features: int, group_size: int) -> int | None:
    """The largest group that the kernel takes and that never spans two of the weight's groups; None if none does."""
    fits = [size for size in _GROUP_SIZES if group_size % size == 0 and in_features % size == 0]
    return max(fits, default=None)


def repack_int4(weight_packed: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a stored int4 weight into what `linear_int4` and `grouped_int4` here take, without a second copy of it.

    Args:
        weight_packed: [N, K/8] or [E, N, K/8] int32; *overwritten*: the first result is its memory.
        weight_scale: [N, G] or [E, N, G] bf16.

    Returns:
        codes uint8 [..., N, K/2] in the kernel's order, and scales bf16 [..., G', N, 2], each with its zero point,
        which is 0. Where G is smaller than the kernel's smallest number of groups, scales are repeated.
    """
    words = weight_packed.shape[-1]
    in_features = CODES_PER_WORD * words
    for matrix in weight_packed.view(-1, *weight_packed.shape[-2:]):
        for start in range(0, matrix.shape[0], _ROWS_REPACKED):
            rows = matrix[start : start + _ROWS_REPACKED]
            codes = unpack_int4(rows, in_features).to(torch.int32).add_(8)
            rows.view(torch.uint8).copy_(torch._convert_weight_to_int4pack_for_cpu(codes, 1))  # noqa: SLF001
    group_size = in_features // weight_scale.shape[-1]
    wanted = kernel_group_size(in_features, group_size)
    assert wanted is not None
    scale = weight_scale.repeat_interleave(group_size // wanted, dim=-1).transpose(-1, -2)
    return weight_packed.view(torch.uint8), torch.stack((scale, torch.zeros_like(scale)), dim=-1)


def linear_int4(x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `reference.linear_int4`, of a weight that went through `repack_int4`."""
    y = _int4_product(x.flatten(0, -2), weight_packed, weight_scale).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def grouped_dense(x_RK: Tensor, rows_per_expert: Tensor, weight_ENK: Tensor) -> Tensor:
    """As `reference.grouped_dense`; tests/benchmarks/experts.py measures both."""
    y_RN = x_RK.new_empty(x_RK.shape[0], weight_ENK.shape[1])
    for expert, rows in spans(rows_per_expert):
        y_RN[rows] = (weight_ENK[expert] @ x_RK[rows].T).T
    return y_RN


def grouped_int4(x_RK: Tensor, rows_per_expert: Tensor, packed_ENB: Tensor, scale_EGN2: Tensor) -> Tensor:
    """As `reference.grouped_int4`, of weights that went through `repack_int4` (B bytes of two codes)."""
    y_RN = x_RK.new_empty(x_RK.shape[0], packed_ENB.shape[1])
    for expert, rows in spans(rows_per_expert):
        y_RN[rows] = _int4_product(x_RK[rows], packed_ENB[expert], scale_EGN2[expert])
    return y_RN


def linear_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `reference.linear_int8`."""
    x_RK = x.flatten(0, -2)
    if x_RK.shape[0] <= _MAX_INT8_ROWS:
        y_RN = torch._weight_int8pack_mm(x_RK.contiguous(), weight, weight_scale.squeeze(-1))  # noqa: SLF001
    else:
        tiles = [slice(start, start + _INT8_TILE) for start in range(0, weight.shape[0], _INT8_TILE)]
        y_RN = torch.cat([reference.linear_int8(x_RK, weight[rows], weight_scale[rows]) for rows in tiles], dim=-1)
    y = y_RN.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def linear_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `reference.linear_fp8`."""
    rounded = reference.round_activations_fp8(x, group_size=reference.activation_group(weight, weight_scale))
    return _fp8_product(rounded, weight, weight_scale, bias)


def grouped_fp8(x_RK: Tensor, rows_per_expert: Tensor, weight_ENK: Tensor, scale_E: Tensor) -> Tensor:
    """As `reference.grouped_fp8`."""
    rounded = reference.round_activations_fp8(x_RK, group_size=reference.activation_group(weight_ENK[0], scale_E[0]))
    y_RN = x_RK.new_empty(x_RK.shape[0], weight_ENK.shape[1])
    for expert, rows in spans(rows_per_expert):
        y_RN[rows] = _fp8_product(rounded[rows], weight_ENK[expert], scale_E[expert])
    return y_RN


def _fp8_product(x: Tensor, weight_NK: Tensor, weight_scale: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Tile by tile of outputs: [..., N]."""
    num_rows, in_features = weight_NK.shape
    step = max(1, _FP8_TILE // in_features // FP8_BLOCK_SIZE) * FP8_BLOCK_SIZE  # tiles start where blocks do
    rows_per_scale = 1 if weight_scale.shape[0] == num_rows else FP8_BLOCK_SIZE
    y = x.new_empty(*x.shape[:-1], num_rows)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        scale = weight_scale[start // rows_per_scale : -(-rows.stop // rows_per_scale)]
        tile = fp8_to_bf16(weight_NK[rows]).mul_(reference.fp8_scale(weight_NK[rows], scale, torch.bfloat16))
        y[..., rows] = functional.linear(x, tile, None if bias_N is None else bias_N[rows])
    return y


def fp8_to_bf16(codes: Tensor) -> Tensor:
    """e4m3fn to bfloat16, exactly; NaN, which no weight is, would become 480.

    Sign, exponent and mantissa move to where bfloat16 has them. Its exponents are counted from -127 and not from -7, so
    the value is then 2^120 times too small; subnormals too, as they become subnormals.
    """
    bits = codes.view(torch.int8).to(torch.int16)
    magnitude = (bits & 0x7F).bitwise_left_shift_(4)
    return bits.bitwise_and_(-0x8000).bitwise_or_(magnitude).view(torch.bfloat16).mul_(_TWO_TO_120)


def _int4_product(x_RK: Tensor, packed_NB: Tensor, scale_GN2: Tensor) -> Tensor:
    group_size = x_RK.shape[-1] // scale_GN2.shape[0]
    return torch._weight_int4pack_mm_for_cpu(x_RK.contiguous(), packed_NB, group_size, scale_GN2)  # noqa: SLF001


def spans(rows_per_expert: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which."""
    start = 0
    for expert, num_rows in enumerate(rows_per_expert.tolist()):
        if num_rows:
            yield expert, slice(start, start + num_rows)
            start += num_rows
