"""The kernels for processors against sums in float64, with bounds for bfloat16 arithmetic; and how torch's repack."""

from dataclasses import replace

import pytest
import torch
from ops.op_cases import FP8, INT4, INT4_CHANNEL, INT8, Case, make_case, random, stored
from torch import Tensor

from llama4_quant.ops import Kernel, Operator, choose, native, reference, repack_int4
from llama4_quant.ops.torch_cpu import fp8_to_bf16, kernel_group_size
from llama4_quant.scheme import Strategy, WeightScheme, WeightType

FP8_BLOCK = WeightScheme(type=WeightType.FP8, strategy=Strategy.BLOCK)
INT4_128 = WeightScheme(type=WeightType.INT4, strategy=Strategy.GROUP, group_size=128)
EPS = 2.0**-8
"""Of one rounding to bfloat16: half of the distance between neighbours, relative."""


FAST = [Kernel.TORCH, Kernel.NATIVE]


def _run(case: Case, kernel: Kernel) -> Tensor:
    """On a copy of the weight, since repacking overwrites it."""
    use = case.use
    if kernel is Kernel.NATIVE and (reason := native.probe()) is not None:
        pytest.skip(reason)
    choice = choose(kernel, use)
    tensors = tuple(tensor.clone() for tensor in case.tensors)
    if choice.repacks:
        tensors = repack_int4(*tensors)
    return choice.call(*replace(case, tensors=tensors).arguments)


def _bound(exact: Tensor, absolute: Tensor, num_inputs: int) -> Tensor:
    """Of a product in bfloat16: weight rounded once (code * scale), sums in float32, then result and bias rounded.

    `absolute` is the same sum of magnitudes: what roundings of single terms are relative to.
    """
    return absolute * (EPS + num_inputs * 2.0**-24) + 2 * EPS * (exact.abs() + absolute * EPS)


def _check(case: Case, y: Tensor) -> None:
    """Against sums in float64 of the values that the stored tensors stand for."""
    x, weight = case.x, _dense(case)
    if case.use.scheme is not None and case.use.scheme.type is WeightType.FP8:
        group_size = None if case.use.scheme.strategy is Strategy.CHANNEL else 128
        x = reference.round_activations_fp8(x, group_size=group_size)
    x = x.double()
    if case.use.operator.is_grouped:
        parts = zip(x.split([2, 0, 3]), weight, strict=True)
        exact, absolute = map(torch.cat, zip(*((r @ w.T, r.abs() @ w.abs().T) for r, w in parts), strict=True))
    else:
        exact, absolute = x @ weight.T, x.abs() @ weight.abs().T
    if case.bias is not None:
        exact, absolute = exact + case.bias.double(), absolute + case.bias.double().abs()
    assert y.dtype is torch.bfloat16
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= _bound(exact, absolute, x.shape[-1])).all()


def _dense(case: Case) -> Tensor:
    if case.use.scheme is None:
        return case.tensors[0].double()
    codes, scale = case.tensors
    if case.use.scheme.type is WeightType.INT8:
        return codes.double() * scale.double()
    if case.use.scheme.type is WeightType.FP8:
        parts = zip(codes.view(-1, *codes.shape[-2:]), scale.view(-1, *scale.shape[-2:]), strict=True)
        return torch.stack([reference.dequantize_fp8(*part, torch.float64) for part in parts]).view(codes.shape)
    if codes.dim() == 2:
        return reference.dequantize_int4(codes, scale, case.use.in_features, torch.float64)
    stacks = zip(codes, scale, strict=True)
    return torch.stack([reference.dequantize_int4(*part, case.use.in_features, torch.float64) for part in stacks])


@pytest.mark.parametrize("scheme", [INT4, INT4_128, INT4_CHANNEL])
@pytest.mark.parametrize("shape", [(64, 128), (16, 384), (80, 256), (208, 128)])
@pytest.mark.parametrize("operator", [Operator.LINEAR_INT4, Operator.GROUPED_INT4])
@pytest.mark.parametrize("kernel", FAST)
def test_int4(kernel: Kernel, operator: Operator, scheme: WeightScheme, shape: tuple[int, int]) -> None:
    case = make_case(operator, scheme=scheme, shape=shape, bias=operator is Operator.LINEAR_INT4)
    _check(case, _run(case, kernel))


@pytest.mark.parametrize("shape", [(64, 128), (97, 40)])
@pytest.mark.parametrize("kernel", FAST)
def test_dense_experts(kernel: Kernel, shape: tuple[int, int]) -> None:
    case = make_case(Operator.GROUPED_DENSE, shape=shape)
    _check(case, _run(case, kernel))


@pytest.mark.parametrize("rows", [(1,), (2, 3), (40,)])
@pytest.mark.parametrize("shape", [(64, 128), (97, 48)])
@pytest.mark.parametrize("kernel", FAST)
def test_int8(kernel: Kernel, rows: tuple[int, ...], shape: tuple[int, int]) -> None:
    case = make_case(Operator.LINEAR_INT8, scheme=INT8, rows=rows, shape=shape, bias=True)
    _check(case, _run(case, kernel))


def test_int8_of_many_rows_goes_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama4_quant.ops.torch_cpu._INT8_TILE", 24)
    case = make_case(Operator.LINEAR_INT8, rows=(17,), bias=True)
    _check(case, _run(case, Kernel.TORCH))


@pytest.mark.parametrize(("scheme", "shape"), [(FP8, (64, 128)), (FP8, (97, 40)), (FP8_BLOCK, (300, 256))])
@pytest.mark.parametrize("operator", [Operator.LINEAR_FP8, Operator.GROUPED_FP8])
@pytest.mark.parametrize(("kernel", "tile"), [(Kernel.TORCH, 1), (Kernel.TORCH, 1 << 19), (Kernel.NATIVE, 1)])
def test_fp8(
    operator: Operator,
    scheme: WeightScheme,
    shape: tuple[int, int],
    kernel: Kernel,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llama4_quant.ops.torch_cpu._FP8_TILE", tile)
    case = make_case(operator, scheme=scheme, shape=shape, bias=operator is Operator.LINEAR_FP8)
    _check(case, _run(case, kernel))


def test_every_fp8_code_is_converted_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = codes.float()
    is_number = ~expected.isnan()
    converted = fp8_to_bf16(codes).float()
    assert torch.equal(converted[is_number], expected[is_number])
    assert torch.equal(converted.signbit(), expected.signbit())


@pytest.mark.parametrize("num_rows", [16, 64, 80, 144, 304])
def test_repacking_by_tiles_is_repacking_the_whole(num_rows: int) -> None:
    packed, scale = stored(random(num_rows, 128, dtype=torch.bfloat16), INT4)
    shifts = torch.arange(0, 32, 4)
    codes = (packed.unsqueeze(-1) >> shifts & 15).flatten(-2).to(torch.int32)
    whole = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    address = packed.data_ptr()
    repacked, scales = repack_int4(packed, scale)
    assert torch.equal(repacked, whole)
    assert repacked.data_ptr() == address  # in place: there is no second copy
    assert scales.shape == (4, num_rows, 2)
    assert torch.equal(scales[..., 0], scale.T)
    assert not scales[..., 1].any()


def test_groups_of_the_kernel() -> None:
    assert kernel_group_size(5120, 128) == 128
    assert kernel_group_size(5120, 5120) == 256
    assert kernel_group_size(8192 + 32, 8192 + 32) == 32
    assert kernel_group_size(40, 40) is None
