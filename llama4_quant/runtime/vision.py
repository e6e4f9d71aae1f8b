"""The vision tower: tiles of pixels in, features at the width of its adapter out.

A tile is cut into patches, embedded, given learned positions (class token *last*), run through an encoder with 2-D
RoPE, stripped of the class token, shuffled (each 2 x 2 square of patches becomes one wider feature) and passed through
the adapter. Module names are those of Hugging Face checkpoints.

Shape letters: B tiles, C channels, H hidden, P patches, T = P + 1 tokens.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from llama4_quant.config import VisionConfig
from llama4_quant.runtime.linear import Builder
from llama4_quant.runtime.rope import Rotation, VisionRotary

LAYER_NORM_EPS = 1e-5
"""The models' own; `norm_eps` of the configuration has the same value and is read by no implementation."""


class LayerNorm(nn.Module):
    """With weight and bias."""

    def __init__(self, builder: Builder, size: int) -> None:
        super().__init__()
        self.weight = builder.parameter(size)
        self.bias = builder.parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, LAYER_NORM_EPS)


class PatchEmbedding(nn.Module):
    """Non-overlapping squares of pixels, each flattened channel first, times a matrix."""

    def __init__(self, config: VisionConfig, builder: Builder) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.linear = builder.linear("linear", config.hidden_size, config.num_channels * config.patch_size**2)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, C, height, width] -> [B, P, H], patches in reading order."""
        y: Tensor = self.linear(unfold_patches(pixels, self.patch_size))
        return y


def unfold_patches(pixels: Tensor, patch_size: int) -> Tensor:
    """[B, C, height, width] -> [B, P, C * patch_size^2], patches in reading order."""
    return functional.unfold(pixels, kernel_size=patch_size, stride=patch_size).transpose(1, 2)


class VisionAttention(nn.Module):
    """Full attention among the tokens of a tile."""

    def __init__(self, config: VisionConfig, builder: Builder) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        hidden = config.hidden_size
        self.q_proj = builder.linear("q_proj", hidden, hidden, bias=True)
        self.k_proj = builder.linear("k_proj", hidden, hidden, bias=True)
        self.v_proj = builder.linear("v_proj", hidden, hidden, bias=True)
        self.o_proj = builder.linear("o_proj", hidden, hidden, bias=True)

    def forward(self, x_BTH: Tensor, rotation: Rotation) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        y: Tensor = self.o_proj(self.context(self.q_proj(x_BTH), self.k_proj(x_BTH), self.v_proj(x_BTH), rotation))
        return y

    def context(self, q_BTH: Tensor, k_BTH: Tensor, v_BTH: Tensor, rotation: Rotation) -> Tensor:
        """What o_proj gets, [B, T, H]."""
        q, k, v = (y.view(*y.shape[:-1], -1, self.head_dim) for y in (q_BTH, k_BTH, v_BTH))
        q, k, v = rotation.apply(q).transpose(1, 2), rotation.apply(k).transpose(1, 2), v.transpose(1, 2)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class VisionMLP(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, config: VisionConfig, builder: Builder) -> None:
        super().__init__()
        self.fc1 = builder.linear("fc1", config.intermediate_size, config.hidden_size, bias=True)
        self.fc2 = builder.linear("fc2", config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        y: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return y


class VisionLayer(nn.Module):
    """Attention, then MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: VisionConfig, builder: Builder) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(builder, config.hidden_size)
        self.self_attn = VisionAttention(config, builder.child("self_attn"))
        self.post_attention_layernorm = LayerNorm(builder, config.hidden_size)
        self.mlp = VisionMLP(config, builder.child("mlp"))

    def forward(self, x_BTH: Tensor, rotation: Rotation) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), rotation)
        y_BTH: Tensor = x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))
        return y_BTH


class VisionEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: VisionConfig, builder: Builder) -> None:
        super().__init__()
        layers = builder.child("layers")
        self.layers = nn.ModuleList(
            VisionLayer(config, layers.child(str(layer))) for layer in range(config.num_hidden_layers)
        )

    def forward(self, x_BTH: Tensor, rotation: Rotation) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        for layer in self.layers:
            x_BTH = layer(x_BTH, rotation)
        return x_BTH


class AdapterMLP(nn.Module):
    """Two layers with a GELU after each, no biases."""

    def __init__(self, config: VisionConfig, builder: Builder) -> None:
        super().__init__()
        self.fc1 = builder.linear("fc1", config.projector_input_dim, config.intermediate_size)
        self.fc2 = builder.linear("fc2", config.projector_output_dim, config.projector_input_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., shuffled width] -> [..., projector_output_dim]."""
        return functional.gelu(self.fc2(functional.gelu(self.fc1(x))))


class VisionAdapter(nn.Module):
    """Pixel shuffle and MLP."""

    def __init__(self, config: VisionConfig, builder: Builder) -> None:
        super().__init__()
        self.square = round(1 / config.pixel_shuffle_ratio)
        self.mlp = AdapterMLP(config, builder.child("mlp"))

    def forward(self, x_BPH: Tensor) -> Tensor:
        """[B, P, H] -> [B, P / square^2, projector_output_dim]."""
        y: Tensor = self.mlp(pixel_shuffle(x_BPH, self.square))
        return y


def pixel_shuffle(x_BPH: Tensor, square: int) -> Tensor:
    """Join the features of each `square` x `square` of patches, in reading order: [B, P / square^2, square^2 * H]."""
    num_tiles, num_patches, hidden = x_BPH.shape
    side = math.isqrt(num_patches) // square
    grid = x_BPH.reshape(num_tiles, side, square, side, square, hidden)
    return grid.transpose(2, 3).reshape(num_tiles, side * side, square * square * hidden)


class VisionModel(nn.Module):
    """The tower with its adapter."""

    def __init__(self, config: VisionConfig, builder: Builder) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.class_embedding = builder.parameter(hidden)
        self.positional_embedding_vlm = builder.parameter(config.num_patches + 1, hidden)
        self.patch_embedding = PatchEmbedding(config, builder.child("patch_embedding"))
        self.layernorm_pre = LayerNorm(builder, hidden)
        self.model = VisionEncoder(config, builder.child("model"))
        self.layernorm_post = LayerNorm(builder, hidden)
        self.vision_adapter = VisionAdapter(config, builder.child("vision_adapter"))
        self.rotary = VisionRotary(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """[tiles, C, image_size, image_size] -> [tiles, tokens per tile, projector_output_dim]."""
        patches = self.patch_embedding(pixels)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        x_BTH = torch.cat((patches, class_token), dim=1) + self.positional_embedding_vlm
        x_BTH = self.layernorm_post(self.model(self.layernorm_pre(x_BTH), self.rotary()))
        y: Tensor = self.vision_adapter(x_BTH[:, :-1])
        return y


class Projector(nn.Module):
    """From the adapter's width to the decoder's."""

    def __init__(self, vision: VisionConfig, text_hidden_size: int, builder: Builder) -> None:
        super().__init__()
        self.linear_1 = builder.linear("linear_1", text_hidden_size, vision.vision_output_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., vision_output_dim] -> [..., H]."""
        y: Tensor = self.linear_1(x)
        return y
