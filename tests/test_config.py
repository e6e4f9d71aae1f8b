"""Every spelling of config.json ends in the same objects; nonsense ends in one clear error."""

import copy
import json
from pathlib import Path

import pytest
from transformers import Llama4Config as HfConfig

from llama4_quant.config import Llama4Config, TextConfig
from llama4_quant.errors import ConfigError

DATA = Path(__file__).parent / "data"


def raw_config(name: str) -> dict:
    return json.loads((DATA / f"{name}.json").read_text())


@pytest.fixture
def scout() -> dict:
    return raw_config("scout")


def parse(raw: dict) -> Llama4Config:
    return Llama4Config.from_dict(raw)


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_equals_what_transformers_reads(name: str) -> None:
    ours = parse(raw_config(name))
    theirs = HfConfig.from_dict(raw_config(name))
    text = theirs.text_config
    for field in TextConfig.__dataclass_fields__:
        if hasattr(text, field) and field not in {"moe_layers", "rope_scaling"}:
            assert getattr(ours.text, field) == getattr(text, field), field
    assert list(ours.text.moe_layers) == text.moe_layers
    assert [int(rope) for rope in ours.text.rope_layers] == text.no_rope_layers
    if ours.text.rope_scaling is not None:
        assert ours.text.rope_scaling.factor == text.rope_parameters["factor"]
    assert (ours.text.rope_scaling is None) == (text.rope_parameters["rope_type"] == "default")
    assert ours.text.rope_theta == text.rope_parameters["rope_theta"]
    assert ours.text.eos_token_ids == tuple(text.eos_token_id)
    assert ours.image_token_index == theirs.image_token_index
    assert ours.vision is not None
    assert ours.vision.projector_input_dim == theirs.vision_config.projector_input_dim


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_what_transformers_writes_means_the_same(name: str) -> None:
    """transformers 5 respells RoPE, dtype and lists; nothing may change by a round trip through it."""
    ours = parse(raw_config(name))
    respelled = json.loads(HfConfig.from_dict(raw_config(name)).to_json_string(use_diff=False))
    assert "rope_parameters" in respelled["text_config"]
    again = parse(respelled)
    assert (again.text, again.vision, again.image_token_index) == (ours.text, ours.vision, ours.image_token_index)


def test_rope_scaling_wins_over_rope_parameters(scout: dict) -> None:
    """As in transformers 5, where a file that has both would otherwise give another model."""
    scout["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 7.0}
    theirs = HfConfig.from_dict(copy.deepcopy(scout)).text_config.rope_parameters
    ours = parse(scout).text
    assert ours.rope_scaling is not None
    assert (ours.rope_scaling.factor, ours.rope_theta) == (theirs["factor"], theirs["rope_theta"]) == (16.0, 500_000.0)


def test_tied_embeddings_are_the_text_sections_choice(scout: dict) -> None:
    """The language model in transformers is built from `text_config` alone; the value above it changes nothing."""
    scout["tie_word_embeddings"] = True
    assert parse(scout).text.tie_word_embeddings is False
    scout["text_config"]["tie_word_embeddings"] = True
    assert parse(scout).text.tie_word_embeddings is True


def test_quantization_is_found_in_both_places_and_junk_is_passed_over(scout: dict) -> None:
    assert not parse(scout).quantization
    scout["text_config"]["quantization_config"] = {"quant_method": "inner"}
    assert parse(scout).quantization == {"quant_method": "inner"}
    scout["quantization_config"] = {"quant_method": "outer"}
    assert parse(scout).quantization == {"quant_method": "outer"}
    assert not parse({**raw_config("scout")["text_config"], "text_config": [1]}).quantization


def test_flat_text_only_file_is_the_same_decoder(scout: dict) -> None:
    flat = parse({**scout["text_config"], "architectures": ["Llama4ForCausalLM"]})
    assert flat.text == parse(scout).text
    assert flat.vision is None
    assert flat.prefix == ""
    assert parse(scout).prefix == "language_model."


def test_no_rope_layers_absent_and_empty_mean_every_fourth(scout: dict) -> None:
    del scout["text_config"]["no_rope_layers"]
    absent = parse(scout).text.rope_layers
    scout["text_config"]["no_rope_layers"] = []
    assert parse(scout).text.rope_layers == absent == tuple(i % 4 != 3 for i in range(48))


def test_moe_layers_wins_over_step(scout: dict) -> None:
    scout["text_config"]["moe_layers"] = [5, 1]
    assert parse(scout).text.moe_layers == (1, 5)
    scout["text_config"]["moe_layers"] = []
    assert parse(scout).text.moe_layers == ()


def test_temperature_tuning_may_be_a_number(scout: dict) -> None:
    scout["text_config"]["attn_temperature_tuning"] = 4
    assert parse(scout).text.attn_temperature_tuning is True


def test_single_eos_and_null_chunk(scout: dict) -> None:
    scout["text_config"] |= {"eos_token_id": 7, "attention_chunk_size": None}
    text = parse(scout).text
    assert text.eos_token_ids == (7,)
    assert text.attention_chunk_size is None


BAD_TEXT = [
    ("num_hidden_layers", 10**9, "an integer from 1 to 1024"),
    ("num_hidden_layers", "48", "an integer"),
    ("num_hidden_layers", None, "num_hidden_layers is missing"),
    ("hidden_size", -1, "hidden_size is -1"),
    ("hidden_size", True, "hidden_size is True"),
    ("num_local_experts", 2**40, "an integer from 1 to 16384"),
    ("num_experts_per_tok", 17, "num_experts_per_tok is 17, expected an integer from 1 to 16"),
    ("num_key_value_heads", 7, "not a multiple"),
    ("moe_layers", [48], "beyond the model's 48"),
    ("moe_layers", [-1], "integers from 0"),
    ("no_rope_layers", [1, 0], "2 entries for 48 layers"),
    ("rms_norm_eps", float("nan"), r"a number from 1e-30 to 1e\+30"),
    ("rms_norm_eps", 0, "a number from"),
    ("rope_scaling", {"rope_type": "yarn"}, "rope_type is 'yarn'"),
    ("rope_scaling", {"rope_type": "llama3"}, "factor is missing"),
    ("rope_scaling", [1], "an object"),
    ("use_qk_norm", "yes", "true or false"),
    ("head_dim", 127, "head_dim 127 is odd"),
    ("num_local_experts", 400, "48 MoE layers of 400 experts"),
    ("eos_token_id", [[1]], "a list of integers from 0 to"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_TEXT)
def test_bad_text_values_name_the_key(scout: dict, key: str, value: object, message: str) -> None:
    scout["text_config"][key] = value
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse(scout)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_size", [336, 224], "not square"),
        ("image_size", 335, "multiple of patch_size"),
        ("intermediate_size", 1408, "pixel_shuffle_ratio"),
        ("projector_input_dim", 512, "must be equal"),
        ("num_attention_heads", 15, "multiple of num_attention_heads"),
        ("num_attention_heads", 704, "multiple of 4"),
        ("image_size", 350, "1/n, with n dividing"),
        ("pixel_shuffle_ratio", 2.0, "1/n, with n dividing"),
    ],
)
def test_vision_sizes_must_fit(scout: dict, key: str, value: object, message: str) -> None:
    scout["vision_config"][key] = value
    with pytest.raises(ConfigError, match=message):
        parse(scout)


@pytest.mark.parametrize("model_type", ["llama", None, 4])
def test_other_models_are_refused(scout: dict, model_type: object) -> None:
    raw = copy.deepcopy(scout)
    raw["model_type"] = model_type
    with pytest.raises(ConfigError, match="model_type"):
        parse(raw)


def test_long_values_are_cut_in_messages(scout: dict) -> None:
    scout["text_config"]["hidden_size"] = "x" * 10_000
    with pytest.raises(ConfigError) as caught:
        parse(scout)
    assert len(str(caught.value)) < 250
