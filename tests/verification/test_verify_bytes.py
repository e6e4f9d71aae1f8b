"""Every single byte of an output counts: whichever one changes, to whatever value, verification finds it.

Each byte of every file but the weights, each byte of every shard's header, and some thousand bytes of weights. A flip
is looked for by the check that `verify` makes of that file, since all of `verify` takes some hundredths of a second;
tests/verification/test_verify.py goes through the front door.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import make_checkpoint, text_config

from llama4_quant.checkpoint.manifest import MANIFEST_NAME, read_manifest
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.report import REPORT_NAME
from llama4_quant.errors import CheckpointError
from llama4_quant.verification.files import _check_file, _check_report, check_files
from llama4_quant.verification.verify import verify

NUM_WEIGHT_BYTES = 2000
CONFIG = text_config(
    vocab_size=8,
    hidden_size=32,
    intermediate_size=32,
    intermediate_size_mlp=32,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=32,
    num_local_experts=1,
    interleave_moe_layer_step=1,
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    convert(make_checkpoint(folder / "bf16", CONFIG), folder / "out", scheme="FP8_DYNAMIC", max_shard_size="10kB")
    return folder / "out"


def flips(path: Path, places: Iterator[int] | range, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Change one byte after the other in the file, each to a random other value, and change it back."""
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for place in places:
            value = whole[place] ^ rng.randrange(1, 256)
            file.seek(place)
            file.write(bytes([value]))
            yield place, value
            file.seek(place)
            file.write(whole[place : place + 1])


def manifest_check(folder: Path) -> bool:
    """Whether the manifest itself, or what it says about the files, is found to be wrong."""
    try:
        return any(check_files(folder, read_manifest(folder), None))
    except CheckpointError:
        return True


def check_of(path: Path) -> Callable[[], bool]:
    """What finds a change of this file."""
    if path.name == REPORT_NAME:
        return lambda: any(_check_report(path))
    if path.name == MANIFEST_NAME:
        return lambda: manifest_check(path.parent)
    (digest,) = [file for file in read_manifest(path.parent) if file.name == path.name]
    return lambda: any(_check_file(path, digest))


def test_every_file_has_a_check_and_is_sound(out: Path) -> None:
    assert verify(out).is_whole
    assert len(list(out.glob("*.safetensors"))) > 1
    for path in out.iterdir():
        assert not check_of(path)(), path.name


def test_every_byte_beside_the_weights(out: Path) -> None:
    rng = random.Random(0)
    num_flips = 0
    for path in sorted(out.iterdir()):
        header = int.from_bytes(path.read_bytes()[:8], "little") + 8
        size = header if path.suffix == ".safetensors" else path.stat().st_size
        is_found = check_of(path)
        for place, value in flips(path, range(size), rng):
            num_flips += 1
            assert is_found(), f"{path.name}: byte {place} became {value}"
    assert num_flips > 10_000
    assert verify(out).is_whole


def test_spaces_in_the_report_count_too(out: Path) -> None:
    """Another white space means the same in JSON."""
    path = out / REPORT_NAME
    whole = path.read_bytes()
    for other in (b"\t", b"\r", b"\n"):
        path.write_bytes(whole.replace(b" ", other, 1))
        assert any(_check_report(path))
    path.write_bytes(whole + b"\n")
    assert any(_check_report(path))
    path.write_bytes(whole)


def test_bytes_of_weights(out: Path) -> None:
    rng = random.Random(1)
    shards = sorted(out.glob("*.safetensors"))
    for path in shards:
        size = path.stat().st_size
        places = iter([0, size - 1, *(rng.randrange(size) for _ in range(NUM_WEIGHT_BYTES // len(shards)))])
        is_found = check_of(path)
        for place, value in flips(path, places, rng):
            assert is_found(), f"{path.name}: byte {place} became {value}"
