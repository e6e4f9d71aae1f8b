"""What the compiled kernels say before there are weights: `why_not` of a `Use`, for the table of backends."""

import torch

from llama4_quant.ops import native
from llama4_quant.ops.use import Use
from llama4_quant.scheme import FP8_BLOCK_SIZE, Strategy, WeightType

_SMALL_GROUPS = (32, 64)
_GROUP_MULTIPLE = 128


def why_not(use: Use) -> str | None:
    """Why the compiled kernels cannot do something, or None if they can; asks for a compiler last.

    The kernels' own checks (native_checks.py) look at operands. Those of a layer are as `use` says, which leaves these.
    """
    if use.device.type != "cpu":
        return f"device {use.device.type}: the kernels are for processors"
    if use.dtype is not torch.bfloat16:
        return f"dtype {use.dtype_name}: the kernels take bfloat16"
    return _why_not_scheme(use) or native.probe()


def _why_not_scheme(use: Use) -> str | None:
    if use.scheme is None:
        return None
    is_per_row = use.group_size == use.in_features
    is_known_group = use.group_size in _SMALL_GROUPS or use.group_size % _GROUP_MULTIPLE == 0
    if use.scheme.type is WeightType.INT4 and not (is_per_row or is_known_group):
        return f"group size {use.group_size}: the kernels take 32, 64, multiples of 128, or a scale per row"
    if use.scheme.strategy is Strategy.BLOCK and use.in_features % FP8_BLOCK_SIZE:
        return f"in_features {use.in_features} is not divisible by the block of {FP8_BLOCK_SIZE}"
    return None
