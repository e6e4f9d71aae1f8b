"""What a repository on the Hub, or a wrong folder, must not bring about; with the real client."""

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from checkpoint.checkpoint_files import INDEX, raw_file, record, tree
from checkpoint.hub_server import COMMIT, LocalHub, five_shards, open_files, running_hub, shards, whole

from llama4_quant.checkpoint.hub_reader import HubReader
from llama4_quant.checkpoint.source import open_source
from llama4_quant.errors import CheckpointError, Llama4QuantError, OutputError, UsageError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return five_shards(tmp_path / "model")


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with running_hub({**tree(model), "README.md": b"-", "other.safetensors": b"-"}, tmp_path, monkeypatch) as hub:
        yield hub


def test_files_of_others_are_never_touched(hub: LocalHub, model: Path, tmp_path: Path) -> None:
    before = tree(model)
    with pytest.raises(UsageError, match="--delete-source-shards deletes only shards that it has downloaded itself"):
        open_source(str(model), download_to=tmp_path / "download")
    with pytest.raises(OutputError, match="expected a folder made by llama4-quant for downloads"):
        open_source("org/name", download_to=model)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(OutputError, match="expected a folder made by llama4-quant for downloads"):
        open_source("org/name", download_to=tmp_path / "link")
    assert tree(model) == before
    assert not list((tmp_path / "empty").iterdir())
    assert not (tmp_path / "download").exists()


def test_two_processes_do_not_share_a_folder(hub: LocalHub, tmp_path: Path) -> None:
    with (
        open_source("org/name", "main", download_to=tmp_path / "download") as reader,
        pytest.raises(OutputError, match="another process downloads into this folder"),
    ):
        open_source("org/name", download_to=reader.path)
    open_source("org/name", download_to=tmp_path / "download").close()


def with_files(**contents: bytes | None) -> Callable[[dict[str, bytes]], None]:
    """Puts files into a repository (`__` stands for a dot, `_` for a hyphen), or removes them."""

    def change(files: dict[str, bytes]) -> None:
        for key, content in contents.items():
            name = key.replace("__", ".").replace("_", "-")
            files.pop(name, None)
            files.update({} if content is None else {name: content})

    return change


def with_index(old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda files: files.update({INDEX: files[INDEX].replace(old, new)})


def shorter(files: dict[str, bytes]) -> None:
    files["model-0.safetensors"] = files["model-0.safetensors"][:-1]


OVERLAP = raw_file({"e0": record(), "w0": record()}, b"0000")
LIE = raw_file({"e0": record()}, b"0000", length=2**62)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_files(model_0__safetensors=OVERLAP),
            r"name at commit \w{12}: model-0\.safetensors: tensor 'w0' overlaps",
        ),
        (with_files(model_0__safetensors=LIE), r"model-0\.safetensors: expected a header of 2 to 100,000,000 bytes"),
        (with_files(model_0__safetensors=b"123"), r"model-0\.safetensors: expected a safetensors file, found only 3"),
        (with_files(model_0__safetensors=None), r"1 of 5 shards that .* names are missing: model-0\.safetensors"),
        (with_files(model__safetensors=OVERLAP), r"expected either model\.safetensors or .*, found both"),
        (with_files(config__json=None), r"config\.json is missing"),
        (with_files(config__json=b"[1]"), r"config\.json: expected a JSON object"),
        (with_index(b'"model-0.safetensors"', b'"../model-0.safetensors"'), "expected the name of a .safetensors file"),
        (with_index(b'"w0"', b'"x0"'), r"index\.json promises tensors that are not in it: x0"),
        (with_index(b'"weight_map"', b'"weights"'), "expected weight_map to map tensors to files, found None"),
        (with_index(b'"weight_map"', b'"weights", "x": "'), "not valid JSON"),
        (dict.clear, r"name at commit \w{12}: expected config\.json and \.safetensors weights .*, found \[\]"),
        (shorter, r"model-0\.safetensors: the file is 1 bytes short"),
    ],
)
def test_a_hostile_repository_is_refused_before_its_shards_are_downloaded(
    hub: LocalHub, tmp_path: Path, change: Callable[[dict[str, bytes]], None], message: str
) -> None:
    change(hub.revisions[COMMIT])
    folder = tmp_path / "download"
    with pytest.raises(Llama4QuantError, match=message) as caught:
        HubReader.connect("org/name", folder=folder)
    assert str(folder) not in str(caught.value)
    assert whole(hub) == []
    assert shards(folder) == []
    assert open_files(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["download", "model"]


def test_a_full_disk_is_not_tried_again(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fail(*_: object, **__: object) -> str:
        tries.append(1)
        raise OSError(28, "No space left on device")

    with HubReader.connect("org/name", folder=tmp_path / "download") as reader:
        reader.expect([("e0", 120_000)])
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        with pytest.raises(CheckpointError, match=r"No space left on device[^$]*keeps 0 of 5 shards \(none; .* free"):
            reader.read("e0")
    assert tries == [1]
