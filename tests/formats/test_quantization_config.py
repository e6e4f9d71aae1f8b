import copy
from typing import Any

import pytest

from llama4_quant.errors import ConfigError
from llama4_quant.formats.compressed_tensors import parse_quantization_config, quantization_config
from llama4_quant.scheme import KVCacheScheme, Observer, Scheme, Strategy, WeightScheme, WeightType, preset

PRESETS = [
    preset("W4A16", group_size=32),
    preset("W4A16", group_size=64, observer="absmax"),
    preset("W4A16"),
    preset("W4A16", group_size=-1),
    preset("FP8_DYNAMIC"),
    preset("FP8_DYNAMIC", observer="absmax"),
    preset("FP8_BLOCK"),
]
INT4 = preset("W4A16", group_size=64, observer="absmax").weights
FP8 = preset("FP8_DYNAMIC", observer="absmax").weights
WEIGHTS_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
WEIGHTS_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
TOKEN_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def short_config(group: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Only what has no default, as older versions wrote it."""
    group_0 = {"targets": ["Linear"], "weights": WEIGHTS_INT4} if group is None else group
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group_0}}
    return copy.deepcopy(config | settings)


@pytest.mark.parametrize("scheme", PRESETS, ids=lambda scheme: scheme.label)
def test_what_is_written_is_read_back(scheme: Scheme) -> None:
    parsed = parse_quantization_config(quantization_config(scheme, ["lm_head", "a.router"]))
    assert parsed.scheme_of("a.gate_proj") == scheme.weights
    assert parsed.scheme_of("lm_head") is None
    assert parsed.scheme_of("a.router") is None
    assert parsed.ignored.items == ("lm_head", "a.router")
    assert parsed.kv_cache_scheme is None


def test_w4a16_is_spelled_as_llm_compressor_spells_it() -> None:
    assert quantization_config(preset("W4A16", group_size=64, observer="absmax"), ["lm_head"]) == {
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None,
                    "block_structure": None,
                    "dynamic": False,
                    "group_size": 64,
                    "num_bits": 4,
                    "observer": "memoryless_minmax",
                    "observer_kwargs": {},
                    "scale_dtype": None,
                    "strategy": "group",
                    "symmetric": True,
                    "type": "int",
                    "zp_dtype": None,
                },
            }
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


def test_fp8_block_has_block_weights_and_group_activations() -> None:
    (group,) = quantization_config(preset("FP8_BLOCK"), [])["config_groups"].values()
    assert group["format"] == "float-quantized"
    assert (group["weights"]["strategy"], group["weights"]["block_structure"]) == ("block", [128, 128])
    activations = group["input_activations"]
    assert (activations["strategy"], activations["group_size"], activations["dynamic"]) == ("group", 128, True)


def test_several_groups_with_their_own_formats() -> None:
    groups = {
        "group_0": {
            "targets": ["re:.*experts.*", "model.layers.0.mlp.up_proj"],
            "weights": WEIGHTS_INT4,
            "format": "pack-quantized",
        },
        "group_1": {
            "targets": ["re:.*self_attn.*"],
            "weights": WEIGHTS_FP8,
            "input_activations": TOKEN_FP8,
            "format": "float-quantized",
        },
    }
    ignore = ["re:.*k_proj$", "model.layers.2.experts.0.up_proj"]
    parsed = parse_quantization_config(short_config(config_groups=groups, format="mixed-precision", ignore=ignore))
    assert parsed.scheme_of("model.layers.1.experts.0.up_proj") == INT4
    assert parsed.scheme_of("model.layers.2.experts.0.up_proj") is None
    assert parsed.scheme_of("model.layers.0.mlp.up_proj") == INT4
    assert parsed.scheme_of("model.layers.1.mlp.up_proj") is None
    assert parsed.scheme_of("model.layers.1.self_attn.q_proj") == FP8
    assert parsed.scheme_of("model.layers.1.self_attn.k_proj") is None
    assert parsed.scheme_of("lm_head") is None


def test_a_name_wins_over_a_pattern_and_a_pattern_over_the_class() -> None:
    def group(size: int, *targets: str) -> dict[str, Any]:
        return {"targets": list(targets), "weights": WEIGHTS_INT4 | {"group_size": size}}

    groups = {"a": group(32, "Linear", "re:b"), "b": group(64, "re:a"), "c": group(128, "a.x")}
    parsed = parse_quantization_config(short_config(config_groups=groups))
    sizes = {name: parsed.scheme_of(name).group_size for name in ("a.x", "a.y", "xa", "b")}  # type: ignore[union-attr]
    assert sizes == {"a.x": 128, "a.y": 64, "xa": 32, "b": 32}  # patterns match from the start of the name


def test_class_targets_mean_nothing_but_linear() -> None:
    group = {"targets": ["Llama4TextAttention"], "weights": WEIGHTS_INT4}
    assert parse_quantization_config(short_config(group)).scheme_of("model.layers.0.self_attn.q_proj") is None
    parsed = parse_quantization_config(short_config(ignore=["Linear"]))
    assert parsed.scheme_of("model.layers.0.self_attn.q_proj") is None


@pytest.mark.parametrize("storage", ["naive-quantized", "float-quantized"])
def test_older_names_and_defaults(storage: str) -> None:
    group = {"targets": ["Linear"], "weights": WEIGHTS_FP8, "input_activations": TOKEN_FP8}
    config = short_config(group, format=storage, quantization_status="frozen", ignore=None)
    assert parse_quantization_config(config).scheme_of("x") == FP8
    channel = {"num_bits": 4, "group_size": -1, "observer": "mse", "actorder": "static"}
    scheme = parse_quantization_config(short_config({"targets": ["Linear"], "weights": channel})).scheme_of("x")
    assert scheme == WeightScheme(type=WeightType.INT4, strategy=Strategy.CHANNEL, observer=Observer.MSE)


def test_presets_by_name() -> None:
    config = short_config(config_groups={"W4A16": ["re:.*experts.*"], "FP8_DYNAMIC": ["Linear"]})
    parsed = parse_quantization_config(config)
    assert parsed.scheme_of("experts.0.up_proj") == preset("W4A16").weights
    assert parsed.scheme_of("lm_head") == preset("FP8_DYNAMIC").weights


CACHE_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@pytest.mark.parametrize(
    ("cache", "fp8"),
    [
        (CACHE_FP8, True),
        ({"type": "float"}, True),  # all else is compressed-tensors' default
        (CACHE_FP8 | {"observer": "minmax", "group_size": None, "zp_dtype": None}, True),
        (CACHE_FP8 | {"num_bits": 4}, False),
        ({"num_bits": 8, "strategy": "tensor"}, False),  # int
        (CACHE_FP8 | {"strategy": "attn_head"}, False),
        (CACHE_FP8 | {"symmetric": False}, False),
        (CACHE_FP8 | {"dynamic": True}, False),
    ],
)
def test_a_kv_cache_scheme_is_kept_and_known_for_what_it_is(cache: dict[str, Any], fp8: bool) -> None:
    parsed = parse_quantization_config(short_config(kv_cache_scheme=cache))
    assert parsed.kv_cache_scheme == cache
    assert parsed.fp8_cache is fp8
    assert not parse_quantization_config(short_config()).fp8_cache


@pytest.mark.parametrize("scheme", PRESETS, ids=lambda scheme: scheme.label)
def test_an_fp8_cache_round_trips_through_compressed_tensors(scheme: Scheme) -> None:
    config = quantization_config(scheme, ["lm_head"], kv_cache_scheme=KVCacheScheme.FP8)
    peer = pytest.importorskip("compressed_tensors.quantization").QuantizationConfig.model_validate(config)
    assert {name: getattr(peer.kv_cache_scheme, name) for name in CACHE_FP8} == CACHE_FP8
    assert peer.requires_calibration_data()
    for written in (config, {**peer.to_dict(), "quantization_status": "compressed"}):
        parsed = parse_quantization_config(written)
        assert parsed.fp8_cache
        assert parsed.scheme_of("model.layers.0.feed_forward.down_proj") is not None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"symmetric": False}, "asymmetric weights"),
        ({"num_bits": 8}, "8-bit int weights"),
        ({"type": "float"}, "4-bit float weights"),
        ({"group_size": 16}, "group_size 16"),
        ({"strategy": "tensor", "group_size": None}, "strategy 'tensor'"),
        ({"strategy": "block", "group_size": None, "block_structure": [128, 128]}, "strategy 'block'"),
        ({"strategy": "group", "group_size": None}, "group_size None"),
        ({"dynamic": True}, "dynamic True"),
        ({"dynamic": 0}, "dynamic 0"),
        ({"actorder": "group"}, "actorder 'group'"),
        ({"num_bits": "4"}, "num_bits is '4'"),
        ({"num_bits": 4.0}, "num_bits is 4.0"),
        ({"strategy": 7}, "strategy is 7, expected a string"),
    ],
)
def test_unsupported_weights_are_named(weights: dict[str, Any], message: str) -> None:
    config = short_config({"targets": ["Linear"], "weights": WEIGHTS_INT4 | weights})
    with pytest.raises(ConfigError, match=message) as caught:
        parse_quantization_config(config)
    assert "config_groups: group_0: weights" in str(caught.value)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"weights": WEIGHTS_FP8}, "without input_activations"),
        ({"weights": WEIGHTS_FP8, "input_activations": TOKEN_FP8 | {"dynamic": False}}, "dynamic False"),
        ({"weights": WEIGHTS_FP8, "input_activations": TOKEN_FP8 | {"strategy": "tensor"}}, "strategy 'tensor'"),
        ({"weights": WEIGHTS_FP8, "input_activations": TOKEN_FP8 | {"type": "int"}}, "type 'int'"),
        ({"weights": WEIGHTS_INT4, "input_activations": TOKEN_FP8}, "input_activations"),
        ({"weights": WEIGHTS_INT4, "output_activations": TOKEN_FP8}, "output_activations"),
        ({"weights": None, "input_activations": TOKEN_FP8}, "weights null"),
        (
            {"weights": WEIGHTS_FP8 | {"strategy": "block", "block_structure": [64, 128]}},
            r"block_structure \[64, 128\]",
        ),
        ({"weights": WEIGHTS_INT4, "format": "marlin-24"}, "format 'marlin-24' for int4 weights"),
        ({"weights": WEIGHTS_INT4, "format": "dense"}, "format 'dense' for int4 weights"),
    ],
)
def test_unsupported_groups_are_named(group: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*supported: W4A16"):
        parse_quantization_config(short_config({"targets": ["Linear"], **group}, format="float-quantized"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq' is not supported"),
        ({"quant_method": None}, "quant_method None is not supported"),
        ({"format": "int-quantized"}, "format 'int-quantized' for int4 weights"),
        ({"format": ["pack-quantized"]}, "format"),
        ({"quantization_status": "calibration"}, "quantization_status 'calibration'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"config_groups": None}, "config_groups is None, expected an object"),
        ({"config_groups": {"NVFP4": ["Linear"]}}, "the preset 'NVFP4' is not supported"),
        ({"config_groups": {"W4A16": [3]}}, "W4A16 is not a list of strings"),
        ({"config_groups": {"group_0": "W4A16"}}, "group_0 is 'W4A16', expected an object"),
        ({"ignore": "lm_head"}, "ignore is not a list of strings"),
        ({"ignore": ["re:("]}, r"ignore: '\(' is not a regular expression"),
        ({"kv_cache_scheme": "fp8"}, "kv_cache_scheme is 'fp8', expected an object"),
    ],
)
def test_unusable_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_quantization_config(short_config(**settings))
