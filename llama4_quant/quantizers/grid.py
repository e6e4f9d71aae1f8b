"""What a number format offers to the scale search: its codes, how to round to them, and which scales to try.

A weight `w` is stored as `code * scale`. The search (search.py) and the encoder (quantize.py) are the same for int4 and
fp8; the two formats differ only in what a `CodeGrid` says. int4.py and fp8.py hold one each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.scheme import Strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeGrid:
    """The codes of one number format.

    Attributes:
        absmax_code: absmax scale = absmax / absmax_code.
        scale_dtype: dtype in which scales are stored. Their values are bf16 numbers whatever the dtype.
        nearest_: float32 weight / scale -> nearest code as float32, ties to even; in place, returns its argument.
        encode: float32 weight / scale -> the same codes in the storage dtype. May write to its argument.
        factors: multiples of the absmax scale that the MSE search tries, beside 1.
    """

    absmax_code: float
    scale_dtype: torch.dtype
    nearest_: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    factors: Mapping[Strategy, tuple[float, ...]]
