"""Routing: the right experts, the score on their input, and no row of work too many."""

import pytest
import torch
from runtime.tiny_model import text_config
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from llama4_quant.errors import SchemeError
from llama4_quant.quantizers.packing import pack_int4
from llama4_quant.quantizers.quantize import dequantize_weight, quantize_weight
from llama4_quant.runtime.experts import MixtureOfExperts, RoutedExperts, make_stack
from llama4_quant.runtime.linear import Builder
from llama4_quant.scheme import Strategy, WeightScheme, WeightType

INT4 = WeightScheme(type=WeightType.INT4, strategy=Strategy.GROUP, group_size=32)
FP8 = WeightScheme(type=WeightType.FP8, strategy=Strategy.CHANNEL)


def _builder(scheme: WeightScheme | None = None, dtype: torch.dtype = torch.float32) -> Builder:
    def scheme_of(name: str) -> WeightScheme | None:
        return scheme if ".experts." in name else None

    return Builder(dtype=dtype, device=torch.device("cpu"), scheme_of=scheme_of, name="layers.0.feed_forward")


def _moe(experts_per_token: int, num_experts: int = 5) -> MixtureOfExperts:
    config = text_config(num_experts_per_tok=experts_per_token, num_local_experts=num_experts)
    moe = MixtureOfExperts(config.text, _builder())
    generator = torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return moe


def _tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1))


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("experts_per_token", [1, 2, 5])
def test_definition_token_by_token(experts_per_token: int) -> None:
    moe, x = _moe(experts_per_token), _tokens(2, 7)
    experts = moe.experts
    expected = moe.shared_expert(x)
    for b in range(2):
        for t in range(7):
            logits = moe.router.weight @ x[b, t]
            for e in logits.argsort(descending=True)[:experts_per_token].tolist():
                scored = torch.sigmoid(logits[e]) * x[b, t]
                weights = (experts.gate_proj.weight[e], experts.up_proj.weight[e], experts.down_proj.weight[e])
                expected[b, t] += _swiglu(scored, *weights)
    # The same fp32 sums in another order: assert_close's default of 1.3e-6 relative, 1e-5 absolute.
    torch.testing.assert_close(moe(x), expected)


@pytest.mark.parametrize("experts_per_token", [1, 2])
@pytest.mark.parametrize("num_tokens", [1, 3, 64])
def test_exactly_k_rows_of_work_per_token(experts_per_token: int, num_tokens: int) -> None:
    moe, x = _moe(experts_per_token, num_experts=16), _tokens(num_tokens)

    def of_grouped(x_shape: list[int], _rows: list[int], weight_shape: list[int], **_: object) -> int:
        return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]  # that it is so: test_reference_ops.py

    with FlopCounterMode(display=False, custom_mapping={torch.ops.llama4_quant.grouped_dense: of_grouped}) as counter:
        moe(x)
    hidden, intermediate, rows = 64, 32, num_tokens * experts_per_token
    per_row = 3 * 2 * hidden * intermediate  # gate, up and down; a multiply-add is two operations
    router = 2 * num_tokens * hidden * 16
    shared = num_tokens * per_row
    assert counter.get_total_flops() == rows * per_row + shared + router


def test_result_of_a_token_does_not_depend_on_the_others_order() -> None:
    moe, x = _moe(2), _tokens(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(moe(x[order]), moe(x)[order])


def test_quantized_stacks_equal_dense_stacks_of_their_values() -> None:
    config = text_config(num_local_experts=3).text
    quantized, dense = RoutedExperts(config, _builder(INT4).child("experts")), RoutedExperts(config, _builder())
    for name, shape in (("gate_proj", (32, 64)), ("up_proj", (32, 64)), ("down_proj", (64, 32))):
        for expert in range(3):
            q = quantize_weight(torch.randn(shape, generator=torch.Generator().manual_seed(expert)), INT4)
            target = quantized.get_submodule(name).stored(expert)
            target["weight_packed"].copy_(pack_int4(q.codes))
            target["weight_scale"].copy_(q.scale)
            dense.get_submodule(name).stored(expert)["weight"].copy_(dequantize_weight(q, torch.float32))
    rows = torch.tensor([4, 0, 2])
    assert torch.equal(quantized(_tokens(6), rows), dense(_tokens(6), rows))


def test_stack_shapes() -> None:
    stack = make_stack(_builder(FP8).child("experts"), "up_proj", 3, 32, 64)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stack.stored().items()} == {
        "weight": ((3, 32, 64), torch.float8_e4m3fn),
        "weight_scale": ((3, 32, 1), torch.float32),
    }
    # An expert's part is a view: what a loader writes there is in the stack.
    stack.stored(1)["weight_scale"].fill_(7)
    assert torch.equal(stack.stored()["weight_scale"][1], torch.full((32, 1), 7.0))


def test_experts_of_a_layer_share_one_scheme() -> None:
    builder = Builder(
        dtype=torch.float32,
        device=torch.device("meta"),
        scheme_of=lambda name: None if ".2." in name else INT4,
        name="experts",
    )
    with pytest.raises(SchemeError, match=r"experts\.2\.gate_proj is stored as None, but experts\.0\.gate_proj"):
        make_stack(builder, "gate_proj", 3, 32, 64)
