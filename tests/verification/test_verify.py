"""Verification finds every kind of damage, and nothing else."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint, random_tensors, text_config, write_checkpoint

from llama4_quant.checkpoint.json_files import dump_json, read_json
from llama4_quant.checkpoint.manifest import MANIFEST_NAME, read_manifest, sha256, with_self_checksum
from llama4_quant.checkpoint.paths import STAGING_NAME
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.resume import canonical_json
from llama4_quant.cli.main import main
from llama4_quant.conversion.convert import convert
from llama4_quant.errors import CheckpointError
from llama4_quant.scheme import preset
from llama4_quant.verification.findings import Verification
from llama4_quant.verification.verify import verify

SCHEMES = {
    "w4a16": preset("W4A16", group_size=32, quantize=["attention", "lm-head"]),
    "fp8": preset("FP8_DYNAMIC"),
    "block": preset("FP8_BLOCK", ignore=[r"re:.*layers\.3\..*experts"]),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("verify") / "bf16", text_config())


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "out"
    convert(source, out, scheme=SCHEMES["w4a16"], max_shard_size="300kB")
    return out


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def whats(result: Verification) -> str:
    return "\n".join(f"{problem.where}: {problem.what}" for problem in result.problems)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_fresh_conversion_is_whole(source: Path, tmp_path: Path, scheme: object) -> None:
    report = convert(source, tmp_path / "out", scheme=scheme)
    result = verify(tmp_path / "out", source=source)
    assert whats(result) == ""
    assert result.is_whole
    assert result.num_weights == len(report.weights)
    expected = {w.name: w.relative_error for w in report.weights if w.relative_error is not None}
    assert {w.name: w.relative_error for w in result.distances} == pytest.approx(expected, rel=2**-19)
    assert verify(tmp_path / "out").distances == ()


def is_found(folder: Path) -> bool:
    try:
        return not verify(folder).is_whole
    except CheckpointError:  # a manifest that cannot be read at all
        return True


def test_any_flipped_byte_is_found(copy: Path) -> None:
    """Every file, the manifest and the report included; first, last and random bytes."""
    rng = random.Random(0)
    for path in sorted(copy.iterdir()):
        whole = path.read_bytes()
        for place in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(6))}:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            assert is_found(copy), f"{path.name}: byte {place}"
        path.write_bytes(whole)
    assert verify(copy).is_whole


def test_bytes_of_the_report_that_mean_the_same_are_found(copy: Path) -> None:
    """Other spellings of the same JSON values: an exponent's letter, white space, a 17th digit."""
    report = copy / "quantization_report.json"
    content = with_self_checksum(read_json(report) | {"seconds": 0.30000000000000004, "output": 1e-05})
    whole = dump_json(content).decode()
    report.write_text(whole)
    assert verify(copy).is_whole
    for old, new in (("1e-05", "1E-05"), ("\n  ", "\n\t "), ("0.30000000000000004", "0.30000000000000005")):
        changed = whole.replace(old, new, 1)
        assert len(changed) == len(whole)
        assert json.loads(changed) == content
        report.write_text(changed)
        assert is_found(copy), new


@pytest.mark.parametrize("ignore", [[], [r"re:.*layers\.1\..*experts", "model.layers.0.feed_forward.up_proj"]])
def test_fused_fp8(source: Path, tmp_path: Path, ignore: list[str]) -> None:
    out = tmp_path / "out"
    scheme = preset("FP8_DYNAMIC", quantize=["attention"], ignore=ignore)
    report = convert(source, out, scheme=scheme, format="fbgemm-fp8")
    result = verify(out, source=source)
    assert whats(result) == ""
    assert {w.name: w.relative_error for w in result.distances} == pytest.approx(
        {w.name: w.relative_error for w in report.weights if w.relative_error is not None}, rel=2**-19
    )
    assert len(result.distances) > 4 * 2
    overwrite(out, "model.layers.3.feed_forward.experts.down_proj", b"\x7f")
    assert "experts.0.down_proj, model.layers.3.feed_forward.experts.down_proj: holds NaN" in whats(verify(out))
    overwrite(out, "model.layers.3.feed_forward.experts.down_proj", b"\x00" * 8)
    assert "experts.0.down_proj: relative error" in whats(verify(out, source=source))
    config = read_json(out / "config.json")
    config["quantization_config"]["modules_to_not_convert"].pop()
    (out / "config.json").write_text(json.dumps(config))
    assert "modules_to_not_convert has to name exactly the" in whats(verify(out))


def test_the_place_is_named(copy: Path) -> None:
    shard = read_manifest(copy)[0]
    data = bytearray((copy / shard.name).read_bytes())
    part = shard.ranges[3]
    data[part.start] ^= 1
    (copy / shard.name).write_bytes(data)
    assert f"{shard.name}: bytes {part.start:,} to {part.stop:,} are not what was written" in whats(verify(copy))


def test_missing_cut_and_foreign_files(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "stray.safetensors").write_bytes(b"x")
    shard = read_manifest(copy)[0].name
    with (copy / shard).open("ab") as file:
        file.write(b"more")
    text = whats(verify(copy))
    assert "tokenizer.json: is missing" in text
    assert "stray.safetensors: is not in the manifest" in text
    assert f"{shard}: has " in text


def with_new_manifest(folder: Path, name: str) -> None:
    """Make the manifest agree with a changed shard, so that only a deeper check can find the change."""
    manifest = read_json(folder / MANIFEST_NAME)
    data = (folder / name).read_bytes()
    for part in [manifest["shards"][name]["header"], *manifest["shards"][name]["ranges"]]:
        part[2] = sha256(data[part[0] : part[1]])
    (folder / MANIFEST_NAME).write_bytes(canonical_json(manifest))


def overwrite(folder: Path, tensor: str, value: bytes) -> None:
    with CheckpointReader.open(folder) as reader:
        entry = reader.tensors[tensor]
    with entry.path.open("r+b") as file:
        file.seek(entry.start)
        file.write(value)
    with_new_manifest(folder, entry.path.name)


NAME = "model.layers.0.feed_forward.up_proj"


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        (f"{NAME}.weight_scale", b"\xc0\x7f", "holds NaN or Inf"),  # bf16 0x7fc0
        (f"{NAME}.weight_shape", b"\x01", "weight_shape: says [257, 128], expected [256, 128]"),
        ("model.norm.weight", b"\x80\x7f", "holds NaN or Inf"),  # bf16 infinity
    ],
)
def test_values_that_do_not_decode(copy: Path, tensor: str, value: bytes, message: str) -> None:
    overwrite(copy, tensor, value)
    assert message in whats(verify(copy))


def test_codes_that_decode_but_are_wrong_are_found_with_the_source(copy: Path, source: Path) -> None:
    overwrite(copy, f"{NAME}.weight_packed", b"\x00\xff\x00\xff")
    overwrite(copy, "model.norm.weight", b"\x00\x00")
    assert verify(copy).is_whole
    text = whats(verify(copy, source=source))
    assert f"{NAME}: relative error" in text
    assert "model.norm.weight: differs from the source" in text


def test_another_source(copy: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", text_config(), random_tensors(text_config(), seed=1))
    assert len(verify(copy, source=other).problems) > 50


def test_nan_codes_of_fp8(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", scheme="FP8_DYNAMIC")
    overwrite(tmp_path / "out", f"{NAME}.weight", b"\xff")
    assert f"{NAME}.weight: holds NaN" in whats(verify(tmp_path / "out"))


def test_a_checkpoint_that_is_not_quantized(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", format="bf16")
    assert whats(verify(tmp_path / "out", source=source)) == ""
    overwrite(tmp_path / "out", "model.layers.1.feed_forward.experts.down_proj", b"\x00\x00")
    assert verify(tmp_path / "out").is_whole
    text = whats(verify(tmp_path / "out", source=source))
    assert "layers.1.feed_forward.experts.0.down_proj: differs from the source" in text


def test_without_a_manifest(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"no {MANIFEST_NAME}, so .* only outputs of convert can be verified"):
        verify(source)
    with pytest.raises(CheckpointError, match="expected the folder of a converted checkpoint"):
        verify(tmp_path / "nowhere")
    (tmp_path / "out" / STAGING_NAME).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="an unfinished conversion; run the same `llama4-quant convert` again"):
        verify(tmp_path / "out")


def test_a_source_of_another_model(copy: Path, tmp_path: Path) -> None:
    for number, changes in enumerate(({"num_hidden_layers": 3}, {"vocab_size": 64})):
        other = make_checkpoint(tmp_path / str(number), text_config(**changes))
        assert "the output and the source are of different models" in whats(verify(copy, source=other))


@pytest.mark.parametrize("damage", [False, True])
def test_command(copy: Path, damage: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if damage:
        (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    for flags in (["--json"], []):
        monkeypatch.setattr(sys, "argv", ["llama4-quant", "verify", str(copy), *flags])
        if damage:
            with pytest.raises(SystemExit, match="1"):
                main()
        else:
            main()
        out = capsys.readouterr().out
        if flags:
            assert json.loads(out)["is_whole"] is not damage
        else:
            assert ("1 problem" in out) is damage
            assert ("whole" in out) is not damage
