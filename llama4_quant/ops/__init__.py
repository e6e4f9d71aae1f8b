"""The arithmetic of quantized weights, as functions on tensors: nothing here knows of models.

An operator is a matrix product with a weight that is stored in one way, alone (`linear_...`) or as a stack of experts
(`grouped_...`). reference.py defines what each computes; the other backends are faster and are tested against it. A
layer describes its weight as a `Use`, asks `choose` for a backend, and keeps and calls what it gets.

    choice = choose("auto", Use(name="down_proj", scheme=..., out_features=..., ...))
    y = choice.call(x, weight_packed, weight_scale, bias)
"""

from llama4_quant.ops.dispatch import Choice, KernelCount, choose, count_kernels, explain, overload
from llama4_quant.ops.torch_cpu import repack_int4
from llama4_quant.ops.use import Kernel, Operator, Use

__all__ = [
    "Choice",
    "Kernel",
    "KernelCount",
    "Operator",
    "Use",
    "choose",
    "count_kernels",
    "explain",
    "overload",
    "repack_int4",
]
