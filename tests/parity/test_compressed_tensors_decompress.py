"""A checkpoint written by us goes through compressed-tensors' own loading steps to exactly our weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llama4_quant.formats.compressed_tensors import encode, parse_quantization_config, quantization_config
from llama4_quant.quantizers.quantize import dequantize_weight, quantize_weight
from llama4_quant.scheme import Scheme, preset

quantization = pytest.importorskip("compressed_tensors.quantization")
compressors = pytest.importorskip("compressed_tensors.compressors")
transformers = pytest.importorskip("transformers")

SCHEMES = [
    *(preset("W4A16", group_size=size) for size in (32, 64, 128, -1)),
    preset("FP8_DYNAMIC"),
    preset("FP8_BLOCK"),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
IGNORE = ["router", "lm_head"]


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    experts = nn.ModuleList(
        nn.ModuleDict({"gate_proj": nn.Linear(128, 256, bias=False), "down_proj": nn.Linear(256, 128, bias=False)})
        for _ in range(2)
    )
    layers = {"experts": experts, "router": nn.Linear(128, 2), "lm_head": nn.Linear(128, 40), "norm": nn.LayerNorm(128)}
    return nn.ModuleDict(layers).to(torch.bfloat16)


def write_quantized(model: nn.Module, scheme: Scheme, path: Path) -> dict[str, torch.Tensor]:
    """Store `model` as a conversion would; return the weights that it stands for."""
    tensors, expected = {}, {}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if ".gate_proj" in name or ".down_proj" in name:
            quantized = quantize_weight(tensor, scheme.weights)
            tensors |= encode(module, quantized)
            expected[name] = dequantize_weight(quantized, torch.bfloat16)
        else:
            tensors[name] = expected[name] = tensor
    save_file(tensors, path)
    return expected


@every_scheme
def test_their_decompression_gives_our_weights(scheme: Scheme, tmp_path: Path) -> None:
    expected = write_quantized(tiny_model(), scheme, tmp_path / "model.safetensors")
    config = transformers.utils.quantization_config.CompressedTensorsConfig(**quantization_config(scheme, IGNORE))
    assert config.quantization_config.quantization_status == quantization.QuantizationStatus.COMPRESSED
    compressor = compressors.ModelCompressor.from_compression_config(config)
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data.zero_()
    quantization.apply_quantization_config(model, config.quantization_config, show_progress=False)
    compressor.compress_model(model)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    compressor.decompress_model(model)
    found = {name: tensor for name, tensor in model.state_dict().items() if name in expected}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(torch.bfloat16), tensor), name


@every_scheme
def test_our_configuration_survives_their_model_and_json(scheme: Scheme) -> None:
    written = quantization_config(scheme, IGNORE)
    theirs = quantization.QuantizationConfig.model_validate(json.loads(json.dumps(written)))
    parsed = parse_quantization_config(json.loads(theirs.model_dump_json()))
    assert parsed.ignored.items == tuple(IGNORE)
    assert parsed.scheme_of("experts.0.gate_proj") == scheme.weights
    (group,) = theirs.config_groups.values()
    assert group.format == written["format"]


@pytest.mark.parametrize("name", ["W4A16", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_our_presets_are_theirs(name: str) -> None:
    theirs = quantization.preset_name_to_scheme(name, ["Linear"])
    config = quantization.QuantizationConfig.model_validate(quantization_config(preset(name), []))
    ours = config.config_groups["group_0"]
    # They leave open how scales are chosen and stored; everything else must be the same.
    informative = {"observer", "observer_kwargs"}
    assert ours.weights.model_dump(exclude=informative) == theirs.weights.model_dump(exclude=informative)
    if theirs.input_activations is None:
        assert ours.input_activations is None
    else:
        assert ours.input_activations.model_dump(exclude=informative) == theirs.input_activations.model_dump(
            exclude=informative
        )
