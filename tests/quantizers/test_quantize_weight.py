from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from quantizers.quantizer_cases import SCHEMES, heavy_tailed, lanes, scheme_names, weights
from torch.utils._python_dispatch import TorchDispatchMode

from llama4_quant.errors import QuantizationError, SchemeError
from llama4_quant.quantizers import lanes as lanes_module
from llama4_quant.quantizers.quantize import QuantizedWeight, dequantize_weight, quantize_weight
from llama4_quant.scheme import Strategy, WeightType


def same(first: QuantizedWeight, second: QuantizedWeight) -> bool:
    return torch.equal(first.codes.view(torch.int8), second.codes.view(torch.int8)) and torch.equal(
        first.scale, second.scale
    )


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), name=scheme_names)
def test_int4_is_within_half_a_step_and_fp8_within_half_a_unit(data: st.DataObject, name: str) -> None:
    scheme = SCHEMES[name]
    weight = data.draw(weights(scheme))
    quantized = quantize_weight(weight, scheme)
    scale = quantized.scale.double().reshape(-1, 1)
    exact, stored = lanes(weight, scheme), lanes(dequantize_weight(quantized, torch.float32), scheme)
    error = (exact - stored).abs()
    if scheme.type is WeightType.INT4:
        # Codes are exactly nearest for bf16 weights (quantize.py), so half a step where the code is not clamped.
        inside = (exact <= 7.5 * scale) & (exact >= -8.5 * scale)
        assert (error <= scale / 2)[inside].all()
        assert (stored == torch.where(exact > 0, 7, -8) * scale)[~inside].all()
    else:
        # 3 mantissa bits: half a unit is 2^-4 of the value's power of two; subnormals are multiples of 2^-9.
        # absmax / 448 rounded to bf16 may fall by 2^-9, so ratios reach 448 (1 + 2^-8), nearer to 448 than to 480.
        assert (error <= torch.maximum(exact.abs() * 2.0**-4, scale * 2.0**-10)).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=scheme_names)
def test_order_is_kept_among_weights_that_share_a_scale(data: st.DataObject, name: str) -> None:
    scheme = SCHEMES[name]
    weight = data.draw(weights(scheme))
    order = lanes(weight, scheme).sort(dim=1).indices
    stored = lanes(dequantize_weight(quantize_weight(weight, scheme), torch.float32), scheme).gather(1, order)
    assert (stored.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("name", sorted(SCHEMES))
@pytest.mark.parametrize("chunk_elements", [1, 5000])
def test_bytes_do_not_depend_on_chunks_or_strides(name: str, chunk_elements: int) -> None:
    scheme = SCHEMES[name]
    weight = heavy_tailed((150, 256), seed=2)
    transposed = weight.T.contiguous().T
    wide = torch.zeros(150, 300, dtype=weight.dtype)
    wide[:, 20:276] = weight
    whole = quantize_weight(weight, scheme)
    with mock.patch.object(lanes_module, "CHUNK_ELEMENTS", chunk_elements):
        for view in (weight, transposed, wide[:, 20:276]):
            assert same(quantize_weight(view, scheme), whole)
        assert torch.equal(dequantize_weight(whole), dequantize_weight(quantize_weight(transposed, scheme)))


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_parts_by_rows_give_the_bytes_of_the_whole(name: str) -> None:
    scheme = SCHEMES[name]
    weight = heavy_tailed((300, 256), seed=4)
    whole = quantize_weight(weight, scheme)
    parts = [quantize_weight(rows, scheme) for rows in weight.split(128)]
    assert torch.equal(torch.cat([p.codes.view(torch.int8) for p in parts]), whole.codes.view(torch.int8))
    assert torch.equal(torch.cat([p.scale for p in parts]), whole.scale)


@pytest.mark.parametrize("name", ["W4A16-128-mse", "W4A16--1-mse", "FP8_BLOCK-None-mse"])
@pytest.mark.parametrize("num_rows", [1, 64])  # torch splits a reduction to a single value among threads
def test_one_thread_and_two_give_the_same_bytes(name: str, num_rows: int) -> None:
    weight = heavy_tailed((num_rows, 65536 // num_rows), seed=6)
    one = quantize_weight(weight, SCHEMES[name])
    with num_threads(2):
        assert same(quantize_weight(weight, SCHEMES[name]), one)


@pytest.mark.parametrize("name", sorted(SCHEMES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_same_values_in_another_dtype_give_the_same_bytes(name: str, dtype: torch.dtype) -> None:
    weight = heavy_tailed((64, 256), seed=7)
    weight[weight.abs() < 1e-4] = 0  # fp16 would round these
    assert same(quantize_weight(weight.to(dtype), SCHEMES[name]), quantize_weight(weight, SCHEMES[name]))


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_zeros_of_either_sign_have_scale_one_and_come_back_as_zeros(name: str) -> None:
    weight = torch.zeros(130, 256, dtype=torch.bfloat16)
    weight[::2] = -0.0
    quantized = quantize_weight(weight, SCHEMES[name])
    assert (quantized.scale == 1).all()
    assert (dequantize_weight(quantized) == 0).all()


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_subnormal_weights_come_back_finite_and_within_one_smallest_scale(name: str) -> None:
    weight = torch.tensor([[1.0, -0.5, 0.0, 2.0] * 32] * 3) * 2.0**-140
    quantized = quantize_weight(weight, SCHEMES[name])
    # The scale is held at 2^-126, so int4 keeps nothing and fp8 only what its subnormals reach: error below one scale.
    assert (quantized.scale.float() == 2.0**-126).all()
    assert ((dequantize_weight(quantized, torch.float32) - weight).abs() <= 2.0**-126).all()


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_one_huge_outlier_is_stored_without_overflow(name: str) -> None:
    weight = heavy_tailed((4, 256), 8, sigma=1.0)
    weight[1, 5], weight[2, 200] = 2.0**126, -(2.0**126)
    quantized = quantize_weight(weight, SCHEMES[name])
    stored = dequantize_weight(quantized)
    assert torch.isfinite(stored).all()
    # Beside it all other weights of its group are nothing, so the error is its own, and absmax's is half a step: 1/15.
    for row, column in ((1, 5), (2, 200)):
        error = abs(float(stored[row, column]) - float(weight[row, column]))
        # bf16 rounding of the scale and of the result add 2^-8 and 2^-9 of the value at most.
        assert error <= 2.0**126 * (1 / 15 + 2.0**-8 + 2.0**-9)


def test_an_outlier_spoils_only_its_own_group() -> None:
    weight = heavy_tailed((2, 256), 9)
    plain = quantize_weight(weight, SCHEMES["W4A16-64-mse"])
    weight[1, 70] = 1000.0
    spoiled = quantize_weight(weight, SCHEMES["W4A16-64-mse"])
    changed = (plain.scale != spoiled.scale).nonzero().tolist()
    assert changed == [[1, 1]]
    codes_changed = (plain.codes != spoiled.codes).nonzero()
    assert codes_changed[:, 0].unique().tolist() == [1]
    assert 64 <= int(codes_changed[:, 1].min()) <= int(codes_changed[:, 1].max()) < 128


@settings(max_examples=20, deadline=None)
@given(value=st.floats(-1e4, 1e4, width=16))
def test_a_group_of_one_element_comes_back_to_half_a_step(value: float) -> None:
    weight = torch.tensor([[value]], dtype=torch.bfloat16)
    quantized = quantize_weight(weight, SCHEMES["W4A16--1-mse"])
    # absmax has error 1/2 step = |w|/15, and the search can only be better.
    error = (dequantize_weight(quantized, torch.float32) - weight).abs()
    assert float(error) <= abs(float(weight)) * (1 / 15 + 2.0**-8)


@pytest.mark.parametrize("name", sorted(SCHEMES))
@pytest.mark.parametrize(("bad", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
def test_nan_and_inf_are_named_by_their_position(name: str, bad: float, shown: str) -> None:
    weight = heavy_tailed((300, 256), 10)
    weight[290, 3] = float("nan")
    weight[257, 17] = bad
    weight[257, 20] = float("nan")
    with (
        mock.patch.object(lanes_module, "CHUNK_ELEMENTS", 3000),
        pytest.raises(QuantizationError, match=f"^row 257, column 17 is {shown};"),
    ):
        quantize_weight(weight.T.contiguous().T, SCHEMES[name])


@pytest.mark.parametrize(
    ("name", "in_features", "message"),
    [
        ("W4A16-64-mse", 96, "96 is not divisible by group size 64; use --group-size 32 or -1"),
        ("FP8_BLOCK-None-mse", 200, "200 is not divisible by block size 128; use FP8_DYNAMIC"),
    ],
)
def test_an_indivisible_width_says_what_to_do(name: str, in_features: int, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        quantize_weight(torch.ones(4, in_features), SCHEMES[name])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4), r"found shape \[4\]"),
        (torch.ones(2, 4, 128), r"found shape \[2, 4, 128\]"),
        (torch.ones(0, 128), r"found shape \[0, 128\]"),
        (torch.ones(4, 128, dtype=torch.float64), "found float64"),
        (torch.ones(4, 128, dtype=torch.int8), "found int8"),
    ],
)
def test_what_is_not_a_weight_matrix_is_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize_weight(weight, SCHEMES["FP8_DYNAMIC-None-absmax"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_dequantized_weights_are_the_rounded_product(name: str, dtype: torch.dtype) -> None:
    quantized = quantize_weight(heavy_tailed((200, 256), 11), SCHEMES[name])
    scale, size = quantized.scale.double(), (200, 256)
    if quantized.scheme.strategy is Strategy.BLOCK:
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: size[0], : size[1]]
    elif quantized.scheme.group_size:
        scale = scale.repeat_interleave(quantized.scheme.group_size, 1)
    product = quantized.codes.double() * scale
    assert torch.equal(product, product.float().double()), "exact in float32"
    stored = dequantize_weight(quantized, dtype)
    assert stored.dtype is dtype
    assert torch.equal(stored, product.float().to(dtype))


class LargestAllocation(TorchDispatchMode):
    """Records the storage sizes of everything that torch functions return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.sizes.add(result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_temporaries_stay_small_whatever_the_weight(name: str) -> None:
    weight = heavy_tailed((2048, 256), 12)
    with mock.patch.object(lanes_module, "CHUNK_ELEMENTS", 1 << 16), LargestAllocation() as allocations:
        quantized = quantize_weight(weight, SCHEMES[name])
        dequantize_weight(quantized)
    # A float32 chunk has 256 KiB. Larger are the codes and the result, and the weight that slices are views of.
    assert {size for size in allocations.sizes if size > 4 << 16} == {2048 * 256, 2048 * 256 * 2}
