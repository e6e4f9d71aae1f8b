"""Conversion of a Hub repository, with the real client against a local server: same bytes, few shards on disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint.checkpoint_files import tree
from checkpoint.hub_server import LocalHub, running_hub, whole
from checkpoints import make_checkpoint, random_tensors, text_config, write_checkpoint

from llama4_quant.checkpoint.manifest import MANIFEST_NAME
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.dry_run import dry_run
from llama4_quant.errors import OutputError, UsageError
from llama4_quant.inspect import inspect

ID = "org/model"
NUM_SHARDS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that no shard fits into the bytes that are asked for when headers are read."""
    config = text_config(vocab_size=4096)
    return write_checkpoint(tmp_path_factory.mktemp("hub") / "model", config, random_tensors(config), NUM_SHARDS)


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with running_hub(tree(model), tmp_path / "home", monkeypatch) as served:
        yield served


def manifest(folder: Path) -> bytes:
    """Digests of every file but the report: equal manifests are equal outputs."""
    return (folder / MANIFEST_NAME).read_bytes()


@pytest.mark.parametrize("workers", [1, 3])
def test_shard_by_shard_gives_the_bytes_of_a_local_conversion(
    hub: LocalHub, model: Path, tmp_path: Path, workers: int
) -> None:
    convert(model, tmp_path / "local")
    convert(ID, tmp_path / "out", delete_source_shards=True, workers=workers)
    assert manifest(tmp_path / "out") == manifest(tmp_path / "local")
    assert sorted(whole(hub)) == sorted(path.name for path in model.glob("*.safetensors"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "local").iterdir()}


def test_a_dry_run_and_inspect_download_headers_only(hub: LocalHub, model: Path) -> None:
    assert dry_run(ID).totals == dry_run(model).totals
    assert inspect(ID).num_bytes == inspect(model).num_bytes
    assert hub.downloaded == set()


def test_a_finished_output_is_not_touched(hub: LocalHub, tmp_path: Path) -> None:
    convert(make_checkpoint(tmp_path / "other", text_config()), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(OutputError, match="overwrite"):
        convert(ID, tmp_path / "out", delete_source_shards=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_local_sources_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="never files of a local folder"):
        convert(model, tmp_path / "out", delete_source_shards=True)
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="works in one process"):
        convert(ID, tmp_path / "out", delete_source_shards=True)
