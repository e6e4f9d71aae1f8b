"""The arithmetic of quantized weights, as functions on tensors: nothing here knows of models.

Layers import operators from this package, not from a backend's module: which implementation runs is decided here.
Today that is the pure PyTorch reference, which every faster kernel is tested against.
"""

from llama4_quant.ops.reference import grouped_dense, grouped_fp8, grouped_int4, linear_fp8, linear_int4

__all__ = ["grouped_dense", "grouped_fp8", "grouped_int4", "linear_fp8", "linear_int4"]
