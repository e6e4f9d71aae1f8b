"""params.json of Meta's original checkpoints, translated to Hugging Face's config.json.

Defaults are those of llama-models 0.3.0, `llama4/args.py`. Widths of MLPs and the size of the vocabulary are taken from
the tensors: params.json gives only factors from which the widths are computed. What Meta keeps elsewhere (ids of
special tokens: in its tokenizer) or does not say (the longest context) is as in the models published on the Hub.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama4_quant.checkpoint.json_fields import Fields
from llama4_quant.checkpoint.json_files import shown
from llama4_quant.config_limits import MAX_LAYERS
from llama4_quant.errors import ConfigError

MAX_POSITIONS = 262_144
"""What base models were trained for; instruct models work with 1 M (Maverick) and 10 M (Scout)."""
_TEXT_TOKENS = {"bos_token_id": 200_000, "eos_token_id": [200_001, 200_007, 200_008], "pad_token_id": 200_018}
_IMAGE_TOKENS = {"boi_token_index": 200_080, "eoi_token_index": 200_081, "image_token_index": 200_092}
_VOCABULARY_SIZE = 202_048
"""The vocabulary that these ids belong to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """Sizes that follow from the tensors; None if the model has no such tensors."""

    vocab_size: int | None
    intermediate_size: int | None
    intermediate_size_mlp: int | None


class Params:
    """The parsed file; every value is checked when it is asked for."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        top = Fields(raw, where)
        self._fields = top.section("model") if isinstance(raw.get("model"), Mapping) else top
        self._moe = self._section("moe_args")
        self._vision = self._section("vision_args")
        self.where = where

    @property
    def values(self) -> Mapping[str, Any]:
        """The parameters as they were read."""
        return self._fields.values

    @property
    def has_vision(self) -> bool:
        """Whether the model has a vision tower."""
        return self._vision is not None

    @property
    def num_experts(self) -> int:
        """Routed experts of an MoE layer; 0 for a dense model."""
        return self._moe.integer("num_experts") if self._moe else 0

    @property
    def num_heads(self) -> int:
        """Attention heads of the decoder."""
        return self._fields.integer("n_heads")

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads of the decoder."""
        return self._fields.integer("n_kv_heads", self.num_heads)

    def config(self, widths: Widths) -> dict[str, Any]:
        """config.json as the Hub's checkpoints have it.

        Raises:
            ConfigError: a value is missing or of wrong type, or the model was quantized or fine-tuned with adapters.
        """
        for unsupported in ("quantization_args", "lora_args"):
            if self._fields.get(unsupported):
                raise ConfigError(
                    f"{self.where}: {unsupported} is {shown(self._fields.get(unsupported))}; start from the BF16 model"
                )
        text = self._text(widths)
        if self._vision is None:
            return {"architectures": ["Llama4ForCausalLM"], **text}
        return {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            **(_IMAGE_TOKENS if text["vocab_size"] == _VOCABULARY_SIZE else {}),
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "text_config": text,
            "vision_config": _vision_config(self._vision),
        }

    def _section(self, name: str) -> Fields | None:
        return self._fields.section(name) if self._fields.get(name) is not None else None

    def _text(self, widths: Widths) -> dict[str, Any]:
        fields, moe = self._fields, self._moe
        num_layers = fields.integer("n_layers", high=MAX_LAYERS)
        dim = fields.integer("dim")
        vocab_size = self._vocab_size(widths)
        interval = fields.optional_integer("nope_layer_interval", None, low=1)
        step = moe.integer("interleave_moe_layer_step", 1) if moe else num_layers + 1
        mlp = widths.intermediate_size_mlp or self._dense_width(dim)
        return {
            "model_type": "llama4_text",
            "vocab_size": vocab_size,
            "hidden_size": dim,
            "intermediate_size": widths.intermediate_size or mlp,
            "intermediate_size_mlp": mlp,
            "num_hidden_layers": num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": dim // self.num_heads,
            "hidden_act": "silu",
            "rms_norm_eps": fields.number("norm_eps", 1e-5),
            "num_local_experts": max(1, self.num_experts),
            "num_experts_per_tok": moe.integer("top_k", 1) if moe else 1,
            "interleave_moe_layer_step": step,
            "moe_layers": [layer for layer in range(num_layers) if (layer + 1) % step == 0],
            "no_rope_layers": [int(interval is None or (layer + 1) % interval != 0) for layer in range(num_layers)],
            "attention_bias": False,
            "attention_chunk_size": fields.optional_integer("attention_chunk_size", None, low=1),
            "attn_temperature_tuning": fields.boolean("attn_temperature_tuning", default=False),
            "floor_scale": round(fields.number("floor_scale", 8192.0)),
            "attn_scale": fields.number("attn_scale", 0.1),
            "use_qk_norm": fields.boolean("use_qk_norm", default=False),
            "rope_theta": fields.number("rope_theta", 500_000.0),
            "rope_scaling": self._rope_scaling(),
            "max_position_embeddings": MAX_POSITIONS,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            **(_TEXT_TOKENS if vocab_size == _VOCABULARY_SIZE else dict.fromkeys(_TEXT_TOKENS)),
        }

    def _vocab_size(self, widths: Widths) -> int:
        promised = self._fields.integer("vocab_size", -1, low=-1)
        found = widths.vocab_size
        if found is None:
            return promised
        if promised not in {-1, found}:
            raise ConfigError(
                f"{self.where}: vocab_size is {promised}, but the embeddings of all consolidated files together have "
                f"{found} rows; are files missing?"
            )
        return found

    def _dense_width(self, dim: int) -> int:
        """Width of a dense layer by Meta's rule, for models that have none."""
        width = 2 * 4 * dim // 3
        if self._fields.get("ffn_dim_multiplier") is not None:
            width = int(self._fields.number("ffn_dim_multiplier") * width)
        multiple = self._fields.integer("multiple_of", 256)
        return -(-width // multiple) * multiple

    def _rope_scaling(self) -> dict[str, Any] | None:
        if not self._fields.boolean("use_scaled_rope", default=False):
            return None
        return {
            "rope_type": "llama3",
            "factor": self._fields.number("rope_scaling_factor", 16.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": self._fields.number("rope_high_freq_factor", 1.0),
            "original_max_position_embeddings": 8192,
        }


def _vision_config(vision: Fields) -> dict[str, Any]:
    hidden, output = vision.integer("dim"), vision.integer("output_dim")
    return {
        "model_type": "llama4_vision_model",
        "hidden_size": hidden,
        "hidden_act": "gelu",
        "num_hidden_layers": vision.integer("n_layers", high=MAX_LAYERS),
        "num_attention_heads": vision.integer("n_heads"),
        "num_channels": 3,
        "intermediate_size": int(hidden * vision.number("mlp_ratio")),
        "vision_output_dim": output,
        "image_size": _side(vision, "image_size"),
        "patch_size": _side(vision, "patch_size"),
        "norm_eps": 1e-5,
        "pixel_shuffle_ratio": vision.number("pixel_shuffle_ratio"),
        "projector_input_dim": output,
        "projector_output_dim": output,
        "multi_modal_projector_bias": False,
        "rope_theta": 10_000,
        "vision_feature_select_strategy": "default",
    }


def _side(vision: Fields, name: str) -> int:
    """Length of the side of a square {"height": ..., "width": ...}."""
    size = vision.section(name)
    height, width = size.integer("height"), size.integer("width")
    if height != width:
        raise ConfigError(f"{size.where}: {height} x {width} is not square; Llama 4's tiles are")
    return height
