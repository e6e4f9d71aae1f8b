"""Conversion to other formats (`bf16`, `fbgemm-fp8`) and from Meta's layout, end to end on random checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint.meta_files import meta_shards, params_json, write_meta
from checkpoints import make_checkpoint, multimodal_config, random_tensors, text_config, write_checkpoint
from click.testing import CliRunner
from safetensors.torch import load_file

import llama4_quant
from llama4_quant.architecture import Llama4Config, linear_specs
from llama4_quant.cli.main import cli
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.dry_run import dry_run
from llama4_quant.errors import QuantizationError, SchemeError, UsageError
from llama4_quant.formats import fbgemm_fp8
from llama4_quant.formats.choice import CheckpointFormat, choose_format
from llama4_quant.inspect import inspect
from llama4_quant.quantizers.quantize import quantize_weight
from llama4_quant.scheme import preset

CONFIG = multimodal_config()
TENSORS = random_tensors(CONFIG)
ABSMAX = preset("FP8_DYNAMIC", observer="absmax", quantize=["attention"])
EXPERTS = "language_model.model.layers.1.feed_forward.experts"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "bf16")


@pytest.fixture(scope="module")
def meta_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = meta_shards(CONFIG, TENSORS, 2, fused=True)
    return write_meta(tmp_path_factory.mktemp("source") / "meta", params_json(CONFIG), shards)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


@pytest.mark.parametrize("kind", ["hugging-face", "meta"])
def test_bf16_output_is_the_hugging_face_checkpoint(source: Path, meta_source: Path, tmp_path: Path, kind: str) -> None:
    origin = source if kind == "hugging-face" else meta_source
    report = convert(origin, tmp_path / "out", format="bf16", max_shard_size="100KB")
    assert_same(read_all(tmp_path / "out"), TENSORS)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    if kind == "hugging-face":
        assert config == CONFIG
    assert report.scheme == "bf16"
    assert report.totals.bytes_in == report.totals.bytes_out == sum(t.nbytes for t in TENSORS.values())
    assert (report.totals.bits_per_weight, report.totals.quantized_fraction) == (16.0, 0.0)
    assert (tmp_path / "out" / ("tokenizer.json" if kind == "hugging-face" else "tokenizer.model")).exists()
    assert inspect(tmp_path / "out").num_weights == report.totals.num_weights


def test_bf16_output_of_float32_is_rounded_once(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, dtype=torch.float32)
    source = write_checkpoint(tmp_path / "f32", CONFIG, tensors)
    convert(source, tmp_path / "out", format="bf16")
    assert_same(read_all(tmp_path / "out"), {name: t.to(torch.bfloat16) for name, t in tensors.items()})


def test_bf16_conversion_refuses_damaged_weights(tmp_path: Path) -> None:
    damaged = random_tensors(CONFIG)
    damaged[f"{EXPERTS}.gate_up_proj"][2, 5, 7] = torch.inf
    source = write_checkpoint(tmp_path / "damaged", CONFIG, damaged)
    with pytest.raises(QuantizationError, match=rf"{EXPERTS}.2.gate_up_proj: holds NaN or Inf between rows 2 and 3"):
        convert(source, tmp_path / "out", format="bf16")


def test_quantizing_from_meta_layout_gives_the_same_bytes(source: Path, meta_source: Path, tmp_path: Path) -> None:
    for name, origin in (("hf", source), ("meta", meta_source)):
        convert(origin, tmp_path / name, scheme=preset("W4A16", group_size=32, observer="absmax"))
    assert_same(read_all(tmp_path / "hf"), read_all(tmp_path / "meta"))


def test_inspect_and_load_read_meta_layout(meta_source: Path) -> None:
    inspection = inspect(meta_source)
    assert inspection.num_weights == sum(t.numel() for t in TENSORS.values())
    model = llama4_quant.load(meta_source)
    state = model.state_dict()
    embedding = next(t for name, t in state.items() if name.endswith("embed_tokens.weight"))
    assert torch.equal(embedding, TENSORS["language_model.model.embed_tokens.weight"])


def expected_fbgemm(quantized_roles: set[str]) -> dict[str, torch.Tensor]:
    """By the definition in transformers' FbgemmFp8Quantize: per row of each expert's transposed weight."""
    linears = {x.source: x for x in linear_specs(Llama4Config.from_dict(CONFIG))}
    expected = {}
    for name, tensor in TENSORS.items():
        if name not in linears or linears[name].role not in quantized_roles:
            expected[name] = tensor
            continue
        matrices = tensor.transpose(1, 2).reshape(-1, tensor.shape[1]) if tensor.dim() == 3 else tensor
        quantized = quantize_weight(matrices, ABSMAX.weights)
        if tensor.dim() == 2:
            expected |= {name: quantized.codes, f"{name}_scale": quantized.scale}
            continue
        num_experts, inputs, outputs = tensor.shape
        expected[name] = quantized.codes.view(num_experts, outputs, inputs).transpose(1, 2).contiguous()
        scale_shape = (outputs, 1) if name.endswith("down_proj") else (1, outputs)
        expected[f"{name}_scale"] = quantized.scale.view(num_experts, *scale_shape)
    return expected


def test_fbgemm_fp8_tensors(source: Path, meta_source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", format="fbgemm-fp8", scheme=ABSMAX)
    expected = expected_fbgemm({"routed-expert", "shared-expert", "dense-mlp", "attention"})
    assert_same(read_all(tmp_path / "out"), expected)
    assert report.totals.bytes_out == sum(t.nbytes for t in expected.values())
    errors = [w.relative_error for w in report.weights if w.role == "routed-expert"]
    # Four experts in two layers, gate with up and down. Rounding to 3 mantissa bits changes a weight by 1/16 at most,
    # and its least normal by more only below 2^-6 of the largest code's binade, which hardly counts.
    assert len(errors) == 16
    assert all(error is not None and 0 < error < 1 / 16 for error in errors)
    convert(meta_source, tmp_path / "meta", format="fbgemm-fp8", scheme=ABSMAX)
    assert_same(read_all(tmp_path / "meta"), expected)


def test_fbgemm_fp8_config_names_what_is_not_converted(source: Path, tmp_path: Path) -> None:
    ignored = preset("FP8_DYNAMIC", ignore=[r"re:.*layers\.3\.feed_forward\.experts"])
    convert(source, tmp_path / "out", format="fbgemm-fp8", scheme=ignored)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["activation_scale_ub"]) == ("fbgemm_fp8", 1200.0)
    kept = config["modules_to_not_convert"]
    assert len(kept) == len(set(kept))
    assert "language_model.model.layers.3.feed_forward.experts" in kept
    assert "language_model.model.layers.1.feed_forward.experts" not in kept
    assert not [name for name in kept if ".experts." in name]
    for name in ("vision_model.patch_embedding.linear", "language_model.model.layers.1.feed_forward.router"):
        assert name in kept
    tensors = read_all(tmp_path / "out")
    converted = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    modules = {name.removesuffix(".weight") for name, t in TENSORS.items() if t.dim() == 2 and name.endswith(".weight")}
    modules -= {"language_model.model.embed_tokens"}
    assert converted | {name for name in kept if not name.endswith(".experts")} == modules
    assert tensors["language_model.model.layers.3.feed_forward.experts.down_proj"].dtype == torch.bfloat16


def test_gate_and_up_cannot_differ_in_one_tensor(source: Path) -> None:
    half = preset("FP8_DYNAMIC", ignore=[f"{EXPERTS}.0.gate_proj"])
    with pytest.raises(SchemeError, match=r"experts.0.gate_up_proj: gate and up are stored in one tensor"):
        dry_run(source, format="fbgemm-fp8", scheme=half)
    whole = preset("FP8_DYNAMIC", ignore=[f"{EXPERTS}.0.gate_proj", f"{EXPERTS}.0.up_proj"])
    with pytest.raises(SchemeError, match=r"the routed experts of a layer need one scheme"):
        dry_run(source, format="fbgemm-fp8", scheme=whole)


def test_fbgemm_fp8_needs_multiples_of_16(tmp_path: Path) -> None:
    config = text_config(intermediate_size=120)
    source = make_checkpoint(tmp_path / "odd", config)
    with pytest.raises(SchemeError, match=r"shared_expert.gate_proj: 120 outputs and 128 inputs, .* multiples of 16"):
        dry_run(source, format="fbgemm-fp8")


def test_formats_and_schemes() -> None:
    assert choose_format("compressed-tensors") == (CheckpointFormat.COMPRESSED_TENSORS, preset("W4A16"))
    assert choose_format("compressed-tensors", "fp8-block")[1] == preset("FP8_BLOCK")
    assert choose_format("bf16") == (CheckpointFormat.BF16, None)
    assert choose_format("fbgemm-fp8") == (CheckpointFormat.FBGEMM_FP8, preset("FP8_DYNAMIC"))
    with pytest.raises(UsageError, match="--format gguf: unknown; known formats: compressed-tensors, bf16, fbgemm-fp8"):
        choose_format("gguf")
    with pytest.raises(UsageError, match="bf16 does not quantize"):
        choose_format("bf16", "W4A16")
    for scheme in ("W4A16", "FP8_BLOCK"):
        with pytest.raises(UsageError, match=f"use FP8_DYNAMIC, not {scheme}"):
            choose_format("fbgemm-fp8", scheme)


def test_dry_run_of_formats_counts_bytes(source: Path) -> None:
    report = dry_run(source, format="fbgemm-fp8", scheme=ABSMAX)
    experts = [w for w in report.weights if w.role == "routed-expert"]
    # gate_up: 128 x 256 codes and 256 scales of 4 bytes; down: 128 x 128 and 128.
    assert {w.bytes_out for w in experts} == {128 * 256 + 256 * 4, 128 * 128 + 128 * 4}
    assert report.scheme == "FP8_DYNAMIC (fp8 channel, absmax), fbgemm-fp8"
    assert any("fbgemm-gpu" in note for note in report.notes)


def test_expert_rows_of_down_proj_have_scales_by_output() -> None:
    codes, scale = torch.ones(6, 4).to(torch.float8_e4m3fn), torch.arange(1.0, 7.0).view(6, 1)
    weights, scales = fbgemm_fp8.encode_expert("x.experts.down_proj", codes, scale, 3)
    assert (weights.name, weights.row_start, tuple(weights.values.shape)) == ("x.experts.down_proj", 3, (1, 4, 6))
    assert (scales.name, tuple(scales.values.shape)) == ("x.experts.down_proj_scale", (1, 6, 1))
    assert scales.values.flatten().tolist() == [1, 2, 3, 4, 5, 6]


def test_formats_on_the_command_line(meta_source: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["convert", str(meta_source), *arguments])
        return result.exit_code, result.output

    code, output = run("-o", str(tmp_path / "bf16"), "--format", "bf16")
    assert code == 0, output
    assert "Largest errors" not in output
    assert_same(read_all(tmp_path / "bf16"), TENSORS)
    assert "FP8_DYNAMIC (fp8 channel, mse), fbgemm-fp8" in run("--dry-run", "--json", "--format", "fbgemm-fp8")[1]
    assert "W4A16 (int4 g32, mse)" in run("--dry-run", "--json", "--group-size", "32")[1]
    for wrong in (["--scheme", "W4A16"], ["--group-size", "32"], ["--quantize", "attention"]):
        assert run("--dry-run", "--format", "bf16", *wrong)[0] != 0
    assert run("--dry-run", "--format", "gguf")[0] == 2
