import math

import pytest
import torch
from quantizers.quantizer_cases import SCHEMES, heavy_tailed

from llama4_quant.quantizers.error import WeightError, measure
from llama4_quant.quantizers.quantize import QuantizedWeight, dequantize_weight, quantize_weight


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_measure_sums_squares_over_the_whole_weight(name: str) -> None:
    weight = heavy_tailed((300, 256), 1)
    quantized = quantize_weight(weight, SCHEMES[name])
    error = measure(weight, quantized)
    difference = weight.double() - dequantize_weight(quantized, torch.float32).double()
    # 76,800 terms in float64: both sums are within 76,800 * 2^-53 < 1e-11 of the true one.
    assert error.squared_error == pytest.approx(float(difference.square().sum()), rel=2e-11)
    assert error.squared_weight == pytest.approx(float(weight.double().square().sum()), rel=2e-11)
    assert error.scale_min == float(quantized.scale.min())
    assert error.scale_max == float(quantized.scale.max())
    assert error.scale_min < error.scale_max


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_parts_merge_to_the_whole(name: str) -> None:
    weight = heavy_tailed((300, 256), 2)
    whole = measure(weight, quantize_weight(weight, SCHEMES[name]))
    merged, *others = [measure(rows, quantize_weight(rows, SCHEMES[name])) for rows in weight.split(128)]
    for other in others:
        merged = merged.merge(other)
    # Sums within a row are the same; adding 300 of them in another order moves the result by at most 300 * 2^-53.
    assert merged.squared_error == pytest.approx(whole.squared_error, rel=300 * 2.0**-53)
    assert merged.squared_weight == pytest.approx(whole.squared_weight, rel=300 * 2.0**-53)
    assert (merged.scale_min, merged.scale_max) == (whole.scale_min, whole.scale_max)


def test_relative_error_and_decibels() -> None:
    error = WeightError(squared_error=1.0, squared_weight=100.0, scale_min=0.1, scale_max=0.2)
    assert error.relative_error == pytest.approx(0.1)
    assert error.sqnr_db == pytest.approx(20.0)


def test_a_wrong_scale_shows() -> None:
    weight = heavy_tailed((16, 128), 3)
    quantized = quantize_weight(weight, SCHEMES["FP8_DYNAMIC-None-mse"])
    doubled = QuantizedWeight(codes=quantized.codes, scale=quantized.scale * 2, scheme=quantized.scheme)
    # Every weight comes out doubled, so the error is the weight itself, but for fp8 rounding: 1/16 of it, doubled.
    assert 1 - 2 / 16 <= measure(weight, doubled).relative_error <= 1 + 2 / 16


def test_nothing_lost_is_infinitely_many_decibels() -> None:
    weight = torch.zeros(4, 128, dtype=torch.bfloat16)
    error = measure(weight, quantize_weight(weight, SCHEMES["W4A16-128-mse"]))
    assert error.relative_error == 0.0
    assert error.sqnr_db == math.inf
