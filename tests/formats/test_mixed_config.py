"""`quantization_config` of a checkpoint whose modules have different schemes: written, read back, read by the peer."""

import re

import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from torch import nn

from llama4_quant.formats.compressed_tensors import mixed_quantization_config, parse_quantization_config
from llama4_quant.scheme import Strategy, WeightScheme, WeightType, preset

PREFIX = "language_model.model.layers"
CHANNEL = WeightScheme(type=WeightType.INT4, strategy=Strategy.CHANNEL)
G32, G64 = (preset("W4A16", group_size=size).weights for size in (32, 64))
FP8 = preset("FP8_DYNAMIC").weights


def experts(layer: int, count: int = 12) -> list[str]:
    return [
        f"{PREFIX}.{layer}.feed_forward.experts.{expert}.{projection}_proj"
        for expert in range(count)
        for projection in ("gate", "up", "down")
    ]


def schemes() -> dict[str, WeightScheme]:
    found = {f"{PREFIX}.{layer}.self_attn.{p}_proj": FP8 if layer == 1 else G32 for layer in (1, 11) for p in "qkvo"}
    found |= dict.fromkeys(experts(1), CHANNEL) | dict.fromkeys(experts(11), G64) | dict.fromkeys(experts(21), CHANNEL)
    return found | {f"{PREFIX}.1.feed_forward.shared_expert.down_proj": G64}


IGNORED = [f"{PREFIX}.0.feed_forward.down_proj", *experts(2), f"{PREFIX}.1.feed_forward.router", "lm_head"]


def test_what_is_written_is_read_back() -> None:
    config = mixed_quantization_config(schemes(), IGNORED)
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == IGNORED
    parsed = parse_quantization_config(config)
    assert {name: parsed.scheme_of(name) for name in schemes()} == schemes()
    assert {parsed.scheme_of(name) for name in IGNORED} == {None}
    # A layer's number is matched whole.
    assert parsed.scheme_of(experts(111)[0]) is None


def test_each_group_has_its_own_format() -> None:
    groups = mixed_quantization_config(schemes(), IGNORED)["config_groups"].values()
    assert [group["format"] for group in groups] == ["float-quantized", "pack-quantized"] + ["pack-quantized"] * 2
    assert [group["input_activations"] is not None for group in groups] == [True, False, False, False]


def test_one_format_is_the_format_of_all() -> None:
    found = {name: scheme for name, scheme in schemes().items() if scheme.type is WeightType.INT4}
    assert mixed_quantization_config(found, IGNORED)["format"] == "pack-quantized"


def test_no_target_is_a_class() -> None:
    """vLLM looks for the class of qkv_proj before the names of q_proj, k_proj and v_proj."""
    groups = mixed_quantization_config(schemes(), IGNORED)["config_groups"].values()
    targets = [target for group in groups for target in group["targets"]]
    assert "Linear" not in targets
    assert len(targets) == len(set(targets))
    names = [target for target in targets if not target.startswith("re:")]
    assert set(names) == {name for name in schemes() if ".experts." not in name}
    patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
    for name in experts(1) + experts(11) + experts(21):
        assert sum(re.fullmatch(pattern, name) is not None for pattern in patterns) == 1
    assert not any(re.match(pattern, name) for pattern in patterns for name in (*IGNORED, f"{experts(1)[0]}.x"))


def test_compressed_tensors_matches_each_name_to_the_same_group() -> None:
    config = QuantizationConfig.model_validate(mixed_quantization_config(schemes(), IGNORED))
    assert config.format == "mixed-precision"
    by_target = {target: group for group in config.config_groups.values() for target in group.targets}
    with torch.device("meta"):
        module = nn.Linear(1, 1)
    for name, scheme in schemes().items():
        (target,) = match_targets(name, module, list(by_target))
        weights = by_target[target].weights
        assert weights is not None
        assert weights.num_bits == (4 if scheme.type is WeightType.INT4 else 8)
        assert (weights.strategy, weights.group_size) == (scheme.strategy, scheme.group_size)


def test_the_patterns_of_maverick_are_short_enough_to_be_read() -> None:
    layers = range(1, 48, 2)
    found = {name: G64 if layer % 4 == 1 else CHANNEL for layer in layers for name in experts(layer, count=128)}
    config = mixed_quantization_config(found, [])
    assert sum(len(group["targets"]) for group in config["config_groups"].values()) == 2
    parsed = parse_quantization_config(config)
    assert {name: parsed.scheme_of(name) for name in found} == found
