"""Which tensors a linear layer allocates, and that it computes with them."""

import pytest
import torch

from llama4_quant.errors import SchemeError
from llama4_quant.ops import Kernel, reference
from llama4_quant.quantizers.packing import pack_int4
from llama4_quant.quantizers.quantize import quantize_weight
from llama4_quant.runtime.experts import make_stack
from llama4_quant.runtime.linear import Builder, DenseLinear, Fp8Linear, Int4Linear, Int8Linear, Linear, WeightStorage
from llama4_quant.runtime.model import materialize
from llama4_quant.scheme import Observer, Strategy, WeightScheme, WeightType

INT4 = WeightScheme(type=WeightType.INT4, strategy=Strategy.GROUP, group_size=32)
INT4_CHANNEL = WeightScheme(type=WeightType.INT4, strategy=Strategy.CHANNEL)
FP8 = WeightScheme(type=WeightType.FP8, strategy=Strategy.CHANNEL)
FP8_BLOCK = WeightScheme(type=WeightType.FP8, strategy=Strategy.BLOCK)
INT8 = WeightScheme(type=WeightType.INT8, strategy=Strategy.CHANNEL, observer=Observer.ABSMAX)
META = torch.device("meta")
CPU = torch.device("cpu")


def _linear(scheme: WeightScheme | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Linear:
    return Builder(dtype=dtype, device=device, scheme_of=lambda _: scheme).linear("proj", *shape, bias=True)


@pytest.mark.parametrize(
    ("scheme", "kind", "expected"),
    [
        (None, DenseLinear, {"weight": ((130, 256), torch.bfloat16)}),
        (INT4, Int4Linear, {"weight_packed": ((130, 32), torch.int32), "weight_scale": ((130, 8), torch.bfloat16)}),
        (
            INT4_CHANNEL,
            Int4Linear,
            {"weight_packed": ((130, 32), torch.int32), "weight_scale": ((130, 1), torch.bfloat16)},
        ),
        (INT8, Int8Linear, {"weight": ((130, 256), torch.int8), "weight_scale": ((130, 1), torch.bfloat16)}),
        (FP8, Fp8Linear, {"weight": ((130, 256), torch.float8_e4m3fn), "weight_scale": ((130, 1), torch.float32)}),
        (FP8_BLOCK, Fp8Linear, {"weight": ((130, 256), torch.float8_e4m3fn), "weight_scale": ((2, 2), torch.float32)}),
    ],
)
def test_storage_is_as_on_disk(
    scheme: WeightScheme | None, kind: type, expected: dict[str, tuple[tuple[int, int], torch.dtype]]
) -> None:
    linear = _linear(scheme, (130, 256), torch.bfloat16, META)
    assert type(linear) is kind
    assert {name: (tuple(t.shape), t.dtype) for name, t in linear.stored().items()} == expected
    assert linear.bias is not None
    assert linear.bias.shape == (130,)
    assert linear.bias.dtype is torch.bfloat16
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in linear.parameters())


def test_layers_compute_with_their_weights_and_bias() -> None:
    weight, x = torch.randn(6, 64), torch.randn(2, 64)
    bias = torch.randn(6)
    int4, int8, fp8 = (quantize_weight(weight, scheme) for scheme in (INT4, INT8, FP8))
    packed = pack_int4(int4.codes)
    for scheme, tensors, expected in (
        (None, {"weight": weight}, x @ weight.T + bias),
        (
            INT4,
            {"weight_packed": packed, "weight_scale": int4.scale},
            reference.linear_int4(x, packed, int4.scale, bias),
        ),
        (INT8, {"weight": int8.codes, "weight_scale": int8.scale}, x @ (int8.codes * int8.scale.float()).T + bias),
        (FP8, {"weight": fp8.codes, "weight_scale": fp8.scale}, reference.linear_fp8(x, fp8.codes, fp8.scale, bias)),
    ):
        linear = _linear(scheme, (6, 64), torch.float32, CPU)
        for name, target in linear.stored().items():
            target.copy_(tensors[name])
        assert linear.bias is not None
        linear.bias.copy_(bias)
        torch.testing.assert_close(linear(x), expected)


def test_builder_asks_by_full_name_and_checks_divisibility() -> None:
    asked: list[str] = []

    def scheme_of(name: str) -> WeightScheme:
        asked.append(name)
        return INT4

    builder = Builder(dtype=torch.bfloat16, device=META, scheme_of=scheme_of).child("model").child("layers.3")
    builder.linear("q_proj", 8, 64)
    with pytest.raises(SchemeError, match=r"model\.layers\.3\.k_proj: in_features 48 is not divisible"):
        builder.linear("k_proj", 8, 48)
    assert asked == ["model.layers.3.q_proj", "model.layers.3.k_proj"]


@pytest.mark.parametrize("num_experts", [None, 3])
def test_a_weight_is_repacked_once_and_in_place(num_experts: int | None) -> None:
    builder = Builder(dtype=torch.bfloat16, device=META, scheme_of=lambda _: INT4, kernel=Kernel.TORCH, name="e")
    if num_experts is None:
        layer: WeightStorage = builder.linear("proj", 64, 128)
    else:
        layer = make_stack(builder, "proj", num_experts, 64, 128)
    materialize(layer, "cpu")
    stored = layer.stored()
    packed = torch.randint(-(2**31), 2**31, stored["weight_packed"].shape, dtype=torch.int64).to(torch.int32)
    stored["weight_packed"].copy_(packed)
    stored["weight_scale"].fill_(0.5)  # a power of two: dequantized weights are exact in bf16
    x = torch.randint(-4, 5, (6, 128)).bfloat16()
    arguments = (x,) if num_experts is None else (x, torch.tensor([2, 0, 4]))
    before = layer(*arguments)  # not repacked yet: the reference takes the stored bytes
    layer.repack()
    layer.repack()  # nothing happens
    assert layer.choice.kernel is Kernel.TORCH
    assert layer.call is layer.choice.call
    assert layer.stored()["weight_packed"].data_ptr() == stored["weight_packed"].data_ptr()
    # Products and sums of these numbers are exact in float32, so both round once to the same bf16.
    assert torch.equal(layer(*arguments), before)
