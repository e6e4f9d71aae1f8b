"""Operators with weights to run them on, for tests that go through every backend."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.ops import Operator, Use
from llama4_quant.quantizers.packing import pack_int4
from llama4_quant.quantizers.quantize import quantize_weight
from llama4_quant.scheme import Observer, Strategy, WeightScheme, WeightType

INT4 = WeightScheme(type=WeightType.INT4, strategy=Strategy.GROUP, group_size=32)
INT4_CHANNEL = WeightScheme(type=WeightType.INT4, strategy=Strategy.CHANNEL)
INT8 = WeightScheme(type=WeightType.INT8, strategy=Strategy.CHANNEL, observer=Observer.ABSMAX)
FP8 = WeightScheme(type=WeightType.FP8, strategy=Strategy.CHANNEL)
SCHEME_OF: dict[Operator, WeightScheme | None] = {
    Operator.LINEAR_DENSE: None,
    Operator.LINEAR_INT4: INT4,
    Operator.LINEAR_INT8: INT8,
    Operator.LINEAR_FP8: FP8,
    Operator.GROUPED_DENSE: None,
    Operator.GROUPED_INT4: INT4,
    Operator.GROUPED_FP8: FP8,
}
NUM_EXPERTS = 3
ROWS_PER_EXPERT = (2, 0, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """An operator's arguments; `tensors` are those of its weight, as they are stored."""

    use: Use
    x: Tensor
    tensors: tuple[Tensor, ...]
    bias: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """In the operator's order."""
        if self.use.operator.is_grouped:
            return (self.x, torch.tensor(ROWS_PER_EXPERT), *self.tensors)
        return (self.x, *self.tensors, self.bias)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_case(
    operator: Operator,
    *,
    scheme: WeightScheme | None = None,
    shape: tuple[int, int] = (64, 128),
    dtype: torch.dtype = torch.bfloat16,
    rows: tuple[int, ...] = (2, 3),
    bias: bool = False,
) -> Case:
    """Random inputs and weights; of grouped operators, `ROWS_PER_EXPERT` rows of each expert."""
    chosen = scheme or SCHEME_OF[operator]
    use = Use(
        name="proj",
        scheme=chosen,
        out_features=shape[0],
        in_features=shape[1],
        dtype=dtype,
        device=torch.device("cpu"),
        num_experts=NUM_EXPERTS if operator.is_grouped else None,
    )
    stack = [stored(random(*shape, seed=expert, dtype=dtype), chosen) for expert in range(NUM_EXPERTS)]
    leading = (sum(ROWS_PER_EXPERT),) if operator.is_grouped else rows
    return Case(
        use=use,
        x=random(*leading, shape[1], seed=9, dtype=dtype),
        tensors=tuple(map(torch.stack, zip(*stack, strict=True))) if operator.is_grouped else stack[0],
        bias=random(shape[0], seed=8, dtype=dtype) if bias else None,
    )


def stored(weight: Tensor, scheme: WeightScheme | None) -> tuple[Tensor, ...]:
    """The tensors that a layer has for a weight."""
    if scheme is None:
        return (weight,)
    quantized = quantize_weight(weight, scheme)
    codes = pack_int4(quantized.codes) if scheme.type is WeightType.INT4 else quantized.codes
    return (codes, quantized.scale)
