"""What is asked of an operator, in the words that backends answer in: names, and where and on what it will run."""

from dataclasses import dataclass
from enum import StrEnum

import torch

from llama4_quant.errors import UsageError
from llama4_quant.quantizers.packing import packed_features
from llama4_quant.scheme import WeightScheme, WeightType


class Kernel(StrEnum):
    """What can be asked for with `--kernel`: a backend, or the first that can do the work."""

    AUTO = "auto"
    """The first of the others, in their order, that can."""
    NATIVE = "native"
    """Compiled C++ on the stored bytes (native.py)."""
    TORCH = "torch"
    """What torch brings for processors (torch_cpu.py); int4 weights are repacked once, after loading."""
    REFERENCE = "reference"
    """reference.py: any device, dtype and shape; quantized weights are dequantized in every call."""

    @classmethod
    def parse(cls, name: str) -> "Kernel":
        """Look up by name.

        Raises:
            UsageError: unknown; lists the known ones.
        """
        if name not in set(cls):
            raise UsageError(f"unknown kernel {name!r}; use one of {', '.join(cls)}")
        return cls(name)


class Operator(StrEnum):
    """A matrix product with a weight that is stored in one way; `grouped` ones take a stack, one weight an expert."""

    LINEAR_DENSE = "linear_dense"
    LINEAR_INT4 = "linear_int4"
    LINEAR_INT8 = "linear_int8"
    LINEAR_FP8 = "linear_fp8"
    GROUPED_DENSE = "grouped_dense"
    GROUPED_INT4 = "grouped_int4"
    GROUPED_FP8 = "grouped_fp8"

    @property
    def is_grouped(self) -> bool:
        """Rows come sorted by expert."""
        return self.value.startswith("grouped")


_LINEAR = {
    None: Operator.LINEAR_DENSE,
    WeightType.INT4: Operator.LINEAR_INT4,
    WeightType.INT8: Operator.LINEAR_INT8,
    WeightType.FP8: Operator.LINEAR_FP8,
}
_GROUPED = {
    None: Operator.GROUPED_DENSE,
    WeightType.INT4: Operator.GROUPED_INT4,
    WeightType.FP8: Operator.GROUPED_FP8,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """One weight, or stack of weights, and the inputs it will meet: all that the choice of a kernel depends on.

    Attributes:
        name: of the weight, for messages.
        scheme: how it is stored; None is dense, in the compute dtype.
        out_features: N.
        in_features: K.
        dtype: of the inputs and outputs.
        device: where all of it is.
        num_experts: E of a stack, None for a single weight.
    """

    name: str
    scheme: WeightScheme | None
    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device
    num_experts: int | None = None

    @property
    def operator(self) -> Operator:
        """What computes with this weight."""
        kind = None if self.scheme is None else self.scheme.type
        return (_LINEAR if self.num_experts is None else _GROUPED)[kind]

    def stored_tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype, by name on disk, of the tensors that store the weight; of a stack, with E in front."""
        leading = () if self.num_experts is None else (self.num_experts,)
        shape = (*leading, self.out_features, self.in_features)
        if self.scheme is None:
            return {"weight": (shape, self.dtype)}
        scale_shape = (*leading, *self.scheme.scale_shape(self.out_features, self.in_features))
        if self.scheme.type is WeightType.INT4:
            packed = (*leading, self.out_features, packed_features(self.in_features))
            return {"weight_packed": (packed, torch.int32), "weight_scale": (scale_shape, torch.bfloat16)}
        if self.scheme.type is WeightType.INT8:
            return {"weight": (shape, torch.int8), "weight_scale": (scale_shape, torch.bfloat16)}
        return {"weight": (shape, torch.float8_e4m3fn), "weight_scale": (scale_shape, torch.float32)}

    @property
    def group_size(self) -> int:
        """Consecutive inputs that share a scale; all of them where a row has one."""
        return (None if self.scheme is None else self.scheme.group_size) or self.in_features

    @property
    def dtype_name(self) -> str:
        """For messages: `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        """For messages: `lm_head: linear_int4 of [130, 64] int4 g32, bfloat16 on cpu`."""
        experts = "" if self.num_experts is None else f"{self.num_experts}, "
        shape = f"[{experts}{self.out_features}, {self.in_features}]"
        stored = "" if self.scheme is None else f"{self.scheme.label}, "
        return f"{self.name}: {self.operator} of {shape} {stored}{self.dtype_name} on {self.device.type}"
