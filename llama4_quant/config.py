"""What config.json says about a Llama 4, parsed once into frozen dataclasses.

Configurations in the wild differ in spelling: `rope_scaling` + `rope_theta` (hub files, transformers 4.51) or
`rope_parameters` (transformers 5), `no_rope_layers` absent or `[]` (every 4th layer is NoPE), `moe_layers` absent
(then `interleave_moe_layer_step` decides), `attn_temperature_tuning` as a bool or a number, a text-only file that is
flat (`model_type` "llama4_text"). All of them end in the same objects here. The file is untrusted: every value is
checked for type and range, so that nothing later has to.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama4_quant.checkpoint.json_fields import Fields
from llama4_quant.checkpoint.json_files import read_json, shown
from llama4_quant.config_limits import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_SIDE,
    MAX_VOCABULARY,
    MAX_WIDTH,
    check_parameters,
    num_text_parameters,
    num_vision_parameters,
)
from llama4_quant.config_sections import RopeScaling, TextConfig, VisionConfig
from llama4_quant.errors import ConfigError

__all__ = ["Llama4Config", "RopeScaling", "TextConfig", "VisionConfig"]

TEXT_ONLY = "Llama4ForCausalLM"
MULTIMODAL = "Llama4ForConditionalGeneration"


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama4Config:
    """A whole model: text, and vision if it has one.

    Attributes:
        prefix: what the decoder's tensor names start with: "language_model." or "" (text-only checkpoints).
        raw: config.json as it was read.
    """

    text: TextConfig
    vision: VisionConfig | None
    image_token_index: int | None
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def prefix(self) -> str:
        """What the decoder's tensor names start with."""
        return "" if self.vision is None else "language_model."

    @property
    def architecture(self) -> str:
        """The class name that transformers and vLLM know this model by."""
        return TEXT_ONLY if self.vision is None else MULTIMODAL

    @property
    def quantization(self) -> Any:
        """`quantization_config` as it stands in config.json; None (or empty) for a checkpoint that is not quantized."""
        text = self.raw.get("text_config")
        return self.raw.get("quantization_config") or (
            text.get("quantization_config") if isinstance(text, Mapping) else None
        )

    @classmethod
    def from_file(cls, path: Path) -> "Llama4Config":
        """Read config.json.

        Raises:
            ConfigError: unreadable, not Llama 4, or a value of wrong type or absurd size.
        """
        return cls.from_dict(read_json(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Llama4Config":
        """Parse config.json's content.

        Raises:
            ConfigError: not Llama 4, or a value of wrong type or absurd size.
        """
        top = Fields(raw, "config.json")
        model_type = top.string("model_type", "(none)")
        if model_type == "llama4_text":
            return cls(text=_text(top), vision=None, image_token_index=None, raw=raw)
        if model_type != "llama4":
            raise ConfigError(
                f"config.json: model_type is {shown(model_type)}, expected 'llama4' or 'llama4_text'; llama4-quant "
                "converts Llama 4 checkpoints (Scout, Maverick and models of the same architecture) only"
            )
        return cls(
            text=_text(top.section("text_config")),
            vision=_vision(top.section("vision_config")),
            image_token_index=top.integer("image_token_index", 200092, low=0),
            raw=raw,
        )


def _text(text: Fields) -> TextConfig:
    num_layers = text.integer("num_hidden_layers", low=1, high=MAX_LAYERS)
    hidden_size = text.integer("hidden_size", high=MAX_WIDTH)
    num_heads = text.integer("num_attention_heads", high=MAX_WIDTH)
    num_experts = text.integer("num_local_experts", 16, high=MAX_EXPERTS)
    config = TextConfig(
        vocab_size=text.integer("vocab_size", high=MAX_VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=text.integer("intermediate_size", high=MAX_WIDTH),
        intermediate_size_mlp=text.integer("intermediate_size_mlp", 16384, high=MAX_WIDTH),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=text.integer("num_key_value_heads", num_heads),
        head_dim=text.integer("head_dim", max(1, hidden_size // num_heads), high=MAX_WIDTH // num_heads),
        rms_norm_eps=text.number("rms_norm_eps", 1e-5),
        num_experts_per_tok=text.integer("num_experts_per_tok", 1, high=num_experts),
        num_local_experts=num_experts,
        moe_layers=_moe_layers(text, num_layers),
        rope_theta=_rope(text).number("rope_theta", text.number("rope_theta", 500_000.0)),
        rope_scaling=_rope_scaling(_rope(text)),
        use_qk_norm=text.boolean("use_qk_norm", default=True),
        rope_layers=_rope_layers(text, num_layers),
        attention_chunk_size=text.optional_integer("attention_chunk_size", 8192, low=1),
        attn_temperature_tuning=text.boolean("attn_temperature_tuning", default=True),
        floor_scale=text.integer("floor_scale", 8192),
        attn_scale=text.number("attn_scale", 0.1),
        attention_bias=text.boolean("attention_bias", default=False),
        tie_word_embeddings=text.boolean("tie_word_embeddings", default=False),
        max_position_embeddings=text.integer("max_position_embeddings", 131_072),
        bos_token_id=text.optional_integer("bos_token_id", None),
        eos_token_ids=text.integers("eos_token_id"),
        pad_token_id=text.optional_integer("pad_token_id", None, low=-1),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads "
            f"{config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise ConfigError(f"{text.where}: head_dim {config.head_dim} is odd; RoPE turns pairs of features")
    if len(config.moe_layers) * num_experts > MAX_EXPERTS:
        raise ConfigError(
            f"{text.where}: {len(config.moe_layers)} MoE layers of {num_experts} experts; expected at most "
            f"{MAX_EXPERTS} experts together"
        )
    check_parameters(num_text_parameters(config), text.where)
    return config


def _moe_layers(text: Fields, num_layers: int) -> tuple[int, ...]:
    """`moe_layers` wins over `interleave_moe_layer_step`."""
    step = text.integer("interleave_moe_layer_step", 1, low=0)  # 0: no MoE layer (vLLM's reading)
    listed = text.get("moe_layers")
    layers = moe_layers_of(step, num_layers) if listed is None else text.integers("moe_layers", most=MAX_LAYERS)
    if any(layer >= num_layers for layer in layers):
        raise ConfigError(
            f"config.json: moe_layers {shown(list(layers))} names a layer beyond the model's {num_layers}"
        )
    return tuple(sorted(set(layers)))


def moe_layers_of(step: int, num_layers: int) -> tuple[int, ...]:
    """Every `step`-th layer; none for a step of 0."""
    return tuple(range(step - 1, num_layers, step)) if step else ()


def _rope_layers(text: Fields, num_layers: int) -> tuple[bool, ...]:
    listed = text.integers("no_rope_layers", most=MAX_LAYERS)
    if not listed:
        interval = text.integer("no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if len(listed) < num_layers:
        raise ConfigError(f"config.json: no_rope_layers has {len(listed)} entries for {num_layers} layers")
    return tuple(bool(uses_rope) for uses_rope in listed[:num_layers])


def _rope(text: Fields) -> Fields:
    """The section that holds RoPE's settings: `rope_scaling` (which wins in transformers), else `rope_parameters`."""
    name = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    return text.section(name) if text.get(name) is not None else Fields({}, f"{text.where}: {name}")


def _rope_scaling(rope: Fields) -> RopeScaling | None:
    rope_type = rope.string("rope_type", rope.string("type", "default"))
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise ConfigError(f"{rope.where}: rope_type is {shown(rope_type)}; Llama 4 uses 'llama3' or 'default'")
    return RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
    )


def _vision(vision: Fields) -> VisionConfig:
    rope = _rope(vision)
    config = VisionConfig(
        hidden_size=vision.integer("hidden_size", 768, high=MAX_WIDTH),
        num_hidden_layers=vision.integer("num_hidden_layers", 34, low=1, high=MAX_LAYERS),
        num_attention_heads=vision.integer("num_attention_heads", 16),
        num_channels=vision.integer("num_channels", 3, high=64),
        intermediate_size=vision.integer("intermediate_size", 5632, high=MAX_WIDTH),
        vision_output_dim=vision.integer("vision_output_dim", 7680, high=MAX_WIDTH),
        image_size=_square(vision, "image_size", 448),
        patch_size=_square(vision, "patch_size", 14),
        norm_eps=vision.number("norm_eps", 1e-5),
        pixel_shuffle_ratio=vision.number("pixel_shuffle_ratio", 0.5),
        projector_input_dim=vision.integer("projector_input_dim", 4096, high=MAX_WIDTH),
        projector_output_dim=vision.integer("projector_output_dim", 4096, high=MAX_WIDTH),
        rope_theta=rope.number("rope_theta", vision.number("rope_theta", 10_000.0)),
    )
    check_parameters(num_vision_parameters(config), vision.where)
    _check_vision(config, vision.where)
    return config


def _check_vision(config: VisionConfig, where: str) -> None:
    """Sizes that have to fit together for the tower to run at all."""
    shuffled = config.hidden_size / config.pixel_shuffle_ratio**2
    square = max(1, round(1 / config.pixel_shuffle_ratio))
    is_inverse = math.isclose(square * config.pixel_shuffle_ratio, 1.0)
    rules = {
        "image_size must be a multiple of patch_size": config.image_size % config.patch_size == 0,
        "hidden_size must be a multiple of num_attention_heads": config.hidden_size % config.num_attention_heads == 0,
        "hidden_size / num_attention_heads must be a multiple of 4, for RoPE in two dimensions": (
            config.hidden_size // config.num_attention_heads % 4 == 0
        ),
        "pixel_shuffle_ratio must be 1/n, with n dividing image_size / patch_size": (
            is_inverse and config.image_size // config.patch_size % square == 0
        ),
        "intermediate_size must be hidden_size / pixel_shuffle_ratio^2": config.intermediate_size == shuffled,
        "projector_input_dim, projector_output_dim and vision_output_dim must be equal": (
            config.projector_input_dim == config.projector_output_dim == config.vision_output_dim
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            raise ConfigError(f"{where}: {rule}; found {config}")


def _square(vision: Fields, name: str, default: int) -> int:
    """A side length that may also be spelled [side, side]."""
    if not isinstance(vision.get(name), list):
        return vision.integer(name, default, high=MAX_SIDE)
    sides = vision.integers(name, most=2)
    if len(sides) != 2 or sides[0] != sides[1] or not 1 <= sides[0] <= MAX_SIDE:
        raise ConfigError(f"{vision.where}: {name} {list(sides)} is not square; Llama 4's tiles are")
    return sides[0]
