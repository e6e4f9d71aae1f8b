"""Which operands the compiled kernels take: every function gives the reason why not, or None.

They look at shapes, dtypes, strides and devices only. Weights are [N, K] of a linear operator, or with E in front those
of a grouped one. A refusal is for a caller that can use another backend, so it names the operand, found and expected.

Shape letters: E experts, G groups, K in, N out, W words of eight codes.
"""

import torch
from torch import Tensor

from llama4_quant.scheme import FP8_BLOCK_SIZE

ROW_SCALES = (torch.float32, torch.bfloat16)


def why_not_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Of x [..., K], weight [(E,) N, K], bias [N], all bf16."""
    return _operands(x, weight, bias, torch.bfloat16) or _width(x, weight)


def why_not_int4(x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> str | None:
    """Of weight_packed int32 [(E,) N, W], weight_scale bf16 [(E,) N, G]; groups of 32, 64, a multiple of 128, or K."""
    reason = _operands(x, weight_packed, bias, torch.int32)
    reason = reason or _scale(weight_packed, weight_scale, (torch.bfloat16,))
    if reason:
        return reason
    num_inputs, num_groups = x.shape[-1], weight_scale.shape[-1]
    if weight_packed.shape[-1] != -(-num_inputs // 8):
        return (
            f"weight_packed has {weight_packed.shape[-1]} words a row; {num_inputs} inputs take {-(-num_inputs // 8)}"
        )
    if weight_scale.shape[-2] != weight_packed.shape[-2]:
        return f"weight_scale has {weight_scale.shape[-2]} rows, the weight {weight_packed.shape[-2]}"
    group_size, rest = divmod(num_inputs, max(num_groups, 1))
    if num_groups != 1 and (rest or (group_size not in {32, 64} and group_size % 128)):
        return f"{num_inputs} inputs in {num_groups} groups; group sizes are 32, 64, multiples of 128, or all inputs"
    return None


def why_not_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> str | None:
    """Of weight e4m3 [(E,) N, K]; weight_scale float32 [(E,) N, 1], or [(E,) ceil(N/128), K/128]."""
    reason = _operands(x, weight, bias, torch.float8_e4m3fn)
    reason = reason or _width(x, weight) or _scale(weight, weight_scale, (torch.float32,))
    if reason or is_per_row(weight, weight_scale):
        return reason
    num_outputs, num_inputs = weight.shape[-2:]
    blocks = (-(-num_outputs // FP8_BLOCK_SIZE), -(-num_inputs // FP8_BLOCK_SIZE))
    if tuple(weight_scale.shape[-2:]) != blocks:
        return f"weight_scale is {list(weight_scale.shape)}; by row it ends in {[num_outputs, 1]}, by block in {blocks}"
    if num_inputs % FP8_BLOCK_SIZE:
        return f"{num_inputs} inputs are not a multiple of the block of {FP8_BLOCK_SIZE}"
    return None


def why_not_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> str | None:
    """Of weight int8 [(E,) N, K], weight_scale float32 or bf16 [(E,) N, 1]."""
    reason = _operands(x, weight, bias, torch.int8)
    reason = reason or _width(x, weight) or _scale(weight, weight_scale, ROW_SCALES)
    if reason or is_per_row(weight, weight_scale):
        return reason
    return f"weight_scale is {list(weight_scale.shape)}, expected {[*weight.shape[:-1], 1]}"


def is_per_row(weight: Tensor, weight_scale: Tensor) -> bool:
    """One scale for each output."""
    return weight_scale.shape[-2:] == (weight.shape[-2], 1)


def _operands(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """What is asked of the operands of every operator."""
    is_usual = x.dtype is torch.bfloat16 and weight.dtype is dtype and x.is_cpu and weight.is_cpu and bias is None
    is_usual = is_usual and weight.is_contiguous() and weight.dim() in {2, 3} and x.numel() > 0
    return None if is_usual else _inputs(x) or _unusual(x, weight, bias, dtype)


def _unusual(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """The same, one by one: every call of a kernel asks, so what is usual is quick."""
    for name, tensor in (("x", x), ("the weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}, not on the CPU"
    for name, tensor, wanted in (("x", x, torch.bfloat16), ("the weight", weight, dtype)):
        if tensor.dtype is not wanted:
            return f"{name} is {tensor.dtype}, not {wanted}"
    if weight.dim() not in {2, 3} or not _rows_are_contiguous(weight):
        return f"the weight, {list(weight.shape)} with strides {weight.stride()}, is not [N, K] or [E, N, K] row by row"
    if bias is not None and (bias.dtype is not torch.bfloat16 or bias.shape != weight.shape[-2:-1]):
        return f"bias is {list(bias.shape)} of {bias.dtype}, expected {list(weight.shape[-2:-1])} of bfloat16"
    return None


def _inputs(x: Tensor) -> str | None:
    return "x has no inputs" if x.dim() == 0 or x.shape[-1] == 0 else None


def _width(x: Tensor, weight: Tensor) -> str | None:
    if x.shape[-1] == weight.shape[-1]:
        return None
    return f"x has {x.shape[-1]} inputs, the weight {weight.shape[-1]}"


def _scale(weight: Tensor, scale: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    is_beside = scale.dim() == weight.dim() and scale.shape[:-2] == weight.shape[:-2]
    if is_beside and scale.is_cpu and scale.dtype in dtypes and scale.is_contiguous():
        return None
    if scale.device.type != "cpu":
        return f"weight_scale is on {scale.device}, not on the CPU"
    if scale.dtype not in dtypes:
        return f"weight_scale is {scale.dtype}, not {' or '.join(str(dtype) for dtype in dtypes)}"
    if not is_beside or not _rows_are_contiguous(scale):
        return (
            f"weight_scale, {list(scale.shape)} with strides {scale.stride()}, does not lie beside {list(weight.shape)}"
        )
    return None


def _rows_are_contiguous(tensor: Tensor) -> bool:
    """The last two dimensions are; experts may lie anywhere."""
    return tensor.is_contiguous() or (tensor.dim() == 3 and len(tensor) > 0 and tensor[0].is_contiguous())
