"""The sample's architecture and the JSON files that describe it, in the spelling of Llama 4's files on the hub.

Everything that makes Llama 4 special is switched on, at the smallest size where it still matters: the attention chunk
(64 tokens) is far shorter than a training window, the last of four layers is NoPE and has tuned temperature, odd layers
are mixtures of eight experts. Every linear input that quantizers group is a multiple of 128.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import Llama4Config

from llama4_quant.sample.shapes import TILE_SIDE
from llama4_quant.sample.tokenizer import BOS, EOM, EOS, EOT, PAD, VOCAB_SIZE, token_id, write_json

PATCH_SIZE = 14
MAX_TILES = 4
MAX_POSITIONS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimensions:
    """What tests make smaller; the defaults are the shipped sample's."""

    hidden_size: int = 256
    num_layers: int = 4
    num_experts: int = 8
    expert_intermediate_size: int = 128
    mlp_intermediate_size: int = 512
    num_heads: int = 4
    num_key_value_heads: int = 2
    vision_hidden_size: int = 128
    vision_layers: int = 2


def hub_config(tokenizer: Tokenizer, dimensions: Dimensions, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """config.json as Llama 4's hub files spell it (`rope_scaling` with `rope_theta`, `torch_dtype`)."""
    text = _text_config(tokenizer, dimensions, dtype)
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "boi_token_index": token_id(tokenizer, "<|image_start|>"),
        "eoi_token_index": token_id(tokenizer, "<|image_end|>"),
        "image_token_index": token_id(tokenizer, "<|patch|>"),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "text_config": text,
        "vision_config": _vision_config(dimensions),
    }


def transformers_config(hub: dict[str, Any]) -> Llama4Config:
    """Parse a hub-spelled config exactly as `from_pretrained` would."""
    return Llama4Config.from_dict(hub)


def write_configs(hub: dict[str, Any], folder: Path) -> None:
    """Write config.json, generation_config.json, preprocessor_config.json and processor_config.json."""
    text = hub["text_config"]
    write_json(folder / "config.json", hub)
    generation = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**generation, "do_sample": False, "max_new_tokens": 64})
    image = {
        "image_processor_type": "Llama4ImageProcessor",
        "processor_class": "Llama4Processor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_patches": MAX_TILES,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "resize_to_max_canvas": False,
        "size": {"height": TILE_SIDE, "width": TILE_SIDE},
    }
    write_json(folder / "preprocessor_config.json", image)
    processor = {
        "processor_class": "Llama4Processor",
        "fake_image_token": "<|image|>",
        "image_token": "<|image|>",
        "start_of_image_token": "<|image_start|>",
        "end_of_image_token": "<|image_end|>",
        "patch_token": "<|patch|>",
        "tile_x_separator_token": "<|tile_x_separator|>",
        "tile_y_separator_token": "<|tile_y_separator|>",
        "patch_size": PATCH_SIZE,
        "pixel_shuffle_ratio": 0.5,
    }
    write_json(folder / "processor_config.json", processor)


def _text_config(tokenizer: Tokenizer, size: Dimensions, dtype: str) -> dict[str, Any]:
    return {
        "model_type": "llama4_text",
        "attention_bias": False,
        "attention_chunk_size": 64,
        "attention_dropout": 0.0,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "bos_token_id": token_id(tokenizer, BOS),
        "eos_token_id": [token_id(tokenizer, token) for token in (EOS, EOM, EOT)],
        "floor_scale": 32,
        "head_dim": size.hidden_size // size.num_heads,
        "hidden_act": "silu",
        "hidden_size": size.hidden_size,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": 2,
        "intermediate_size": size.expert_intermediate_size,
        "intermediate_size_mlp": size.mlp_intermediate_size,
        "max_position_embeddings": MAX_POSITIONS,
        "no_rope_layers": [],
        "num_attention_heads": size.num_heads,
        "num_experts_per_tok": 1,
        "num_hidden_layers": size.num_layers,
        "num_key_value_heads": size.num_key_value_heads,
        "num_local_experts": size.num_experts,
        "output_router_logits": False,
        "pad_token_id": token_id(tokenizer, PAD),
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 256,
            "rope_type": "llama3",
        },
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_qk_norm": True,
        "vocab_size": VOCAB_SIZE,
    }


def _vision_config(size: Dimensions) -> dict[str, Any]:
    return {
        "model_type": "llama4_vision_model",
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": size.vision_hidden_size,
        "image_size": TILE_SIDE,
        "initializer_range": 0.02,
        # Pixel shuffle at 0.5 joins four patches: the adapter's input, which the config calls intermediate_size.
        "intermediate_size": 4 * size.vision_hidden_size,
        "multi_modal_projector_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": size.vision_layers,
        "patch_size": PATCH_SIZE,
        "pixel_shuffle_ratio": 0.5,
        "projector_dropout": 0.0,
        "projector_input_dim": size.hidden_size,
        "projector_output_dim": size.hidden_size,
        "rope_theta": 10000,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vision_output_dim": size.hidden_size,
    }
