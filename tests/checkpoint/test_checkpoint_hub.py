"""Downloading from the Hub with the real client: which files, whose token, and what happens when it fails."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
import torch
from checkpoint.checkpoint_files import sharded, tree
from checkpoint.hub_server import COMMIT, TOKEN, LocalHub, blob_id, running_hub
from huggingface_hub import constants

from llama4_quant.checkpoint.hub import Repository
from llama4_quant.checkpoint.hub_transfer import silent_bar
from llama4_quant.checkpoint.source import resolve
from llama4_quant.errors import CheckpointError

OTHER_COMMIT = "f" * 40
UNNEEDED = {
    "README.md": b"-",
    "unused.safetensors": b"x" * 100,
    "evil.py": b"-",
    "pytorch_model.bin": b"-",
    "pytorch_model-00001-of-00002.bin": b"-",
    "model.onnx": b"-",
    "model.gguf": b"-",
    "tf_model.h5": b"-",
    "flax_model.msgpack": b"-",
    "consolidated.00.pth": b"-",
    "onnx/config.json": b"-",
    "original/consolidated.00.pth": b"-",
    "metal/model.safetensors": b"-",
}


def checkpoint_files(folder: Path) -> dict[str, bytes]:
    """Three shards of 80 kB, an index, config.json and a tokenizer."""
    torch.manual_seed(0)
    sharded(folder, {f"model-{n}.safetensors": {f"w{n}": torch.randn(100, 200)} for n in range(3)})
    (folder / "tokenizer.json").write_text("{}")
    return tree(folder)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    return checkpoint_files(tmp_path / "model")


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with running_hub({**files, **UNNEEDED}, tmp_path, monkeypatch) as hub:
        yield hub


def test_only_needed_files_are_downloaded_and_bytes_are_the_same(
    hub: LocalHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve("org/name")
    assert tree(folder) == files
    assert set(hub.sent) == {f"model-{n}.safetensors" for n in range(3)}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/name") == folder  # from the cache


def test_a_revision_is_what_is_read(hub: LocalHub, files: dict[str, bytes]) -> None:
    hub.revisions[OTHER_COMMIT] = {**files, "tokenizer.json": b'{"other": 1}'}
    assert (resolve("org/name", OTHER_COMMIT) / "tokenizer.json").read_bytes() == b'{"other": 1}'
    assert (resolve("org/name", "main") / "tokenizer.json").read_bytes() == b"{}"
    with pytest.raises(CheckpointError, match=r"org/name at revision v9: the repository has no such revision"):
        Repository.find("org/name", "v9")
    with pytest.raises(CheckpointError, match=r"org/absent: neither a local folder nor a repository"):
        Repository.find("org/absent")


def test_a_checkpoint_in_the_layout_of_meta(hub: LocalHub) -> None:
    wanted = {"params.json": b"{}", "consolidated.00.pth": b"0" * 50, "consolidated.01.pth": b"1" * 50}
    hub.revisions[COMMIT] = {**wanted, "tokenizer.model": b"t", "README.md": b"-", "model.pth": b"-"}
    assert tree(resolve("org/name-Original")) == {**wanted, "tokenizer.model": b"t"}


def test_an_index_is_checked_before_shards_are_downloaded(hub: LocalHub) -> None:
    hub.revisions[COMMIT]["model.safetensors.index.json"] = b'{"weight_map": {'
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: not valid JSON"):
        resolve("org/name")
    assert not hub.ranges


@pytest.mark.parametrize("place", ["environment", "file"])
def test_the_token_comes_from_the_usual_places_and_goes_to_the_hub_only(
    hub: LocalHub, files: dict[str, bytes], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated = True
    with pytest.raises(CheckpointError, match=r"access is restricted; accept the licence at .* or set HF_TOKEN"):
        resolve("org/name")
    if place == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    assert tree(resolve("org/name")) == files
    assert hub.tokens_at_storage == []


def test_a_dropped_connection_is_resumed_where_it_was(
    hub: LocalHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # the client keeps whole chunks; usually 10 MiB
    hub.cuts["model-1.safetensors"] = [30_000, 20_000]
    assert tree(resolve("org/name")) == files
    assert [wanted for name, wanted in hub.ranges if name == "model-1.safetensors"] == [
        None,
        "bytes=30000-",
        "bytes=50000-",
    ]
    assert hub.sent["model-1.safetensors"] == len(files["model-1.safetensors"])


def test_a_hub_that_is_overloaded_is_asked_again(hub: LocalHub, files: dict[str, bytes], tmp_path: Path) -> None:
    repository = Repository.find("org/name")
    hub.failures["model-1.safetensors"] = [503, 500, 503]
    path = repository.download(repository.files["model-1.safetensors"], tmp_path / "here", Event())
    assert path.read_bytes() == files["model-1.safetensors"]
    assert hub.failures["model-1.safetensors"] == []


def test_what_a_repository_holds(hub: LocalHub, files: dict[str, bytes]) -> None:
    found = Repository.find("org/name")
    assert found.commit == COMMIT
    assert set(found.files) == {name for name in {**files, **UNNEEDED} if "/" not in name}
    shard, config = found.files["model-0.safetensors"], found.files["config.json"]
    assert shard.digest == hashlib.sha256(files["model-0.safetensors"]).hexdigest()
    assert config.digest == blob_id(files["config.json"])
    assert (shard.size, config.size) == (len(files["model-0.safetensors"]), len(files["config.json"]))


def test_parts_of_files(hub: LocalHub, files: dict[str, bytes]) -> None:
    repository, data = Repository.find("org/name"), files["model-0.safetensors"]
    shard = repository.files["model-0.safetensors"]
    assert repository.read(shard, 0, 10) == data[:10]
    assert repository.read(shard, 1000, 2**40) == data[1000:]
    assert repository.read(shard, len(data), len(data) + 5) == b""
    assert hub.sent["model-0.safetensors"] == 10 + len(data) - 1000
    hub.ignores_ranges = True
    assert repository.read(shard, 0, 10) == data[:10]
    with pytest.raises(CheckpointError, match="expected a server that serves parts of files"):
        repository.read(shard, 10, 20)


def test_a_part_that_ends_early_is_asked_for_again(hub: LocalHub, files: dict[str, bytes]) -> None:
    repository = Repository.find("org/name")
    hub.cuts["model-0.safetensors"] = [5, 0]
    assert repository.read(repository.files["model-0.safetensors"], 10, 100) == files["model-0.safetensors"][10:100]
    assert hub.sent["model-0.safetensors"] == 5 + 0 + 90


@pytest.mark.parametrize("name", ["model-0.safetensors", "tokenizer.json"])
def test_content_is_compared_with_its_digest(hub: LocalHub, files: dict[str, bytes], name: str, tmp_path: Path) -> None:
    repository = Repository.find("org/name")
    folder = tmp_path / "here"
    path = repository.download(repository.files[name], folder, Event())
    assert path == folder / name
    path.write_bytes(b"x" + files[name][1:])  # on this disk, say by a crash
    assert repository.download(repository.files[name], folder, Event()).read_bytes() == files[name]


@pytest.mark.parametrize("times", [1, 2])
def test_damage_on_the_way(hub: LocalHub, files: dict[str, bytes], times: int, tmp_path: Path) -> None:
    repository = Repository.find("org/name")
    shard = repository.files["model-0.safetensors"]
    hub.damage[shard.name] = times
    if times == 1:
        assert repository.download(shard, tmp_path / "here", Event()).read_bytes() == files[shard.name]
        return
    with pytest.raises(
        CheckpointError, match=rf"model-0\.safetensors: expected content with the digest {shard.digest}"
    ):
        repository.download(shard, tmp_path / "here", Event())
    assert not (tmp_path / "here" / shard.name).exists()


def test_a_download_can_be_stopped(hub: LocalHub, tmp_path: Path) -> None:
    stop = Event()
    hub.on_download = lambda _: stop.set()
    repository = Repository.find("org/name")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="the download was stopped"):
            repository.download(repository.files["model-0.safetensors"], tmp_path / "here", stop)
    assert not list((tmp_path / "here").rglob("*safetensors"))
    assert not list((tmp_path / "here").rglob("*incomplete"))
    bar = silent_bar(Event())(total=5)
    bar.update(3)
    bar.close()
