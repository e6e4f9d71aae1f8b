"""Our absmax scales and codes against compressed-tensors' `calculate_qparams` and `quantize`.

Its scales for bf16 weights are bf16: absmax / 7.5 or absmax / 448, rounded once, like ours. Its CPU code then divides
weight / scale in bf16, its GPU kernel in float32. Ours divides in float32, so codes are compared with float32 inputs;
the last test says exactly where the bf16 division differs.
"""

import pytest
import torch
from torch import Tensor

from llama4_quant.formats.compressed_tensors import quantization_config
from llama4_quant.quantizers.quantize import QuantizedWeight, dequantize_weight, quantize_weight
from llama4_quant.scheme import Scheme, preset

quantization = pytest.importorskip("compressed_tensors.quantization")
forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
utils = pytest.importorskip("compressed_tensors.quantization.utils")

SCHEMES = [
    *(preset("W4A16", group_size=size, observer="absmax") for size in (32, 64, 128, -1)),
    preset("FP8_DYNAMIC", observer="absmax"),
    preset("FP8_BLOCK", observer="absmax"),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
SHAPES = [(256, 1024), (300, 384), (1, 128)]


def arguments(scheme: Scheme) -> object:
    """Their QuantizationArgs, out of the configuration that we write."""
    config = quantization.QuantizationConfig.model_validate(quantization_config(scheme, []))
    return config.config_groups["group_0"].weights


def random_weight(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(torch.bfloat16)


def their_scales(weight: Tensor, scheme: Scheme) -> Tensor:
    """Minimum and maximum as llm-compressor's observers take them, then `calculate_qparams`."""
    num_rows, num_columns = weight.shape
    height, width = (128, 128) if scheme.weights.strategy == "block" else (1, scheme.weights.group_size or num_columns)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -num_rows % height))
    tiles = padded.view(padded.shape[0] // height, height, num_columns // width, width)
    scale, _ = utils.calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), arguments(scheme))
    return scale


def their_codes(weight: Tensor, quantized: QuantizedWeight, scheme: Scheme) -> Tensor:
    """`quantize` with our scale, in the dtype of `weight`."""
    scale = quantized.scale.to(weight.dtype)
    args = arguments(scheme)
    return forward.quantize(weight, scale, None, args, dtype=quantized.codes.dtype)


@every_scheme
@pytest.mark.parametrize("shape", SHAPES)
def test_scales_are_equal(scheme: Scheme, shape: tuple[int, int]) -> None:
    weight = random_weight(shape)
    theirs = their_scales(weight, scheme)
    assert theirs.dtype is torch.bfloat16
    assert torch.equal(quantize_weight(weight, scheme.weights).scale.float(), theirs.float())


@every_scheme
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_equal(scheme: Scheme, shape: tuple[int, int]) -> None:
    weight = random_weight(shape)
    quantized = quantize_weight(weight, scheme.weights)
    theirs = their_codes(weight.float(), quantized, scheme)
    assert torch.equal(theirs.view(torch.uint8), quantized.codes.view(torch.uint8))


@every_scheme
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantized_weights_are_equal(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> None:
    quantized = quantize_weight(random_weight(shape), scheme.weights)
    codes = quantized.codes
    if scheme.weights.strategy == "block" and shape[0] % 128:
        codes = codes.float()  # their padding is not implemented for fp8 tensors
    theirs = forward.dequantize(codes, quantized.scale.to(dtype), None, arguments(scheme))
    assert theirs.dtype is dtype
    assert torch.equal(theirs, dequantize_weight(quantized, dtype))


@every_scheme
def test_a_bf16_division_differs_only_where_it_rounds_onto_a_midpoint(scheme: Scheme) -> None:
    weight = random_weight((256, 1024))
    quantized = quantize_weight(weight, scheme.weights)
    theirs = their_codes(weight, quantized, scheme).float()
    ours = quantized.codes.float()
    differ = ours != theirs
    ones = QuantizedWeight(codes=torch.ones_like(quantized.codes), scale=quantized.scale, scheme=scheme.weights)
    scale = dequantize_weight(ones, torch.float32)
    rounded = (weight / scale.to(torch.bfloat16)).float()
    assert torch.equal((rounded - ours).abs()[differ], (rounded - theirs).abs()[differ])
    exact = weight.double() / scale.double()
    assert ((exact - ours).abs() < (exact - theirs).abs())[differ].all()
    assert differ.any(), "if they never differ, compare bf16 codes directly"
