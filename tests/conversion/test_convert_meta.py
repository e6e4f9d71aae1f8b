"""Conversion to Meta's FP8 layout, end to end on random checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.checkpoint_files import same_bits
from checkpoint.meta_files import meta_shards, params_json, write_meta
from checkpoints import make_checkpoint, multimodal_config, random_tensors, text_config, write_checkpoint
from click.testing import CliRunner
from resilience.resilience_tools import contents, num_finished, run
from torch import Tensor

import llama4_quant
from llama4_quant.checkpoint.json_files import read_json
from llama4_quant.checkpoint.manifest import MANIFEST_NAME, read_manifest, sha256
from llama4_quant.checkpoint.resume import canonical_json
from llama4_quant.cli.main import cli
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.dry_run import dry_run
from llama4_quant.conversion.run import Conversion
from llama4_quant.errors import CheckpointError, OutputError, QuantizationError, SchemeError, UsageError
from llama4_quant.quantizers.quantize import quantize_weight
from llama4_quant.scheme import preset
from llama4_quant.verification.findings import Verification
from llama4_quant.verification.verify import verify
from llama4_quant.work import WorkItem

CONFIG = multimodal_config(num_attention_heads=4, num_key_value_heads=2)
TENSORS = random_tensors(CONFIG)
ABSMAX = preset("FP8_DYNAMIC", observer="absmax")
LAYER = "layers.1.feed_forward.experts"
EXPERTS = f"language_model.model.{LAYER}"
NUM_EXPERTS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "bf16", CONFIG)


@pytest.fixture(scope="module")
def meta_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = meta_shards(CONFIG, TENSORS, 2, fused=True)
    return write_meta(tmp_path_factory.mktemp("source") / "meta", params_json(CONFIG), shards)


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "fp8"
    convert(source, out, format="meta-fp8", scheme=ABSMAX)
    return out


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def load(path: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(path, weights_only=True, mmap=True)
    return loaded


def expert_parts(rank: int, num_ranks: int) -> dict[str, tuple[str, Tensor]]:
    """(name of the scales, BF16 weight [E, in, out]) of what a rank has of the quantized experts."""
    gate_EDF, up_EDF = TENSORS[f"{EXPERTS}.gate_up_proj"].chunk(2, dim=2)
    down_EFD = TENSORS[f"{EXPERTS}.down_proj"]
    return {
        f"{LAYER}.moe_w_in_eD_F": (f"{LAYER}.w1", gate_EDF.chunk(num_ranks, 2)[rank]),
        f"{LAYER}.moe_w_swiglu_eD_F": (f"{LAYER}.w3", up_EDF.chunk(num_ranks, 2)[rank]),
        f"{LAYER}.moe_w_out_eF_D": (f"{LAYER}.w2", down_EFD.chunk(num_ranks, 1)[rank]),
    }


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_tensor_of_every_rank(source: Path, tmp_path: Path, num_ranks: int) -> None:
    """BF16 tensors are those of a BF16 checkpoint in Meta's layout; experts are FP8 within the rounding of e4m3fn."""
    out = tmp_path / "out"
    report = convert(source, out, format="meta-fp8", scheme=ABSMAX, model_parallel=num_ranks)
    shards = meta_shards(CONFIG, TENSORS, num_ranks, fused=False)
    num_bytes = 0
    for rank, shard in enumerate(shards):
        found, scales = load(out / f"consolidated.{rank:02d}.pth"), load(out / f"fp8_scales_{rank}.pt")
        parts = expert_parts(rank, num_ranks)
        num_bytes += sum(t.nbytes for t in (*found.values(), *scales.values()))
        expected = {n: t for n, t in shard.items() if "rope.freqs" not in n and "gate_stats" not in n}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if name not in parts:
                assert same_bits(found[name], tensor.detach()), name
        assert scales.keys() == {scale for scale, _ in parts.values()}
        for name, (scale_name, weight_EIO) in parts.items():
            _check_experts(found[name], scales[scale_name], weight_EIO)
    assert report.totals.bytes_out == num_bytes
    assert len(list(out.glob("*.pth"))) == len(list(out.glob("*.pt"))) == num_ranks
    assert (out / "tokenizer.json").exists()
    assert not (out / "config.json").exists()


def _check_experts(codes: Tensor, scale_EO: Tensor, weight_EIO: Tensor) -> None:
    _, inputs, outputs = weight_EIO.shape
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.shape == (NUM_EXPERTS * inputs, outputs)
    assert (scale_EO.dtype, scale_EO.shape) == (torch.float32, (NUM_EXPERTS, outputs))
    dequantized_EIO = codes.view(NUM_EXPERTS, inputs, outputs).float() * scale_EO.unsqueeze(1)
    # Three mantissa bits: half a step is at most 1/16 of a normal code, and half of 2^-9 for a subnormal one. The
    # largest code is 448, which the scale, rounded to bfloat16, may miss by 2^-9 of it: less than its step.
    bound_EIO = torch.maximum(weight_EIO.float().abs() / 16, scale_EO.unsqueeze(1) * 2**-10) * (1 + 2**-10)
    assert bool(((dequantized_EIO - weight_EIO.float()).abs() <= bound_EIO).all())
    expected = quantize_weight(weight_EIO.transpose(1, 2).flatten(0, 1), ABSMAX.weights)
    assert torch.equal(scale_EO.flatten(), expected.scale.flatten())
    found = codes.view(NUM_EXPERTS, inputs, outputs).transpose(1, 2).flatten(0, 1)
    assert same_bits(found, expected.codes)


def test_from_meta_to_hugging_face_to_meta(source: Path, meta_source: Path, tmp_path: Path) -> None:
    """Straight from Meta's layout, and by way of a Hugging Face checkpoint: the same files."""
    convert(meta_source, tmp_path / "hf", format="bf16")
    files = []
    for name, origin in (("meta", meta_source), ("by-hf", tmp_path / "hf"), ("hf", source)):
        convert(origin, tmp_path / f"{name}-out", format="meta-fp8", model_parallel=None if name == "meta" else 2)
        found = contents(tmp_path / f"{name}-out")
        files.append({file: data for file, data in found.items() if file.endswith((".pth", ".pt"))})
    assert len(files[0]) == 4
    assert files[0] == files[1] == files[2]
    params = json.loads((tmp_path / "meta-out" / "params.json").read_text())
    assert params == params_json(CONFIG)  # as it was


def test_ranks_may_change_from_the_source(meta_source: Path, tmp_path: Path) -> None:
    convert(meta_source, tmp_path / "one", format="meta-fp8", scheme=ABSMAX, model_parallel=1)
    whole = load(tmp_path / "one" / "consolidated.00.pth")
    assert same_bits(whole["tok_embeddings.weight"], TENSORS["language_model.model.embed_tokens.weight"])
    assert same_bits(
        whole["layers.0.attention.wo.weight"], TENSORS["language_model.model.layers.0.self_attn.o_proj.weight"]
    )


def test_which_layers_are_quantized(tmp_path: Path) -> None:
    """As Meta's loader decides: MoE layers, without the first and the last layer of the model."""
    source = make_checkpoint(tmp_path / "hf", text_config(interleave_moe_layer_step=1, num_hidden_layers=4))
    report = convert(source, tmp_path / "out", format="meta-fp8")
    quantized = {(w.role, w.layer) for w in report.weights if w.scheme != "bf16"}
    assert quantized == {("routed-expert", 1), ("routed-expert", 2)}
    scales = load(tmp_path / "out" / "fp8_scales_0.pt")
    assert {name.split(".")[1] for name in scales} == {"1", "2"}
    reasons = {w.reason for w in report.weights if w.role == "routed-expert" and w.layer in {0, 3}}
    assert reasons == {"Meta's loader: the first and the last layer in BF16"}
    assert report.notes[0].startswith("meta-fp8: for Meta's own loader")


def test_nothing_to_quantize(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf", text_config(num_hidden_layers=2))
    with pytest.raises(SchemeError, match="nothing is left to quantize: Meta's loader wants FP8 for routed experts"):
        dry_run(source, format="meta-fp8")


def test_float32_sources_are_rounded_once(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, dtype=torch.float32)
    source = write_checkpoint(tmp_path / "f32", CONFIG, tensors)
    convert(source, tmp_path / "out", format="meta-fp8", model_parallel=1)
    found = load(tmp_path / "out" / "consolidated.00.pth")
    kept = tensors["language_model.model.layers.3.feed_forward.experts.down_proj"].to(torch.bfloat16).flatten(0, 1)
    assert same_bits(found["layers.3.feed_forward.experts.moe_w_out_eF_D"], kept)


@pytest.mark.parametrize(
    "name", [f"{EXPERTS}.gate_up_proj", "language_model.model.layers.3.feed_forward.router.weight"]
)
def test_damaged_weights_are_refused(tmp_path: Path, name: str) -> None:
    damaged = random_tensors(CONFIG)
    damaged[name].view(-1)[77] = torch.inf
    source = write_checkpoint(tmp_path / "damaged", CONFIG, damaged)
    with pytest.raises(QuantizationError, match=name.removesuffix(".weight").removesuffix(".gate_up_proj")):
        convert(source, tmp_path / "out", format="meta-fp8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_parallel": 3}, "--model-parallel 3: 4 attention heads cannot be shared evenly"),
        ({"model_parallel": 4}, "--model-parallel 4: 2 key and value heads cannot be shared evenly"),
        ({"model_parallel": 0}, "--model-parallel 0: 4 attention heads cannot be shared"),
        ({"model_parallel": -1}, "--model-parallel -1: 4 attention heads cannot be shared"),
    ],
)
def test_ranks_that_do_not_fit(source: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SchemeError, match=named):
        dry_run(source, format="meta-fp8", **settings)


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    many_heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3}
    odd = make_checkpoint(tmp_path / "odd", text_config(**many_heads, vocab_size=94))
    with pytest.raises(SchemeError, match=r"tok_embeddings.weight: 94 rows cannot be shared evenly by 4 ranks"):
        dry_run(odd, format="meta-fp8", model_parallel=4)
    narrow = make_checkpoint(tmp_path / "narrow", text_config(**many_heads, intermediate_size=96))
    with pytest.raises(
        SchemeError, match=r"moe_w_in_eD_F: 24 outputs and 128 inputs in each of 4 ranks, .* multiples of 16"
    ):
        dry_run(narrow, format="meta-fp8", model_parallel=4)
    assert "with 2 model-parallel ranks" in dry_run(narrow, format="meta-fp8").notes[0]  # the default is what fits


def test_the_loader_chooses_the_weights(source: Path) -> None:
    for scheme in (preset("FP8_DYNAMIC", quantize=["attention"]), preset("FP8_DYNAMIC", ignore=["re:.*"])):
        with pytest.raises(UsageError, match="drop --quantize and --ignore"):
            dry_run(source, format="meta-fp8", scheme=scheme)
    with pytest.raises(
        UsageError, match="--format meta-fp8 has one scale per output channel: use FP8_DYNAMIC, not W4A16"
    ):
        dry_run(source, format="meta-fp8", scheme="W4A16")
    with pytest.raises(SchemeError, match="--model-parallel is for --format meta-fp8; bf16 has no ranks"):
        dry_run(source, format="bf16", model_parallel=2)


def test_models_that_meta_cannot_express(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tied", text_config(tie_word_embeddings=True))
    with pytest.raises(SchemeError, match="tie_word_embeddings"):
        dry_run(source, format="meta-fp8")
    source = make_checkpoint(tmp_path / "biased", text_config(attention_bias=True))
    with pytest.raises(SchemeError, match="Meta's layout has no place for this tensor"):
        dry_run(source, format="meta-fp8")


def interrupt(source: Path, out: Path, after: int) -> None:
    done, count = Conversion._do, 0

    def counted(self: Conversion, item: WorkItem, buffer: Tensor) -> None:
        nonlocal count
        if count == after:
            raise KeyboardInterrupt
        count += 1
        done(self, item, buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Conversion, "_do", counted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, format="meta-fp8", scheme=ABSMAX, workers=1)


def test_an_interrupted_conversion_ends_with_the_same_bytes(source: Path, converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(source, out, 20)
    interrupt(source, out, 30)
    assert num_finished(out) == 50
    assert not (out / "params.json").exists()
    with pytest.raises(CheckpointError, match="unfinished output of llama4-quant"):
        llama4_quant.load(out)
    with pytest.raises(OutputError, match="settings model_parallel was 2, is 1"):
        convert(source, out, format="meta-fp8", scheme=ABSMAX, model_parallel=1)
    convert(source, out, format="meta-fp8", scheme=ABSMAX, resume="required", workers=2)
    assert contents(out) == contents(converted)


@pytest.mark.parametrize("step", range(8))
def test_a_failure_while_publishing_is_continued(
    source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Some archives are in place already, finished, and others are not."""
    out, real, left = tmp_path / "out", Path.replace, [step]

    def fail(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "Input/output error")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OutputError, match="Input/output error"):
            convert(source, out, format="meta-fp8", scheme=ABSMAX)
    assert not (out / "params.json").exists()
    if step:  # what is in place looks like Meta's layout
        with pytest.raises(CheckpointError, match="unfinished output of llama4-quant"):
            llama4_quant.load(out)
    convert(source, out, format="meta-fp8", scheme=ABSMAX, resume="required")
    assert contents(out) == contents(converted)


def test_processes_share_the_work(source: Path, converted: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    settings = ("--format", "meta-fp8", "--observer", "absmax", "--workers", 1)
    done = run("run", source, tmp_path / "out", 0.01, *settings, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(converted)


def test_one_layout_replaces_the_other(source: Path, converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, format="bf16")
    with pytest.raises(OutputError, match="a checkpoint exists here"):
        convert(source, out, format="meta-fp8", scheme=ABSMAX)
    convert(source, out, format="meta-fp8", scheme=ABSMAX, overwrite=True)
    assert contents(out) == contents(converted)
    with pytest.raises(OutputError, match="a checkpoint exists here"):
        convert(source, out, format="bf16")
    convert(source, out, format="bf16", overwrite=True)
    assert not [path.name for path in out.iterdir() if path.suffix in {".pth", ".pt"} or path.name == "params.json"]
    assert verify(out, source=source).is_whole


def whats(result: Verification) -> str:
    return "\n".join(f"{problem.where}: {problem.what}" for problem in result.problems)


@pytest.mark.parametrize("observer", ["absmax", "mse"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_fresh_conversion_is_whole(
    source: Path, meta_source: Path, tmp_path: Path, observer: str, num_ranks: int
) -> None:
    out, scheme = tmp_path / "out", preset("FP8_DYNAMIC", observer=observer)
    report = convert(source, out, format="meta-fp8", scheme=scheme, model_parallel=num_ranks)
    for origin in (source, meta_source):
        result = verify(out, source=origin)
        assert whats(result) == ""
        assert result.num_weights == len(report.weights)
        expected = {w.name: w.relative_error for w in report.weights if w.relative_error is not None}
        assert {w.name: w.relative_error for w in result.distances} == pytest.approx(expected, rel=2**-19)
        assert len(expected) == 3 * NUM_EXPERTS


def test_any_flipped_byte_is_found(copy: Path) -> None:
    """Every byte of frame and scales of one file, and random bytes of every file."""
    generator = torch.Generator().manual_seed(0)
    for path in sorted(copy.iterdir()):
        whole = path.read_bytes()
        places = {0, len(whole) - 1, *torch.randint(0, len(whole), (6,), generator=generator).tolist()}
        if path.name == "fp8_scales_1.pt":
            places |= set(range(0, len(whole), 131))
        for place in places:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
            try:
                assert not verify(copy).is_whole, f"{path.name}: byte {place}"
            except CheckpointError:
                assert path.name == MANIFEST_NAME  # it cannot be read at all
        path.write_bytes(whole)
    assert verify(copy).is_whole


def damage(folder: Path, name: str, position: int, data: bytes) -> None:
    """Change bytes and make the manifest agree, so that only a deeper check can find it."""
    whole = bytearray((folder / name).read_bytes())
    whole[position : position + len(data)] = data
    (folder / name).write_bytes(whole)
    manifest = read_json(folder / MANIFEST_NAME)
    for part in [manifest["shards"][name]["header"], *manifest["shards"][name]["ranges"]]:
        part[2] = sha256(bytes(whole[part[0] : part[1]]))
    (folder / MANIFEST_NAME).write_bytes(canonical_json(manifest))


def place(folder: Path, name: str, key: str) -> int:
    """Where a tensor begins in a file."""
    data = (folder / name).read_bytes()
    wanted = load(folder / name)[key].clone().view(torch.uint8).numpy().tobytes()
    return data.index(wanted)


@pytest.mark.parametrize(
    ("name", "key", "data", "message"),
    [
        ("fp8_scales_0.pt", f"{LAYER}.w1", b"\0\0\xc0\x7f", "holds NaN or Inf"),
        ("fp8_scales_0.pt", f"{LAYER}.w2", b"\0\0\x80\xbf", "holds scales below zero"),
        ("consolidated.01.pth", f"{LAYER}.moe_w_out_eF_D", b"\x7f", "holds NaN or Inf"),
        ("consolidated.00.pth", "norm.weight", b"\x80\x7f", "holds NaN or Inf"),
    ],
)
def test_values_that_do_not_decode(copy: Path, name: str, key: str, data: bytes, message: str) -> None:
    damage(copy, name, place(copy, name, key), data)
    assert f"{name}/{key}: {message}" in whats(verify(copy))


def test_values_that_decode_but_are_wrong_are_found_with_the_source(copy: Path, source: Path) -> None:
    for name, key in (("consolidated.01.pth", f"{LAYER}.moe_w_in_eD_F"), ("consolidated.01.pth", "output.weight")):
        position = place(copy, name, key)
        byte = (copy / name).read_bytes()[position]
        damage(copy, name, position, bytes([byte ^ 2]))
    assert verify(copy).is_whole
    text = whats(verify(copy, source=source))
    assert "language_model.lm_head: rank 1: differs from the source, but was to be kept" in text
    assert f"{EXPERTS}.0.gate_proj: relative error" in text
    assert text.count("\n") == 1


def test_structure_is_checked(copy: Path, source: Path, tmp_path: Path) -> None:
    params = json.loads((copy / "params.json").read_text())
    (copy / "params.json").write_text(json.dumps(params | {"n_layers": 5}))
    assert "missing, but part of the model in params.json" in whats(verify(copy))
    (copy / "params.json").write_text(json.dumps(params | {"n_layers": 3}))
    assert "not part of the model in params.json" in whats(verify(copy))
    (copy / "params.json").write_text(json.dumps(params))
    other = make_checkpoint(tmp_path / "other", multimodal_config(intermediate_size=256))
    assert "not the model that the output was made of" in whats(verify(copy, source=other))
    (copy / "consolidated.01.pth").unlink()
    assert "consolidated.01.pth: is missing" in whats(verify(copy))
    assert verify(copy, source=source).problems


def test_outputs_are_not_sources(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"already quantized \(it has fp8_scales_0.pt\)"):
        convert(converted, tmp_path / "out")


def test_on_the_command_line(source: Path, converted: Path, tmp_path: Path) -> None:
    def run_cli(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(cli, list(map(str, arguments)))
        return result.exit_code, result.output

    plan = json.loads(run_cli("convert", source, "--dry-run", "--json", "--format", "meta-fp8")[1])
    assert plan["scheme"] == "FP8_DYNAMIC (fp8 channel, mse), meta-fp8"
    assert "with 2 model-parallel ranks" in plan["notes"][0]
    code, output = run_cli("convert", source, "--dry-run", "--format", "meta-fp8", "--model-parallel", 1)
    assert code == 0, output
    assert "with 1 model-parallel rank;" in " ".join(output.split())
    assert run_cli("convert", source, "--dry-run", "--format", "meta-fp8", "--model-parallel", 3)[0] == 1
    config = Path(__file__).parent.parent / "data" / "maverick.json"
    plan = json.loads(run_cli("convert", config, "--dry-run", "--config-only", "--json", "--format", "meta-fp8")[1])
    assert "with 8 model-parallel ranks" in plan["notes"][0]
    code, output = run_cli("convert", source, "-o", tmp_path / "out", "--format", "meta-fp8", "--observer", "absmax")
    assert code == 0, output
    assert contents(tmp_path / "out") == contents(converted)
    code, output = run_cli("verify", tmp_path / "out", "--source", source)
    assert code == 0, output


def test_the_manifest_tiles_every_file(converted: Path) -> None:
    files = {file.name: file for file in read_manifest(converted)}
    assert {*files, MANIFEST_NAME, "quantization_report.json"} == {path.name for path in converted.iterdir()}
    for name, file in files.items():
        data = (converted / name).read_bytes()
        assert all(sha256(data[part.start : part.stop]) == part.sha256 for part in file.ranges)
