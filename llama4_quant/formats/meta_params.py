"""params.json of a model: the inverse of checkpoint/meta_params.py, which makes config.json of params.json.

Meta's file does not give the widths of MLPs but factors from which its model computes them (llama-models 0.3.0,
`llama4/model.py` and `moe.py`); they are chosen here so that the widths come out. What Meta's model cannot express is
refused: the result is read back and compared with the model it was made from.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from llama4_quant.checkpoint.meta_params import Params, Widths
from llama4_quant.config import Llama4Config, TextConfig, VisionConfig
from llama4_quant.errors import SchemeError

_MULTIPLES = tuple(2**power for power in range(11, -1, -1))
"""Powers of two from 2048, the multiple of the published models, down to 1."""
_NOT_IN_PARAMS = {"max_position_embeddings", "bos_token_id", "eos_token_ids", "pad_token_id"}
"""Fields of the decoder that Meta keeps in its tokenizer or does not say."""
_EXPANSION = 4
"""Widths start from this multiple of the hidden size."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Factors:
    """From these Meta's model computes the widths of its MLPs; it uses them for nothing else."""

    multiple_of: int
    ffn_dim_multiplier: float
    capacity_factor: float

    def dense_width(self, dim: int) -> int:
        """Width of a dense layer."""
        return _up(int(self.ffn_dim_multiplier * _base(dim)), self.multiple_of)

    def expert_width(self, dim: int) -> int:
        """Width of an expert."""
        width = int(self.ffn_dim_multiplier * _base(dim))
        return _up(int(width / (self.capacity_factor + 1)), self.multiple_of)


def params_of(config: Llama4Config) -> dict[str, Any]:
    """Content of params.json.

    Raises:
        SchemeError: Meta's model cannot express something of this one; the message names it.
    """
    text = config.text
    if text.attention_bias or text.tie_word_embeddings:
        what = "attention_bias" if text.attention_bias else "tie_word_embeddings"
        raise SchemeError(f"config.json: {what} is true, which Meta's model cannot express; use another --format")
    params = _text_params(text)
    if config.vision is not None:
        params["vision_args"] = _vision_params(config.vision)
    _check(config, params)
    return params


def _text_params(text: TextConfig) -> dict[str, Any]:
    factors = _factors(text)
    nope_layers = [layer for layer, uses_rope in enumerate(text.rope_layers) if not uses_rope]
    scaling = text.rope_scaling
    return {
        "dim": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "vocab_size": text.vocab_size,
        "multiple_of": factors.multiple_of,
        "ffn_dim_multiplier": factors.ffn_dim_multiplier,
        "ffn_exp": float(_EXPANSION),
        "norm_eps": text.rms_norm_eps,
        "attention_chunk_size": text.attention_chunk_size,
        "rope_theta": text.rope_theta,
        "use_scaled_rope": scaling is not None,
        "rope_scaling_factor": None if scaling is None else scaling.factor,
        "rope_high_freq_factor": None if scaling is None else scaling.high_freq_factor,
        "nope_layer_interval": nope_layers[0] + 1 if nope_layers else None,
        "use_qk_norm": text.use_qk_norm,
        "attn_temperature_tuning": text.attn_temperature_tuning,
        "floor_scale": float(text.floor_scale),
        "attn_scale": text.attn_scale,
        "moe_args": {
            "num_experts": text.num_local_experts,
            "capacity_factor": factors.capacity_factor,
            "auto_scale_F": True,
            "top_k": text.num_experts_per_tok,
            "interleave_moe_layer_step": text.moe_layers[0] + 1 if text.moe_layers else text.num_hidden_layers + 1,
        },
    }


def _vision_params(vision: VisionConfig) -> dict[str, Any]:
    return {
        "image_size": {"height": vision.image_size, "width": vision.image_size},
        "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
        "dim": vision.hidden_size,
        "n_layers": vision.num_hidden_layers,
        "n_heads": vision.num_attention_heads,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        "output_dim": vision.vision_output_dim,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
    }


def _factors(text: TextConfig) -> _Factors:
    """Factors that give the widths; of several, those that look most like Meta's."""
    dim = text.hidden_size
    expert = text.intermediate_size if text.moe_layers else 0
    dense = text.intermediate_size_mlp if len(text.moe_layers) < text.num_hidden_layers else 2 * expert
    return next(
        factors
        for factors in _candidates(dim, dense, expert)
        if factors.dense_width(dim) == dense and (not expert or factors.expert_width(dim) == expert)
    )


def _candidates(dim: int, dense: int, expert: int) -> Iterator[_Factors]:
    """Round factors first; the last ones, in the middle of what is rounded to the widths, always fit."""
    base = _base(dim)
    for multiple in (m for m in _MULTIPLES if math.gcd(dense, expert) % m == 0):
        below = multiple / 2 if multiple > 1 else -0.5
        for multiplier in (round((dense - 1) / base, 1), round((dense - below) / base, 2), (dense - below) / base):
            width = int(multiplier * base)
            for capacity in (1.0, width / (expert - below) - 1):
                yield _Factors(multiple_of=multiple, ffn_dim_multiplier=multiplier, capacity_factor=capacity)


def _base(dim: int) -> int:
    return int(2 * _EXPANSION * dim / 3)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check(config: Llama4Config, params: dict[str, Any]) -> None:
    """Raise SchemeError unless Meta's model of these parameters is the model of this configuration."""
    text = config.text
    widths = Widths(
        vocab_size=text.vocab_size,
        intermediate_size=text.intermediate_size,
        intermediate_size_mlp=text.intermediate_size_mlp,
    )
    made = Llama4Config.from_dict(Params(params, "params.json").config(widths))
    pairs = [(text, made.text), (config.vision, made.vision)]
    for wanted, found in pairs:
        if wanted is None or found is None:
            continue
        for field in dataclasses.fields(wanted):
            was, comes = getattr(wanted, field.name), getattr(found, field.name)
            if was != comes and field.name not in _NOT_IN_PARAMS:
                raise SchemeError(
                    f"config.json: {field.name} is {was}, which Meta's model cannot express (it would be {comes}); use "
                    "another --format"
                )
