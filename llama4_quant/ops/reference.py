"""Reference operators: slow, obvious, pure PyTorch.

Weights stay as they are stored and are dequantized during the call, one expert at a time, into the dtype of the input;
nothing is kept. Numbers equal those of compressed-tensors, which dequantizes with the scale cast to the compute dtype
and quantizes FP8 activations on the fly in the compute dtype.

The grouped operators do the expert work of a mixture-of-experts layer: rows come sorted by expert, each expert
multiplies its own rows and no others.

Shape letters: E experts, G groups, K in, N out, R rows of expert work; `...` any leading dimensions (tokens).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from llama4_quant.quantizers.packing import unpack_int4
from llama4_quant.scheme import FP8_BLOCK_SIZE

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def linear_int4(x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` with an int4 weight.

    Args:
        x: [..., K], floating point.
        weight_packed: [N, ceil(K/8)] int32, eight codes + 8 to a word, low nibble first.
        weight_scale: [N, G]; each scale covers K/G consecutive inputs.
        bias: [N] or None.

    Returns:
        [..., N] in x's dtype.
    """
    return functional.linear(x, dequantize_int4(weight_packed, weight_scale, x.shape[-1], x.dtype), bias)


def linear_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` with an FP8 weight and activations rounded to FP8 token by token.

    Args:
        x: [..., K], floating point.
        weight: [N, K] float8_e4m3fn.
        weight_scale: [N, 1], or [ceil(N/128), ceil(K/128)] for blocks.
        bias: [N] or None.

    Returns:
        [..., N] in x's dtype; the products are taken in x's dtype.
    """
    rounded = round_activations_fp8(x, group_size=activation_group(weight, weight_scale))
    return functional.linear(rounded, dequantize_fp8(weight, weight_scale, x.dtype), bias)


def linear_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` with a weight [N, K] in x's dtype: [..., K] to [..., N]."""
    return functional.linear(x, weight, bias)


def linear_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` with an int8 weight; activations are not rounded.

    Args:
        x: [..., K], floating point.
        weight: [N, K] int8.
        weight_scale: [N, 1].
        bias: [N] or None.

    Returns:
        [..., N] in x's dtype; codes and scale are cast to it, as for the other formats.
    """
    return functional.linear(x, weight.to(x.dtype) * weight_scale.to(x.dtype), bias)


def grouped_dense(x_RK: Tensor, rows_per_expert: Tensor, weight_ENK: Tensor) -> Tensor:
    """Multiply each expert's rows by its weight.

    Args:
        x_RK: rows sorted by expert.
        rows_per_expert: [E] integers that sum to R.
        weight_ENK: stacked weights.

    Returns:
        [R, N] in x's dtype.
    """
    return _grouped(x_RK, rows_per_expert, weight_ENK.shape[1], lambda expert: weight_ENK[expert])


def grouped_int4(x_RK: Tensor, rows_per_expert: Tensor, packed_ENW: Tensor, scale_ENG: Tensor) -> Tensor:
    """`grouped_dense` for stacks of `linear_int4`'s weights (W words of eight codes)."""
    num_inputs = x_RK.shape[-1]
    return _grouped(
        x_RK,
        rows_per_expert,
        packed_ENW.shape[1],
        lambda expert: dequantize_int4(packed_ENW[expert], scale_ENG[expert], num_inputs, x_RK.dtype),
    )


def grouped_fp8(x_RK: Tensor, rows_per_expert: Tensor, weight_ENK: Tensor, scale_E: Tensor) -> Tensor:
    """`grouped_dense` for stacks of `linear_fp8`'s weights; `scale_E` is [E, N, 1] or [E, blocks of N, blocks of K]."""
    rounded = round_activations_fp8(x_RK, group_size=activation_group(weight_ENK[0], scale_E[0]))
    return _grouped(
        rounded,
        rows_per_expert,
        weight_ENK.shape[1],
        lambda expert: dequantize_fp8(weight_ENK[expert], scale_E[expert], x_RK.dtype),
    )


def grouped_int8(x_RK: Tensor, rows_per_expert: Tensor, weight_ENK: Tensor, scale_EN1: Tensor) -> Tensor:
    """`grouped_dense` for stacks of `linear_int8`'s weights; `scale_EN1` is [E, N, 1]."""
    return _grouped(
        x_RK,
        rows_per_expert,
        weight_ENK.shape[1],
        lambda expert: weight_ENK[expert].to(x_RK.dtype) * scale_EN1[expert].to(x_RK.dtype),
    )


def dequantize_int4(weight_packed: Tensor, weight_scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """Codes times scale, both in `dtype`: [N, K]."""
    codes = unpack_int4(weight_packed, in_features).to(dtype)
    groups = codes.view(*weight_scale.shape, -1)
    return (groups * weight_scale.to(dtype).unsqueeze(-1)).flatten(-2)


def dequantize_fp8(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes times scale, both in `dtype`: [N, K]."""
    return weight.to(dtype) * fp8_scale(weight, weight_scale, dtype)


def fp8_scale(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of every code of an FP8 weight [N, K]: [N, 1] or [N, K]."""
    num_rows, num_columns = weight.shape
    scale = weight_scale.to(dtype)
    if _is_per_channel(weight, weight_scale):
        return scale
    by_row = scale.repeat_interleave(FP8_BLOCK_SIZE, dim=0)[:num_rows]
    return by_row.repeat_interleave(FP8_BLOCK_SIZE, dim=1)[:, :num_columns]


def activation_group(weight: Tensor, weight_scale: Tensor) -> int | None:
    """The `group_size` of `round_activations_fp8` for an FP8 weight: that of its blocks, None for a scale a row."""
    return None if _is_per_channel(weight, weight_scale) else FP8_BLOCK_SIZE


def round_activations_fp8(x: Tensor, *, group_size: int | None = None) -> Tensor:
    """Round each token to FP8 and back, with its own dynamic scale.

    The scale is absmax/448 in x's dtype; a token of zeros gets that dtype's epsilon so that nothing divides by zero.

    Args:
        x: [..., K].
        group_size: None for one scale per token, else one per `group_size` consecutive inputs of a token.
    """
    groups = x if group_size is None else x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    scale = groups.abs().amax(dim=-1, keepdim=True) / FP8_MAX
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    codes = (groups / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (codes.to(x.dtype) * scale).reshape(x.shape)


def round_fp8(x: Tensor, scale: float) -> Tensor:
    """Round to FP8 with one static scale and back, in x's dtype; what is beyond 448 scales saturates."""
    codes = (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.to(x.dtype) * scale


def _is_per_channel(weight: Tensor, weight_scale: Tensor) -> bool:
    return weight_scale.shape == (weight.shape[0], 1)


def _grouped(x_RK: Tensor, rows_per_expert: Tensor, out_features: int, weight_of: Callable[[int], Tensor]) -> Tensor:
    """One matrix product per expert that has rows."""
    y_RN = x_RK.new_empty(x_RK.shape[0], out_features)
    start = 0
    for expert, num_rows in enumerate(rows_per_expert.tolist()):
        if num_rows:
            stop = start + num_rows
            y_RN[start:stop] = functional.linear(x_RK[start:stop], weight_of(expert))
            start = stop
    return y_RN
