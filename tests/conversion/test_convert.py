"""Conversion end to end on random checkpoints: contents, report, on-the-fly equality, and every refusal."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint, multimodal_config, random_tensors, text_config, write_checkpoint
from safetensors.torch import load_file

import llama4_quant
from llama4_quant.architecture import Llama4Config, linear_specs
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.dry_run import dry_run
from llama4_quant.errors import (
    CheckpointError,
    ConfigError,
    Llama4QuantError,
    OutputError,
    QuantizationError,
    UsageError,
)
from llama4_quant.formats import compressed_tensors
from llama4_quant.inspect import inspect
from llama4_quant.quantizers.backend import ENVIRONMENT_VARIABLE, Backend, BackendName, choose_backend
from llama4_quant.quantizers.packed import PackedWeight
from llama4_quant.quantizers.quantize import dequantize_weight, quantize_weight
from llama4_quant.runtime.loader import _placement as placement
from llama4_quant.scheme import Scheme, WeightScheme, preset

ALL_ROLES = ("attention", "lm-head", "vision", "projector")
SCHEMES = {
    "g32": preset("W4A16", group_size=32),
    "g128-absmax-attention": preset("W4A16", group_size=128, observer="absmax", quantize=["attention"]),
    "channel-all": preset("W4A16", group_size=-1, quantize=["attention", "lm-head"]),
    "fp8": preset("FP8_DYNAMIC", quantize=["attention"]),
    "fp8-all": preset("FP8_DYNAMIC", quantize=ALL_ROLES),
    "block": preset("FP8_BLOCK", quantize=["attention"]),
    "ignored-experts": preset("W4A16", ignore=[r"re:.*layers\.3\..*experts"]),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "bf16")


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def as_out_in(tensors: dict[str, torch.Tensor], linear: object) -> torch.Tensor:
    """The obvious, slow way to cut a linear weight out of the BF16 checkpoint."""
    weight = tensors[linear.source]
    if linear.expert is None:
        return weight
    return weight[linear.expert].T[linear.out_start : linear.out_start + linear.out_features]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_output_is_every_weight_quantized_in_memory(source: Path, tmp_path: Path, scheme: Scheme) -> None:
    report = convert(source, tmp_path / "out", scheme=scheme, max_shard_size="200kB")
    before, after = read_all(source), read_all(tmp_path / "out")
    kept = set(report.ignore)
    expected = {}
    for linear in linear_specs(Llama4Config.from_file(source / "config.json")):
        weight = as_out_in(before, linear)
        if linear.name in kept:
            expected[f"{linear.name}.weight"] = weight
        else:
            expected |= compressed_tensors.encode(linear.name, quantize_weight(weight, scheme.weights))
    linear_sources = {x.source for x in linear_specs(Llama4Config.from_file(source / "config.json"))}
    expected |= {name: tensor for name, tensor in before.items() if name not in linear_sources}
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_on_the_fly_equals_offline_bit_for_bit(source: Path, tmp_path: Path, scheme: Scheme) -> None:
    convert(source, tmp_path / "out", scheme=scheme)
    offline = dict(llama4_quant.load(tmp_path / "out").named_parameters())
    on_the_fly = dict(llama4_quant.load(source, scheme=scheme).named_parameters())
    assert offline.keys() == on_the_fly.keys()
    for name, parameter in offline.items():
        assert parameter.dtype == on_the_fly[name].dtype, name
        assert torch.equal(parameter.view(torch.uint8), on_the_fly[name].view(torch.uint8)), name


def test_loaded_bf16_model_holds_the_source(source: Path) -> None:
    tensors, model = read_all(source), llama4_quant.load(source)
    for linear in linear_specs(model.config):
        assert torch.equal(model.linear_target(linear)["weight"], as_out_in(tensors, linear)), linear.name
    for name, target in model.plain_targets().items():
        assert torch.equal(target, tensors[name]), name


@pytest.mark.parametrize("name", [BackendName.AUTO, BackendName.PLAIN])
def test_the_report_names_what_quantized(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: BackendName
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    chosen = choose_backend()
    report = convert(source, tmp_path / "out")
    assert report.backend == dry_run(source).backend == f"{chosen.name}: {chosen.detail}"
    assert json.loads((tmp_path / "out" / "quantization_report.json").read_text())["backend"] == report.backend
    assert convert(source, tmp_path / "bf16", format="bf16").backend is None


def test_a_worker_writes_all_its_codes_to_the_same_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    real = Backend.quantize

    def spy(self: Backend, weight: torch.Tensor, scheme: WeightScheme, out: torch.Tensor | None = None) -> PackedWeight:
        assert out is not None
        used.append(out.data_ptr())
        return real(self, weight, scheme, out)

    monkeypatch.setattr(Backend, "quantize", spy)
    report = convert(source, tmp_path / "out", workers=2)
    assert len(set(used)) <= report.memory.num_workers < len(used)


def test_shard_size_does_not_change_tensors(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "a", max_shard_size="30kB")
    convert(source, tmp_path / "b", max_shard_size="1GB")
    small, large = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert small.keys() == large.keys()
    assert all(torch.equal(small[name], large[name]) for name in small)


def test_repeated_conversion_is_byte_identical(source: Path, tmp_path: Path) -> None:
    for name in "ab":
        convert(source, tmp_path / name, scheme="FP8_DYNAMIC")
    for file in sorted((tmp_path / "a").iterdir()):
        if file.name != "quantization_report.json":  # it has seconds in it
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sources_in_other_float_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    spelled = str(dtype).removeprefix("torch.")
    config = multimodal_config() | {"torch_dtype": spelled}
    for section in ("text_config", "vision_config"):
        config[section] = config[section] | {"torch_dtype": spelled}
    tensors = random_tensors(config, dtype=dtype)
    source = write_checkpoint(tmp_path / "source", config, tensors)
    convert(source, tmp_path / "out", scheme="FP8_DYNAMIC")
    after = read_all(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {x["torch_dtype"] for x in (written, written["text_config"], written["vision_config"])} == {"bfloat16"}
    embedding = "language_model.model.embed_tokens.weight"
    assert torch.equal(after[embedding], tensors[embedding].bfloat16())
    name = "language_model.model.layers.0.feed_forward.gate_proj"
    expected = quantize_weight(tensors[f"{name}.weight"], preset("FP8_DYNAMIC").weights)
    assert torch.equal(after[f"{name}.weight"].view(torch.uint8), expected.codes.view(torch.uint8))


def test_side_files_and_config(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", scheme="W4A16")
    out = tmp_path / "out"
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    section = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert section["ignore"] == list(report.ignore)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read_all(out).keys()
    assert {path.name for path in out.iterdir()} == {
        "generation_config.json", "tokenizer.json", "chat_template.jinja", "config.json",
        "model.safetensors.index.json", "quantization_report.json", "manifest.json", *set(index["weight_map"].values()),
    }  # fmt: skip


@pytest.mark.parametrize(("roles", "targets"), [((), []), (("lm-head",), ["language_model.lm_head"])])
def test_a_quantized_head_is_a_target_by_name(
    source: Path, tmp_path: Path, roles: tuple[str, ...], targets: list[str]
) -> None:
    """In vLLM the head is a ParallelLMHead, which the class name "Linear" does not reach."""
    convert(source, tmp_path / "out", scheme=preset("W4A16", quantize=roles))
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["config_groups"]["group_0"]["targets"] == ["Linear", *targets]


def test_report_measures_each_weight(source: Path, tmp_path: Path) -> None:
    scheme = preset("W4A16", group_size=32)
    convert(source, tmp_path / "out", scheme=scheme)
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    before = read_all(source)
    linears = {x.name: x for x in linear_specs(Llama4Config.from_file(source / "config.json"))}
    measured = 0
    for record in report["weights"]:
        if record["scheme"] == "bf16":
            assert record["relative_error"] is None
            continue
        measured += 1
        weight = as_out_in(before, linears[record["name"]]).double()
        quantized = quantize_weight(weight.bfloat16(), scheme.weights)
        error = weight - dequantize_weight(quantized, torch.float64)
        relative = float(error.norm() / weight.norm())
        # the compiled quantizers sum float32 products: within 2^-19 (backend.py)
        assert record["relative_error"] == pytest.approx(relative, rel=2**-19)
        assert record["sqnr_db"] == pytest.approx(-20 * torch.log10(torch.tensor(relative)).item(), abs=1e-4)
        assert record["scale_min"] == float(quantized.scale.min())
        assert record["scale_max"] == float(quantized.scale.max())
        assert record["seconds"] > 0
    # 2 MoE layers x (4 experts + shared) x 3, and 2 dense layers x 3.
    assert measured == 2 * 5 * 3 + 2 * 3
    assert sum(role["count"] for role in report["roles"]) == len(report["weights"])
    on_disk = sum(tensor.nbytes for tensor in read_all(tmp_path / "out").values())
    assert report["totals"]["bytes_out"] == on_disk


def test_mse_is_never_worse_than_absmax(source: Path, tmp_path: Path) -> None:
    errors = {}
    for observer in ("mse", "absmax"):
        report = convert(source, tmp_path / observer, scheme=preset("W4A16", observer=observer))
        errors[observer] = {w.name: w.relative_error for w in report.weights if w.relative_error is not None}
    assert all(errors["mse"][name] <= errors["absmax"][name] for name in errors["absmax"])
    assert sum(errors["mse"].values()) < 0.99 * sum(errors["absmax"].values())


def test_dry_run_touches_nothing_and_agrees(source: Path, tmp_path: Path) -> None:
    before = sorted(source.iterdir())
    planned = dry_run(source, scheme="W4A16")
    done = convert(source, tmp_path / "out", scheme="W4A16")
    assert sorted(source.iterdir()) == before
    assert planned.totals == done.totals
    assert planned.roles == done.roles
    assert [w.name for w in planned.weights] == [w.name for w in done.weights]


def test_inspect_sees_both_sides(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", scheme=preset("FP8_DYNAMIC", ignore=[r"re:.*layers\.3\..*experts"]))
    bf16, fp8 = inspect(source), inspect(tmp_path / "out")
    assert bf16.num_weights == fp8.num_weights == report.totals.num_weights
    assert bf16.num_bytes == report.totals.bytes_in
    assert fp8.num_bytes == report.totals.bytes_out
    stored = {(role.role, role.stored_as): role.count for role in fp8.roles}
    assert stored["routed-expert", "fp8 channel"] == stored["routed-expert", "bf16"] == 4 * 3


def damaged(folder: Path, name: str, change: str) -> Path:
    """A copy of a good checkpoint with one thing wrong."""
    source = make_checkpoint(folder / "bf16")
    shard = source / "model-00001-of-00002.safetensors"
    config = multimodal_config()
    tensors = random_tensors(config)
    if change == "truncated":
        os.truncate(shard, shard.stat().st_size - 1000)
    elif change == "missing shard":
        shard.unlink()
    elif change == "missing tensor":
        write_checkpoint(source, config, {k: v for k, v in tensors.items() if k != name})
    elif change == "extra tensor":
        write_checkpoint(source, config, tensors | {name: torch.zeros(3)})
    elif change == "shape":
        write_checkpoint(source, config, tensors | {name: torch.zeros(3, 5, dtype=torch.bfloat16)})
    elif change == "dtype":
        write_checkpoint(source, config, tensors | {name: torch.zeros(tensors[name].shape, dtype=torch.int32)})
    else:
        tensors[name].view(-1)[7] = float(change)
        write_checkpoint(source, config, tensors)
    return source


EXPERTS = "language_model.model.layers.1.feed_forward.experts.down_proj"
NORM = "language_model.model.norm.weight"
ROUTER = "language_model.model.layers.1.feed_forward.router.weight"
BAD_SOURCES = [
    ("truncated", NORM, CheckpointError, "model-00001-of-00002.safetensors"),
    ("missing shard", NORM, CheckpointError, "model-00001-of-00002.safetensors"),
    ("missing tensor", ROUTER, CheckpointError, f"{ROUTER} is missing"),
    ("extra tensor", "model.extra", CheckpointError, "model.extra is in the checkpoint, but not part"),
    ("shape", ROUTER, CheckpointError, r"shape \[3, 5\] .* asks for \[4, 128\]"),
    ("dtype", ROUTER, CheckpointError, "dtype I32"),
    ("nan", EXPERTS, QuantizationError, r"experts\.0\.down_proj: row 7, column 0 is nan"),
    ("inf", EXPERTS, QuantizationError, r"experts\.0\.down_proj: row 7, column 0 is inf"),
    ("nan", NORM, QuantizationError, "norm.weight: holds NaN or Inf"),
    ("-inf", ROUTER, QuantizationError, "router: holds NaN or Inf"),
]


@pytest.mark.parametrize(("change", "name", "kind", "message"), BAD_SOURCES)
def test_bad_source(tmp_path: Path, change: str, name: str, kind: type[Exception], message: str) -> None:
    source = damaged(tmp_path, name, change)
    with pytest.raises(kind, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float32_beyond_bfloat16_is_not_written_as_inf(tmp_path: Path) -> None:
    config = text_config()
    tensors = random_tensors(config, dtype=torch.float32)
    tensors["model.norm.weight"][3] = torch.finfo(torch.float32).max
    source = write_checkpoint(tmp_path / "source", config, tensors)
    with pytest.raises(QuantizationError, match=r"model\.norm\.weight"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_devices_that_cannot_hold_a_model(source: Path) -> None:
    with pytest.raises(UsageError, match="device meta cannot be used here"):
        llama4_quant.load(source, device="meta")


def test_no_memory_for_the_model_is_one_message() -> None:
    # An embedding of 2^40 rows of 128 bf16 values: 2^48 bytes, more than a process can address.
    config = Llama4Config.from_dict(text_config(tie_word_embeddings=True, moe_layers=[]))
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=2**40))  # the parser refuses
    target = placement("cpu", torch.bfloat16, "sdpa")
    schemes = {linear.name: None for linear in linear_specs(config)}
    with pytest.raises(UsageError, match=r"no memory for 281,\d{3},\d{3},\d{3},\d{3} bytes of weights on cpu"):
        target.model(config, schemes)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            convert(path, tmp_path / "out")
    source = make_checkpoint(tmp_path / "other")
    (source / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ConfigError, match="model_type is 'mixtral'"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantized_source(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "once")
    with pytest.raises(CheckpointError, match="already quantized"):
        convert(tmp_path / "once", tmp_path / "twice")
    with pytest.raises(CheckpointError, match="already quantized"):
        llama4_quant.load(tmp_path / "once", scheme="W4A16")
    assert not (tmp_path / "twice").exists()


def test_existing_output(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", scheme="W4A16")
    stamp = (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(OutputError, match="overwrite"):
        convert(source, tmp_path / "out", scheme="FP8_DYNAMIC")
    assert (tmp_path / "out" / "config.json").read_bytes() == stamp
    convert(source, tmp_path / "out", scheme="FP8_DYNAMIC", overwrite=True)
    assert b"float-quantized" in (tmp_path / "out" / "config.json").read_bytes()
    assert not any(name.endswith("weight_packed") for name in read_all(tmp_path / "out"))


def test_disk_full_half_way(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, [0]

    def pwrite(*args: object) -> int:
        calls[0] += 1
        if calls[0] > 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OutputError, match=r"(?i)space"):
            convert(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="unfinished output"):
        llama4_quant.load(tmp_path / "out")
    convert(source, tmp_path / "out")
    assert read_all(tmp_path / "out")


def test_failed_overwrite_keeps_the_old_checkpoint(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    bad = damaged(tmp_path / "bad", EXPERTS, "nan")
    with pytest.raises(QuantizationError):
        convert(bad, tmp_path / "out", scheme="FP8_DYNAMIC", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("change", ["missing", "dtype", "shape word", "unknown"])
def test_damaged_quantized_checkpoint_is_refused(source: Path, tmp_path: Path, change: str) -> None:
    convert(source, tmp_path / "out", scheme="W4A16")
    tensors = read_all(tmp_path / "out")
    name = "language_model.model.layers.1.feed_forward.experts.2.up_proj"
    if change == "missing":
        del tensors[f"{name}.weight_scale"]
    elif change == "dtype":
        tensors[f"{name}.weight_packed"] = tensors[f"{name}.weight_packed"].to(torch.int64)
    elif change == "shape word":
        tensors[f"{name}.weight_shape"][0] += 1
    else:
        tensors[f"{name}.weight_zero_point"] = torch.zeros(128, 1, dtype=torch.int32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    broken = write_checkpoint(tmp_path / "broken", config, tensors)
    with pytest.raises(Llama4QuantError, match=name):
        llama4_quant.load(broken)


def test_out_may_be_an_empty_folder_but_not_the_source(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()
    copy = shutil.copytree(source, tmp_path / "copy")
    with pytest.raises(OutputError):
        convert(copy, copy, overwrite=True)
    assert read_all(copy).keys() == read_all(source).keys()
