"""Tensors of an FP8 checkpoint for transformers' `FbgemmFp8Config`, experts fused as in the BF16 checkpoint.

    linear, [N, K]       name.weight              e4m3fn [N, K]
                         name.weight_scale        fp32   [N, 1]
    gate and up          experts.gate_up_proj     e4m3fn [E, H, 2I]   [in, out] of each expert, gate first
                         experts.gate_up_proj_scale fp32 [E, 1, 2I]
    down                 experts.down_proj        e4m3fn [E, I, H]
                         experts.down_proj_scale  fp32   [E, H, 1]    (not [E, 1, H])

One scale per output channel, weight = code * scale. Activations are quantized per token while the model runs. Source:
transformers 5.23, `integrations/fbgemm_fp8.py` (FbgemmFp8Llama4TextExperts, FbgemmFp8Linear) and
`quantizers/quantizer_fbgemm_fp8.py`. Running it takes fbgemm-gpu and a GPU of compute capability 9.0 or more.

Every Linear that `modules_to_not_convert` does not name becomes an FP8 one, so all others must be named: the router
too (it is a Linear whose forward gives a pair, which the replacement does not), and the patch embedding, whose 588
inputs CUTLASS refuses.

Shape letters: E experts, H hidden, I intermediate, N out, K in.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llama4_quant.checkpoint.layout import OutputTensor
from llama4_quant.errors import SchemeError
from llama4_quant.formats import compressed_tensors
from llama4_quant.formats.compressed_tensors import EncodedRows
from llama4_quant.scheme import WeightScheme

QUANT_METHOD = "fbgemm_fp8"
ACTIVATION_SCALE_UB = 1200.0
"""Upper bound of activations that count for their scale; transformers' default."""
ALIGNMENT = 16
"""CUTLASS loads 16 bytes at a time."""

_EXPERT = re.compile(r"(\.experts)\.\d+\.\w+$")


def output_tensors(name: str, shape: tuple[int, int], scheme: WeightScheme) -> tuple[OutputTensor, ...]:
    """The tensors that store a weight of a Linear: those of compressed-tensors' float-quantized format.

    Args:
        name: module name, without ".weight".
        shape: (out_features, in_features).
        scheme: FP8 with one scale per channel.

    Raises:
        SchemeError: the kernels cannot take the shape.
    """
    _check_aligned(name, shape)
    return compressed_tensors.output_tensors(name, shape, scheme)


def expert_tensors(name: str, shape: Sequence[int]) -> tuple[OutputTensor, ...]:
    """The tensors that store fused experts.

    Args:
        name: of the fused tensor in the BF16 checkpoint: `...experts.gate_up_proj` or `...experts.down_proj`.
        shape: (experts, in_features, out_features).

    Raises:
        SchemeError: the kernels cannot take the shape.
    """
    num_experts, in_features, out_features = shape
    _check_aligned(name, (out_features, in_features))
    scale_shape = (num_experts, *_scale_shape(name, out_features))
    return (
        OutputTensor(name=name, dtype=torch.float8_e4m3fn, shape=(num_experts, in_features, out_features)),
        OutputTensor(name=f"{name}_scale", dtype=torch.float32, shape=scale_shape),
    )


def encode_expert(name: str, codes_NK: Tensor, scale_N1: Tensor, expert: int) -> tuple[EncodedRows, ...]:
    """What one expert contributes to the tensors of `expert_tensors`.

    Args:
        name: of the fused tensor.
        codes_NK: float8_e4m3fn [out, in]; of gate_up_proj, the outputs of gate and up together.
        scale_N1: float32 [out, 1].
        expert: its index.
    """
    return (
        EncodedRows(name=name, values=codes_NK.T.contiguous().unsqueeze(0), row_start=expert),
        EncodedRows(
            name=f"{name}_scale",
            values=scale_N1.to(torch.float32).reshape(1, *_scale_shape(name, len(scale_N1))),
            row_start=expert,
        ),
    )


def quantization_config(kept: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        kept: names of exactly the linear modules that are not quantized, experts one by one.
    """
    # transformers has one module for all experts of a layer.
    modules = dict.fromkeys(_EXPERT.sub(r"\1", name) for name in kept)
    return {
        "activation_scale_ub": ACTIVATION_SCALE_UB,
        "modules_to_not_convert": list(modules),
        "quant_method": QUANT_METHOD,
    }


def _scale_shape(name: str, out_features: int) -> tuple[int, int]:
    return (out_features, 1) if name.endswith(".down_proj") else (1, out_features)


def _check_aligned(name: str, shape: tuple[int, int]) -> None:
    if any(size % ALIGNMENT for size in shape):
        raise SchemeError(
            f"{name}: {shape[0]} outputs and {shape[1]} inputs, but --format fbgemm-fp8 needs multiples of "
            f"{ALIGNMENT}; leave this weight alone with --ignore '{name}'"
        )
