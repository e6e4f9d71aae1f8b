"""The reference operators against sums written out, and against the quantizers' own dequantization."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llama4_quant.ops import reference
from llama4_quant.quantizers.packing import pack_int4
from llama4_quant.quantizers.quantize import QuantizedWeight, dequantize_weight, quantize_weight
from llama4_quant.scheme import Strategy, WeightScheme, WeightType

INT4_GROUP = WeightScheme(type=WeightType.INT4, strategy=Strategy.GROUP, group_size=32)
INT4_CHANNEL = WeightScheme(type=WeightType.INT4, strategy=Strategy.CHANNEL)
FP8_CHANNEL = WeightScheme(type=WeightType.FP8, strategy=Strategy.CHANNEL)
FP8_BLOCK = WeightScheme(type=WeightType.FP8, strategy=Strategy.BLOCK)
# 130 rows and 20 inputs: neither a multiple of a block nor of a word of codes.
CASES = [
    (INT4_GROUP, (6, 64)),
    (INT4_CHANNEL, (6, 64)),
    (INT4_CHANNEL, (5, 20)),
    (FP8_CHANNEL, (5, 20)),
    (FP8_BLOCK, (130, 256)),
    (FP8_BLOCK, (7, 128)),
]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _dequantized(q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    if q.scheme.type is WeightType.INT4:
        return reference.dequantize_int4(pack_int4(q.codes), q.scale, q.shape[1], dtype)
    return reference.dequantize_fp8(q.codes, q.scale, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scheme", "shape"), CASES)
def test_dequantization_equals_the_quantizers(scheme: WeightScheme, shape: tuple[int, int], dtype: torch.dtype) -> None:
    quantized = quantize_weight(_random(*shape, dtype=torch.bfloat16), scheme)
    assert torch.equal(_dequantized(quantized, dtype), dequantize_weight(quantized, dtype))


@pytest.mark.parametrize("bias", [None, _random(6, seed=3)])
def test_linear_int4_written_out(bias: Tensor | None) -> None:
    x, q = _random(2, 3, 64, seed=1), quantize_weight(_random(6, 64), INT4_GROUP)
    expected = torch.zeros(2, 3, 6, dtype=torch.float64)
    for n in range(6):
        for k in range(64):
            expected[..., n] += x[..., k].double() * float(q.codes[n, k]) * float(q.scale[n, k // 32])
        expected[..., n] += 0.0 if bias is None else float(bias[n])
    actual = reference.linear_int4(x, pack_int4(q.codes), q.scale, bias)
    # 64 products and a bias summed in fp32: at most 65 roundings of 2^-24 of partial sums, themselves below 64 * 4.
    torch.testing.assert_close(actual.double(), expected, atol=65 * 2**-24 * 256, rtol=0)


@pytest.mark.parametrize(("scheme", "shape"), [case for case in CASES if case[0].type is WeightType.FP8])
def test_linear_fp8_written_out(scheme: WeightScheme, shape: tuple[int, int]) -> None:
    num_outputs, num_inputs = shape
    q = quantize_weight(_random(*shape), scheme)
    x, bias = _random(2, 3, num_inputs, seed=1), _random(num_outputs, seed=2)
    group_size = 128 if scheme is FP8_BLOCK else num_inputs
    rounded = torch.cat([_rounded_token_by_token(part) for part in x.split(group_size, dim=-1)], dim=-1)
    expected = rounded @ dequantize_weight(q, torch.float32).T + bias
    actual = reference.linear_fp8(x, q.codes, q.scale, bias)
    # The same products in another order: K roundings of 2^-24 of partial sums below 16 * sqrt(K) here.
    torch.testing.assert_close(actual, expected, atol=num_inputs * 2**-24 * 16 * num_inputs**0.5, rtol=0)


def _rounded_token_by_token(x: Tensor) -> Tensor:
    rounded = torch.empty_like(x)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in x.shape[:-1])):
        token = x[tuple(index)]
        scale = token.abs().max() / 448
        rounded[tuple(index)] = (token / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded


def test_activations_of_zero_stay_zero() -> None:
    x = torch.zeros(2, 128)
    assert torch.equal(reference.round_activations_fp8(x), x)
    assert torch.equal(reference.round_activations_fp8(x, group_size=64), x)


@given(st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]), st.floats(-20, 20))
@settings(max_examples=50, deadline=None)
def test_activation_rounding_error(seed: int, dtype: torch.dtype, exponent: float) -> None:
    x = (_random(4, 64, seed=seed) * 2.0**exponent).to(dtype)
    error = (reference.round_activations_fp8(x).double() - x.double()).abs()
    absmax = x.double().abs().amax(dim=-1, keepdim=True)
    # e4m3 has 3 mantissa bits: half a step is 2^-4 of the value, or 2^-10 of the scale (absmax/448) where subnormal.
    # Scale, quotient and product are each rounded to dtype: three roundings of eps/2, twice to be safe on both sides.
    slack = 1 + 6 * torch.finfo(dtype).eps
    bound = torch.maximum(x.double().abs() * 2**-4, absmax / 448 * 2**-10) * slack
    bound += 3 * torch.finfo(dtype).eps * x.double().abs()
    assert (error <= bound).all()


def _stack(scheme: WeightScheme, num_experts: int, shape: tuple[int, int]) -> list[QuantizedWeight]:
    return [quantize_weight(_random(*shape, seed=seed), scheme) for seed in range(num_experts)]


@pytest.mark.parametrize("rows_per_expert", [[2, 0, 3, 1], [0, 0, 0, 6], [6, 0, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize(("scheme", "shape"), CASES)
def test_grouped_equals_one_linear_per_expert(
    scheme: WeightScheme, shape: tuple[int, int], rows_per_expert: list[int]
) -> None:
    stack = _stack(scheme, 4, shape)
    x = _random(sum(rows_per_expert), shape[1], seed=9)
    scales = torch.stack([q.scale for q in stack])
    codes = torch.stack([q.codes for q in stack])
    if scheme.type is WeightType.INT4:
        actual = reference.grouped_int4(x, torch.tensor(rows_per_expert), pack_int4(codes), scales)
        parts = [
            reference.linear_int4(rows, pack_int4(q.codes), q.scale)
            for rows, q in zip(x.split(rows_per_expert), stack, strict=True)
        ]
    else:
        actual = reference.grouped_fp8(x, torch.tensor(rows_per_expert), codes, scales)
        parts = [
            reference.linear_fp8(rows, q.codes, q.scale)
            for rows, q in zip(x.split(rows_per_expert), stack, strict=True)
        ]
    assert torch.equal(actual, torch.cat(parts))


def test_experts_without_rows_are_not_touched() -> None:
    weight = torch.full((3, 4, 8), torch.nan)
    weight[1] = _random(4, 8)
    x = _random(5, 8, seed=1)
    assert torch.equal(reference.grouped_dense(x, torch.tensor([0, 5, 0]), weight), x @ weight[1].T)


@pytest.mark.parametrize("rows_per_expert", [[2, 0, 3, 1], [0, 0, 0, 1]])
def test_work_is_that_of_the_rows_whatever_the_experts(rows_per_expert: list[int]) -> None:
    x = _random(sum(rows_per_expert), 8)
    with FlopCounterMode(display=False) as counter:
        reference.grouped_dense(x, torch.tensor(rows_per_expert), _random(4, 16, 8))
    assert counter.get_total_flops() == 2 * len(x) * 16 * 8
