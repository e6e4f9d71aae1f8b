"""Rotations against complex numbers and scalar formulas."""

import cmath
import math

import torch
from runtime.tiny_model import image_config, text_config

from llama4_quant.runtime.rope import TextRotary, VisionRotary, text_frequencies, vision_angles

SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_adjacent_pairs_turn_like_complex_numbers() -> None:
    rotary = TextRotary(text_config(rope_theta=100.0).text)
    x = torch.randn(1, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    y = rotary(torch.tensor([[0, 1, 7]])).apply(x)
    for t, position in enumerate((0, 1, 7)):
        for head in range(2):
            for pair in range(8):
                angle = position * 100.0 ** (-2 * pair / 16)
                value = complex(*x[0, t, head, 2 * pair : 2 * pair + 2].tolist()) * cmath.exp(1j * angle)
                # Angles up to 7 in fp32: 7 * 2^-24 of error, times values below 4, and the product's own rounding.
                assert abs(value - complex(*y[0, t, head, 2 * pair : 2 * pair + 2].tolist())) < 64 * 2**-24


def test_llama3_scaling_has_three_ranges() -> None:
    plain = text_frequencies(text_config(rope_theta=10000.0).text)
    scaled = text_frequencies(text_config(rope_theta=10000.0, rope_scaling=SCALING).text)
    kinds = set()
    for before, after in zip(plain.tolist(), scaled.tolist(), strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 64 / 4:
            expected, kind = before, "kept"
        elif wavelength > 64 / 1:
            expected, kind = before / 8, "slowed"
        else:
            share = (64 / wavelength - 1) / (4 - 1)
            expected, kind = (1 - share) * before / 8 + share * before, "blended"
        kinds.add(kind)
        assert math.isclose(after, expected, rel_tol=8 * 2**-24)  # a handful of fp32 operations
    assert kinds == {"kept", "slowed", "blended"}


def test_equal_factors_blend_nothing() -> None:
    """Scout: both factors 1."""
    scaling = SCALING | {"high_freq_factor": 1.0}
    plain = text_frequencies(text_config(rope_theta=10000.0).text)
    scaled = text_frequencies(text_config(rope_theta=10000.0, rope_scaling=scaling).text)
    assert torch.equal(scaled, torch.where(2 * math.pi / plain > 64, plain / 8, plain))


def test_vision_angles() -> None:
    vision = image_config().vision
    assert vision is not None
    angles = vision_angles(vision)  # 4 x 4 patches, heads of 16: 4 pairs for the column, 4 for the row
    assert angles.shape == (17, 8)
    for row in range(4):
        for column in range(4):
            frequencies = [10000.0 ** (-2 * pair / 8) for pair in range(4)]
            expected = [(column + 1) * f for f in frequencies] + [(row + 1) * f for f in frequencies]
            torch.testing.assert_close(angles[4 * row + column], torch.tensor(expected))
    x = torch.randn(1, 17, 2, 16)
    assert torch.equal(VisionRotary(vision)().apply(x)[:, -1], x[:, -1])  # the class token is not turned


def test_result_has_the_dtype_of_the_input() -> None:
    rotation = TextRotary(text_config().text)(torch.tensor([[5]]))
    x = torch.randn(1, 1, 2, 16)
    assert torch.equal(rotation.apply(x.bfloat16()), rotation.apply(x.bfloat16().float()).bfloat16())
