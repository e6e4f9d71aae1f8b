"""Tensors of a checkpoint that is not quantized: every tensor under its own name, in BF16, experts fused.

This is the layout that transformers writes, so it is what Meta's original checkpoints are converted to. Its config.json
has no `quantization_config`. In a compressed-tensors checkpoint the same module names the weights that stay BF16.
"""

from collections.abc import Sequence

import torch

from llama4_quant.checkpoint.layout import OutputTensor


def output_tensors(name: str, shape: Sequence[int]) -> tuple[OutputTensor, ...]:
    """The one tensor that stores a weight: `name` with all its suffixes, shape as it is in the source."""
    return (OutputTensor(name=name, dtype=torch.bfloat16, shape=tuple(shape)),)
