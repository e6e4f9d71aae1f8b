"""params.json made of config.json: Meta's factors for the published models, widths that come out, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import multimodal_config, text_config
from hypothesis import given
from hypothesis import strategies as st

from llama4_quant.checkpoint.meta_params import Params, Widths
from llama4_quant.config import Llama4Config
from llama4_quant.errors import SchemeError
from llama4_quant.formats.meta_params import params_of

DATA = Path(__file__).parents[1] / "data"


def widths_by_meta(params: dict[str, Any]) -> tuple[int, int]:
    """Of experts and of dense layers, as llama-models 0.3.0 computes them (`MoE` and `TransformerBlock`)."""
    dim, multiple, multiplier = params["dim"], params["multiple_of"], params["ffn_dim_multiplier"]
    moe = params["moe_args"]
    expert = int(multiplier * int(2 * int(params["ffn_exp"] * dim) / 3))
    if moe["auto_scale_F"]:
        expert = int(expert / (moe["capacity_factor"] + 1))
    expert += -expert % multiple
    dense = int(multiplier * int(2 * int(4 * dim) / 3))
    return expert, multiple * ((dense + multiple - 1) // multiple)


@pytest.mark.parametrize(("name", "step"), [("scout", 1), ("maverick", 2)])
def test_published_models_get_metas_own_factors(name: str, step: int) -> None:
    config = Llama4Config.from_file(DATA / f"{name}.json")
    params = params_of(config)
    factors = ("multiple_of", "ffn_dim_multiplier", "ffn_exp", "dim", "n_heads", "n_kv_heads", "nope_layer_interval")
    assert [params[factor] for factor in factors] == [2048, 1.2, 4.0, 5120, 40, 8, 4]
    assert params["moe_args"]["interleave_moe_layer_step"] == step
    assert params["use_scaled_rope"] == (name == "scout")
    assert params["vision_args"]["mlp_ratio"] == 4.0
    assert widths_by_meta(params) == (8192, 16384)


@given(st.integers(1, 64), st.integers(1, 80), st.integers(1, 80), st.sampled_from([1, 3, 16, 48, 64, 256, 1000, 1024]))
def test_widths_come_out(heads: int, expert: int, dense: int, unit: int) -> None:
    """Widths of any ratio to each other and to the hidden size."""
    config = text_config(
        num_attention_heads=heads, num_key_value_heads=1, head_dim=32, hidden_size=32 * heads,
        intermediate_size=expert * unit, intermediate_size_mlp=dense * unit,
    )  # fmt: skip
    assert widths_by_meta(params_of(Llama4Config.from_dict(config))) == (expert * unit, dense * unit)


@pytest.mark.parametrize("config", [multimodal_config(), text_config(interleave_moe_layer_step=1)])
def test_the_model_is_the_same(config: dict[str, Any]) -> None:
    parsed = Llama4Config.from_dict(config)
    params = json.loads(json.dumps(params_of(parsed)))
    widths = Widths(vocab_size=96, intermediate_size=128, intermediate_size_mlp=256)
    made = Llama4Config.from_dict(Params(params, "params.json").config(widths))
    assert made.vision == parsed.vision
    assert made.text.rope_layers == parsed.text.rope_layers
    assert made.text.moe_layers == parsed.text.moe_layers
    assert made.text.floor_scale == parsed.text.floor_scale


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, "attention_bias is true, which Meta's model cannot express"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"head_dim": 64}, r"head_dim is 64, which Meta's model cannot express \(it would be 32\)"),
        ({"moe_layers": [0, 1]}, "moe_layers is "),
        ({"no_rope_layers": [1, 0, 0, 1]}, "rope_layers is "),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 8192}},
            "rope_scaling is RopeScaling",
        ),
    ],
)  # fmt: skip
def test_what_metas_model_cannot_express_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SchemeError, match=named):
        params_of(Llama4Config.from_dict(text_config(**changes)))
