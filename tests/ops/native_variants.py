"""The variants of the compiled kernels that this machine can run, and weights in every format that they take."""

import functools
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from llama4_quant.native import NativeUnavailableError
from llama4_quant.ops import native, reference
from llama4_quant.ops.native_library import Library, build

VARIANTS = ("native", "native no-amx-tile no-amx-bf16", "x86-64-v3", "x86-64")
TILE_ROWS = 3


Compiled = TypeVar("Compiled")


def built_or_skipped(build: Callable[[str], Compiled], march: str) -> Compiled:
    """As for another processor, so that each variant is tested on one machine; skips what cannot be built here."""
    if "x86-64" in march and platform.machine() != "x86_64":
        pytest.skip(f"{march}: not such a machine")
    try:
        return build(march)
    except NativeUnavailableError as error:
        pytest.skip(f"{march}: {error}")


@functools.cache
def variant(march: str) -> Library:
    """Of the matrix products."""
    return built_or_skipped(build, march)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers; `dtype` may be FP8."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def activations(num_rows: int, num_inputs: int) -> Tensor:
    """bf16 [num_rows, num_inputs] with an outlier in each row, as layers have them."""
    x = random(num_rows, num_inputs, seed=num_rows)
    x[:, num_inputs // 3] *= 100
    return x


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stored format of a weight.

    Attributes:
        operator: the end of the names `linear_...` and `grouped_...`.
        group_size: inputs per scale; None for one scale of a row; 0 for no scale.
        fixed_size: inputs that share a step where vectors of AVX-512 take them in fixed point; None: they do not.
    """

    operator: str
    group_size: int | None
    fixed_size: int | None = None

    def is_in_tiles(self, num_rows: int, instructions: str) -> bool:
        """Whether these many rows go through the matrix unit; FP8 in blocks never does (fast.h)."""
        is_block = self.operator == "fp8" and self.group_size is not None
        return "AMX" in instructions and num_rows >= TILE_ROWS and not is_block

    def is_fixed(self, num_rows: int, instructions: str) -> bool:
        is_fast = "AVX-512 (" in instructions
        return is_fast and self.fixed_size is not None and not self.is_in_tiles(num_rows, instructions)

    def weight(self, num_outputs: int, num_inputs: int, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        groups = num_inputs // self.group_size if self.group_size else 1
        scale = torch.rand(num_outputs, groups, generator=generator) * 0.1 + 0.01
        scale = scale.to(torch.bfloat16).float()  # which scales are, in float32 too
        if self.operator == "int4":
            words = torch.randint(-(2**31), 2**31, (num_outputs, -(-num_inputs // 8)), generator=generator)
            return words.to(torch.int32), scale.to(torch.bfloat16)
        if self.operator == "int8":
            return torch.randint(-128, 128, (num_outputs, num_inputs), generator=generator).to(torch.int8), scale
        if self.operator == "fp8":
            codes = torch.randint(0, 256, (num_outputs, num_inputs), generator=generator).to(torch.uint8)
            codes[(codes & 0x7F) == 0x7F] = 0  # all numbers, subnormal ones too, but NaN
            num_scales = math.ceil(num_outputs / 128) if self.group_size else num_outputs
            return codes.view(torch.float8_e4m3fn), scale[:num_scales]
        return (random(num_outputs, num_inputs, seed=seed),)

    def linear(self, x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None = None) -> Tensor:
        run: Callable[..., Tensor] = getattr(native, f"linear_{self.operator}")
        return run(x, *weight, bias)

    def grouped(self, x: Tensor, rows_per_expert: Tensor, weight: tuple[Tensor, ...]) -> Tensor:
        run: Callable[..., Tensor] = getattr(native, f"grouped_{self.operator}")
        return run(x, rows_per_expert, *weight)

    def operands(self, x: Tensor, weight: tuple[Tensor, ...], *, rounded: bool) -> tuple[Tensor, Tensor]:
        """What is multiplied, in float64; `rounded`: int4 weights in groups to bf16, as in the reference."""
        if self.operator == "int4":
            is_rounded = rounded and self.group_size and self.group_size < x.shape[-1]
            dtype = torch.bfloat16 if is_rounded else torch.float64
            return x.double(), reference.dequantize_int4(*weight, x.shape[-1], dtype).double()
        if self.operator == "int8":
            return x.double(), weight[0].double() * weight[1].double()
        if self.operator == "fp8":
            rounded_x = exact_fp8_activations(x, self.group_size or x.shape[-1])
            return rounded_x, reference.dequantize_fp8(*weight, torch.float64)
        return x.double(), weight[0].double()


CASES = {
    "int4 g32": Case(operator="int4", group_size=32, fixed_size=128),
    "int4 g64": Case(operator="int4", group_size=64, fixed_size=128),
    "int4 g128": Case(operator="int4", group_size=128, fixed_size=128),
    "int4 g256": Case(operator="int4", group_size=256, fixed_size=128),
    "int4 g384": Case(operator="int4", group_size=384, fixed_size=128),
    "int4 channel": Case(operator="int4", group_size=None, fixed_size=128),
    "fp8 channel": Case(operator="fp8", group_size=None),
    "fp8 block": Case(operator="fp8", group_size=128),
    "int8": Case(operator="int8", group_size=None, fixed_size=64),
    "bf16": Case(operator="dense", group_size=0),
}


def exact_fp8_activations(x: Tensor, group_size: int) -> Tensor:
    """Codes times scale in float64, with codes and scale as in reference.round_activations_fp8."""
    groups = x.reshape(*x.shape[:-1], -1, group_size)
    scale = groups.abs().amax(dim=-1, keepdim=True) / reference.FP8_MAX
    codes = (groups / scale).clamp(-reference.FP8_MAX, reference.FP8_MAX).to(torch.float8_e4m3fn)
    return (codes.double() * scale.double()).reshape(x.shape)
