"""Rotary position embeddings: 1-D for text (with llama3 frequency scaling), 2-D for image patches.

Both rotate *adjacent* pairs of a head's features (x[2i], x[2i+1]), unlike Llama 3 in Hugging Face layout, which pairs
x[i] with x[i + D/2]. Angles, and the rotation itself, are in fp32 whatever the model's dtype.

Shape letters: B batch, D head dimension, H heads, P = D/2 pairs, T tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama4_quant.config import RopeScaling, TextConfig, VisionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """Cosine and sine per position and pair; fp32, [B or 1, T, P]."""

    cos: Tensor
    sin: Tensor

    def apply(self, x_BTHD: Tensor) -> Tensor:
        """Rotate every pair of every head; result in x's dtype."""
        even, odd = x_BTHD.float().reshape(*x_BTHD.shape[:-1], -1, 2).unbind(-1)
        cos, sin = self.cos.unsqueeze(2), self.sin.unsqueeze(2)  # the same for all heads
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        return rotated.flatten(-2).type_as(x_BTHD)


class TextRotary(nn.Module):
    """Rotations for text positions; the frequencies follow from the configuration and are never on meta."""

    frequencies: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.register_buffer("frequencies", text_frequencies(config), persistent=False)

    def forward(self, positions_BT: Tensor) -> Rotation:
        """Rotations for integer positions [B, T]."""
        return _rotation(positions_BT.unsqueeze(-1).float() * self.frequencies)


class VisionRotary(nn.Module):
    """Rotations for the patches of a tile and, last, its class token (which is not rotated)."""

    angles: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.register_buffer("angles", vision_angles(config), persistent=False)

    def forward(self) -> Rotation:
        """The same for every tile: [1, patches + 1, P]."""
        return _rotation(self.angles.unsqueeze(0))


def _rotation(angles_BTP: Tensor) -> Rotation:
    return Rotation(cos=angles_BTP.cos(), sin=angles_BTP.sin())


def text_frequencies(config: TextConfig) -> Tensor:
    """Radians per position of each pair: fp32 [P], on the CPU."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling is None else _llama3_scaled(frequencies, config.rope_scaling)


def _llama3_scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow the low frequencies down by `factor`, keep the high ones, and blend in between.

    A pair is "high" when its wavelength is below original_max_position_embeddings / high_freq_factor. Scout has both
    factors equal, so nothing lies in between.
    """
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    slowed = frequencies / scaling.factor
    scaled = torch.where(wavelengths > original / low, slowed, frequencies)
    if low == high:
        return scaled
    is_between = (wavelengths <= original / low) & (wavelengths >= original / high)
    share = (original / wavelengths - low) / (high - low)
    return torch.where(is_between, (1 - share) * slowed + share * frequencies, scaled)


def vision_angles(config: VisionConfig) -> Tensor:
    """Angles of each patch in reading order, then the class token's zeros: fp32 [patches + 1, P], on the CPU.

    The first half of the pairs turns with the patch's column, the second half with its row, both counted from 1.
    """
    side = config.image_size // config.patch_size
    pair_dim = config.hidden_size // config.num_attention_heads // 2
    exponents = torch.arange(0, pair_dim, 2, dtype=torch.float32, device="cpu") / pair_dim
    frequencies = 1.0 / config.rope_theta**exponents
    patches = torch.arange(side**2, device="cpu")
    columns, rows = patches % side + 1, patches // side + 1
    angles = torch.cat((columns[:, None] * frequencies, rows[:, None] * frequencies), dim=-1)
    return torch.cat((angles, angles.new_zeros(1, angles.shape[1])))
