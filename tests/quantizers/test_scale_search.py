import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from quantizers.quantizer_cases import SCHEMES, heavy_tailed, lanes, weights

from llama4_quant.quantizers.quantize import QuantizedWeight, dequantize_weight, grid_of, quantize_weight
from llama4_quant.quantizers.search import choose_scales, round_to_bf16
from llama4_quant.scheme import preset

MSE_NAMES = sorted(name for name in SCHEMES if name.endswith("-mse"))


def lane_errors(weight: torch.Tensor, quantized: QuantizedWeight) -> torch.Tensor:
    error = weight.double() - dequantize_weight(quantized, torch.float32).double()
    return lanes(error, quantized.scheme).square().sum(1)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(MSE_NAMES))
def test_mse_is_never_worse_than_absmax_for_any_scale(data: st.DataObject, name: str) -> None:
    scheme = SCHEMES[name]
    weight = data.draw(weights(scheme))
    searched = lane_errors(weight, quantize_weight(weight, scheme))
    plain = lane_errors(weight, quantize_weight(weight, SCHEMES[name.replace("-mse", "-absmax")]))
    # The search compares sums in float32. Each term is a rounded difference (twice, as it is squared), a rounded
    # square, and as many rounded additions as the tree is deep: relative error (depth + 3) 2^-24 on either side.
    depth = math.ceil(math.log2(lanes(weight, scheme).shape[1]))
    slack = 2 * (depth + 4) * 2.0**-24
    assert (searched <= plain * (1 + slack)).all()


@pytest.mark.parametrize("name", MSE_NAMES)
def test_mse_finds_the_best_candidate_of_a_naive_search(name: str) -> None:
    scheme = SCHEMES[name]
    grid = grid_of(scheme)
    weight = heavy_tailed((160, 384), seed=5)
    tiles = lanes(weight, scheme)
    base = tiles.abs().amax(1).float() / grid.absmax_code
    candidates = [round_to_bf16(base * factor) for factor in (1.0, *grid.factors[scheme.strategy])]
    errors = torch.stack(
        [
            (tiles - grid.nearest_((tiles / s[:, None]).float()) * s[:, None].double()).square().sum(1)
            for s in candidates
        ]
    )
    found = quantize_weight(weight, scheme).scale.float().reshape(-1)
    least = errors.min(0).values
    is_candidate = torch.stack([found == scale for scale in candidates])
    # Candidates may tie up to the float32 sums of the search; (depth + 4) 2^-24 either side, depth <= 14.
    assert torch.where(is_candidate, errors, math.inf).min(0).values.le(least * (1 + 36 * 2.0**-24)).all()
    assert (found != candidates[0]).any(), "the search must move some scales"


@pytest.mark.parametrize("name", MSE_NAMES)
def test_mse_lowers_the_error_of_heavy_tailed_weights(name: str) -> None:
    weight = heavy_tailed((128, 1024), seed=1)
    searched = lane_errors(weight, quantize_weight(weight, SCHEMES[name])).sum()
    plain = lane_errors(weight, quantize_weight(weight, SCHEMES[name.replace("-mse", "-absmax")])).sum()
    # What the docstrings of int4.py and fp8.py measure: at least 14 % and 3 % more error for absmax.
    assert plain / searched > (1.10 if name.startswith("W4A16") else 1.02)


def test_a_lane_of_zeros_has_scale_one_and_a_tiny_one_is_never_subnormal() -> None:
    weight_SL = torch.tensor([[0.0, 2.0**-140, 2.0**-120], [-0.0, 0.0, -(2.0**-121)]])
    grid = grid_of(SCHEMES["W4A16--1-mse"])
    for factors in ((), grid.factors["channel"]):
        scale = choose_scales(weight_SL, weight_SL.abs().amax(0), grid, factors)
        assert scale[0] == 1.0
        assert scale[1] == 2.0**-126
        assert 2.0**-126 <= scale[2] <= 2.0**-120


@settings(max_examples=30, deadline=None)
@given(exponent=st.integers(-100, 100), seed=st.integers(0, 2**31), name=st.sampled_from(sorted(SCHEMES)))
def test_a_power_of_two_moves_the_scale_and_no_code(exponent: int, seed: int, name: str) -> None:
    weight = heavy_tailed((3, 128), seed, sigma=1.0)
    plain = quantize_weight(weight, SCHEMES[name])
    moved = quantize_weight(weight * 2.0**exponent, SCHEMES[name])
    assert torch.equal(moved.codes.view(torch.int8), plain.codes.view(torch.int8))
    assert torch.equal(moved.scale.double(), plain.scale.double() * 2.0**exponent)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), group_size=st.sampled_from([32, 64, 128, -1]))
def test_int4_absmax_scale_is_half_the_range_rounded_to_bf16(seed: int, group_size: int) -> None:
    scheme = preset("W4A16", group_size=group_size, observer="absmax").weights
    weight = heavy_tailed((5, 256), seed)
    expected = (lanes(weight, scheme).abs().amax(1).float() / 7.5).to(torch.bfloat16)
    scale = quantize_weight(weight, scheme).scale
    assert scale.dtype is torch.bfloat16
    assert torch.equal(scale.reshape(-1), expected)


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8_BLOCK"])
def test_fp8_scales_are_float32_that_bf16_can_hold(name: str) -> None:
    for observer in ("absmax", "mse"):
        scale = quantize_weight(heavy_tailed((200, 256), 3), preset(name, observer=observer).weights).scale
        assert scale.dtype is torch.float32
        assert torch.equal(scale, scale.to(torch.bfloat16).float())
