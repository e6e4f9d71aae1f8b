"""config.json, params.json, quantization_config and settings with values of wrong type or absurd size."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hostile.cases import SOURCE, Bases, Case
from hostile.folder_cases import edit_json

ALL = (*SOURCE, "config-only")
NAMES = "model.layers.0.self_attn.q_proj"

TEXT: dict[str, tuple[dict[str, Any], str]] = {
    "10^9 layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected an integer from 1 to"),
    "hidden size of 10^12": ({"hidden_size": 10**12}, "hidden_size is 1000000000000, expected an integer from 1 to"),
    "vocabulary of 10^15": ({"vocab_size": 10**15}, "vocab_size is 10+, expected"),
    "10^6 experts": ({"num_local_experts": 10**6}, "num_local_experts is 1000000, expected"),
    "16,384 experts in 1,024 layers": (
        {"num_local_experts": 16384, "num_hidden_layers": 1024, "interleave_moe_layer_step": 1},
        "1024 MoE layers of 16384 experts",
    ),
    "each size as large as it may be": (
        {"hidden_size": 2**20, "intermediate_size_mlp": 2**20, "num_hidden_layers": 1024, "moe_layers": []},
        r"sizes of a model of 3,378,[\d,]+ weights; expected at most",
    ),
    "heads of 2^40": ({"num_attention_heads": 2**40}, "num_attention_heads is 1099511627776, expected"),
    "head_dim of 2^40": ({"head_dim": 2**40}, "head_dim is 1099511627776, expected"),
    "negative width": ({"intermediate_size": -128}, "intermediate_size is -128, expected"),
    "width of zero": ({"intermediate_size_mlp": 0}, "intermediate_size_mlp is 0, expected"),
    "width a float": ({"hidden_size": 128.0}, r"hidden_size is 128\.0, expected"),
    "width a boolean": ({"hidden_size": True}, "hidden_size is True, expected"),
    "width a string": ({"hidden_size": "128"}, "hidden_size is '128', expected"),
    "width a list": ({"hidden_size": [128]}, r"hidden_size is \[128\], expected"),
    "width of 4,000 digits": ({"hidden_size": 10**4000}, r"hidden_size is 10+\.\.\. \(4,001 characters\), expected"),
    "epsilon of 4,000 digits": ({"rms_norm_eps": 10**4000}, r"rms_norm_eps is 10+\.\.\. .*, expected a number"),
    "epsilon of 1e308": ({"rms_norm_eps": 1e308}, r"rms_norm_eps is 1e\+308, expected a number"),
    "theta negative": ({"rope_theta": -1.0}, r"rope_theta is -1\.0, expected a number"),
    "theta a string of a megabyte": ({"rope_theta": "x" * 10**6}, r"rope_theta is 'x+\.\.\. \(1,000,002 characters\)"),
    "layers beyond the end": ({"moe_layers": [0, 10**9]}, "moe_layers .* names a layer beyond"),
    "a million layers listed": ({"moe_layers": [0] * 10**6}, "moe_layers has 1,000,000 items, expected at most"),
    "layers of 4,000 digits": ({"no_rope_layers": [10**4000]}, "no_rope_layers is .*, expected a list of integers"),
    "scaling a list": ({"rope_scaling": [1]}, "rope_scaling is .*, expected an object"),
    "scaling unknown": ({"rope_scaling": {"rope_type": "\x1b[2J"}}, r"rope_type is '\\x1b\[2J'"),
    "key and value heads": ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
    "another model": ({"model_type": "x" * 10**6}, r"model_type is 'x+\.\.\. \(1,000,002 characters\)"),
    "model type a list": ({"model_type": ["llama4"]}, "model_type is .*, expected a string"),
    "quantized already, it says": ({"quantization_config": {"quant_method": "x" * 10**6}}, "quant"),
    "more layers than weights": ({"num_hidden_layers": 1000}, "missing from the checkpoint"),
    "more experts than weights": (
        {"num_local_experts": 8000},
        r"shape \[4, 128\] in .* asks for \[8000, 128\]|missing",
    ),
}
VISION: dict[str, tuple[dict[str, Any], str]] = {
    "pixel_shuffle_ratio of 1e-300": ({"pixel_shuffle_ratio": 1e-300}, "pixel_shuffle_ratio is 1e-300, expected"),
    "pixel_shuffle_ratio of 1e300": ({"pixel_shuffle_ratio": 1e300}, r"pixel_shuffle_ratio is 1e\+300, expected"),
    "pixel_shuffle_ratio of 1e-30": ({"pixel_shuffle_ratio": 1e-30}, "pixel_shuffle_ratio must be 1/n"),
    "image of 10^9 pixels": ({"image_size": 10**9}, "image_size is 1000000000, expected"),
    "image of a million sides": ({"image_size": [28] * 10**6}, "image_size has 1,000,000 items, expected at most 2"),
    "patches of half a pixel": ({"patch_size": 0.5}, r"patch_size is 0\.5, expected"),
    "10^9 channels": ({"num_channels": 10**9}, "num_channels is 1000000000, expected"),
    "as wide as may be": (
        {"hidden_size": 2**20, "intermediate_size": 2**20, "pixel_shuffle_ratio": 1.0, "num_hidden_layers": 1024},
        "vision_config: sizes of a model of",
    ),
}
PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "10^9 layers": ({"n_layers": 10**9}, "n_layers is 1000000000, expected"),
    "width a string": ({"dim": "128"}, "dim is '128', expected"),
    "floor_scale of 1e300": ({"floor_scale": 1e300}, r"floor_scale is 1e\+300, expected a number"),
    "norm_eps of 4,000 digits": ({"norm_eps": 10**4000}, "norm_eps is .*, expected a number"),
    "10^12 experts": ({"moe_args": {"num_experts": 10**12}}, "num_experts"),
    "no heads": ({"n_heads": 0}, "n_heads is 0, expected"),
    "heads that do not divide": ({"n_heads": 7}, "rows do not fit the number of heads"),
    "vision a list": ({"vision_args": [1]}, "vision_args is .*, expected an object"),
    "quantized already": ({"quantization_args": {"scheme": "\x1b[2J" * 10**5}}, "quantization_args is .*; start from"),
}
GROUP = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128}}}}
QUANTIZATION: dict[str, tuple[dict[str, Any], str]] = {
    "pattern that backtracks for ever": (
        {"ignore": ["re:(.*)*x"]},
        r"ignore: '\(\.\*\)\*x': a pattern that could take",
    ),
    "pattern with nested groups": ({"ignore": ["re:((a|b)+)+$"]}, "a pattern that could take too long"),
    "pattern of many dots": ({"ignore": ["re:" + ".*" * 30 + "x"]}, "a pattern that could take too long"),
    "pattern of many options": ({"ignore": ["re:" + ".?" * 30 + "x"]}, "a pattern that could take too long"),
    "pattern of many groups": ({"ignore": ["re:" + "(?:mo|m.)" * 30]}, "a pattern that could take too long"),
    "pattern with a comment": ({"ignore": ["re:(.+)(?#)+x"]}, "a pattern that could take too long"),
    "pattern with flags": ({"ignore": ["re:(?x)(.+) +x"]}, "a pattern that could take too long"),
    "pattern with a huge count": ({"ignore": ["re:a{99999999999}"]}, "is not a regular expression"),
    "pattern of a megabyte": ({"ignore": ["re:" + "a" * 10**6]}, "a pattern that could take too long"),
    "pattern of brackets": ({"ignore": ["re:" + "(" * 400]}, "could take too long|is not a regular expression"),
    "a thousand patterns": ({"ignore": [f"re:{n}" for n in range(1000)]}, "1,000 patterns, expected at most"),
    "groups in a string": ({"config_groups": "group_0"}, "config_groups is 'group_0', expected an object"),
    "ignore a number": ({"ignore": 1}, "ignore is not a list of strings"),
    "no groups": ({"config_groups": None}, "config_groups is None, expected an object"),
    "groups a list": ({"config_groups": [1]}, r"config_groups is \[1\], expected an object"),
    "group with a terminal escape": ({"config_groups": {"\x1b[2J": {}}}, r"config_groups: '\\x1b\[2J': weights null"),
    "group of a megabyte": ({"config_groups": {"x" * 10**6: {}}}, r"\(1,000,002 characters\): weights null"),
    "bits of 10^4000": ({"config_groups": {"g": {"weights": {"num_bits": 10**4000}}}}, "num_bits is .*, expected"),
    "another method": ({"quant_method": "gptq" * 10**5}, r"quant_method 'gptq.*\.\.\. \(400,002 characters\)"),
    "sparsity": ({"sparsity_config": {"a": "\x1b" * 10**5}}, "sparsity_config .* is not supported"),
}
SETTINGS: dict[str, tuple[str, object, str]] = {
    "generation a list": ("generation_config.json", [1], "expected a JSON object"),
    "temperature of 4,000 digits": (
        "generation_config.json",
        {"do_sample": True, "temperature": 10**4000},
        "temperature is",
    ),
    "temperature of a million": (
        "generation_config.json",
        {"do_sample": True, "temperature": 1e6},
        "expected 0 .* to 100",
    ),
    "top_p above 1": ("generation_config.json", {"top_p": 2.0}, r"top_p is 2\.0, expected"),
    "eos of 4,000 digits": ("generation_config.json", {"eos_token_id": [10**4000]}, "eos_token_id is"),
    "10^12 new tokens": ("generation_config.json", {"max_new_tokens": 10**13}, "max_new_tokens is 10+, expected"),
    "no image settings": ("preprocessor_config.json", {"size": 1}, "size"),
    "10^9 tiles": (
        "preprocessor_config.json",
        {"size": {"height": 28, "width": 28}, "max_patches": 10**9},
        "max_patches is",
    ),
    "mean of strings": (
        "preprocessor_config.json",
        {"size": {"height": 28, "width": 28}, "image_mean": ["a"] * 3},
        "image_mean",
    ),
    "std of 4,000 digits": (
        "preprocessor_config.json",
        {"size": {"height": 28, "width": 28}, "image_std": [10**4000, 1, 1]},
        "image_std is",
    ),
    "std of zeros": (
        "preprocessor_config.json",
        {"size": {"height": 28, "width": 28}, "image_std": [0, 0, 0]},
        "image_std",
    ),
}


def _case(
    name: str, base: str, change: Callable[[Path], object], message: str, commands: tuple[str, ...] = ALL
) -> Case:
    def make(root: Path, bases: Bases) -> None:
        change(bases.put(base, root / "model"))

    return Case(name=name, make=make, commands=commands, message=message)


def _edited(file: str, changes: Mapping[str, Any], section: str | None = None) -> Callable[[Path], None]:
    """Update a JSON file, or a section of it."""

    def change(model: Path) -> None:
        edit_json(
            model / file, lambda content: (content[section] if section else content).update(copy.deepcopy(changes))
        )

    return change


def _written(file: str, content: object) -> Callable[[Path], object]:
    return lambda model: (model / file).write_text(json.dumps(content))


def config_cases() -> list[Case]:
    """All of them."""
    cases = [
        _case(
            f"config: {name}",
            "bf16",
            _edited("config.json", changes),
            message,
            SOURCE if name.startswith("more") else ALL,
        )
        for name, (changes, message) in TEXT.items()
    ]
    cases += [
        _case(f"vision: {name}", "vision", _edited("config.json", changes, "vision_config"), message)
        for name, (changes, message) in VISION.items()
    ]
    cases += [
        _case(f"params: {name}", "meta", _edited("params.json", changes), message, SOURCE)
        for name, (changes, message) in PARAMS.items()
    ]
    cases += [
        _case(
            f"quantization: {name}",
            "w4a16",
            _edited("config.json", changes, "quantization_config"),
            message,
            ("inspect", "load"),
        )
        for name, (changes, message) in QUANTIZATION.items()
    ]
    cases += [
        _case(f"settings: {name}", "vision", _written(file, content), message, ("settings",))
        for name, (file, content, message) in SETTINGS.items()
    ]
    return cases
