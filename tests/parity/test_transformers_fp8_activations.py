"""Dynamic FP8 rounding of activations, bit for bit as compressed-tensors does it inside transformers."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_config import QuantizationStatus

from llama4_quant.ops.reference import round_activations_fp8

PER_TOKEN = QuantizationArgs(num_bits=8, type="float", strategy="token", symmetric=True, dynamic=True)
PER_GROUP = QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=128, symmetric=True, dynamic=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("args", "group_size"), [(PER_TOKEN, None), (PER_GROUP, 128)], ids=["token", "group"])
def test_equal_bits(args: QuantizationArgs, group_size: int | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # 3-D, [batch, token, feature]: for a 2-D input compressed-tensors 0.20 takes one scale for all tokens.
    x = torch.randn(3, 50, 256, generator=generator) * torch.logspace(-3, 2, 50).view(1, -1, 1)
    x[:, 7] = 0
    x[0, 8, :128] = 0
    x[1, 9, 3] = 1000
    x = x.to(dtype)
    module = torch.nn.Linear(256, 1)
    module.quantization_status = QuantizationStatus.FROZEN
    expected = forward_quantize(module, x.clone(), "input", args)
    assert torch.equal(round_activations_fp8(x, group_size=group_size), expected.to(dtype))
