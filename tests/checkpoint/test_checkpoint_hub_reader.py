"""Reading from the Hub with a few shards on disk, with the real client; compared with the files that are served."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkpoint.checkpoint_files import raw_file, record, same_bits, tree
from checkpoint.hub_server import COMMIT, LocalHub, five_shards, open_files, running_hub, shards, whole
from huggingface_hub import constants, snapshot_download

from llama4_quant.checkpoint import hub_reader
from llama4_quant.checkpoint.hub_reader import HubReader, shard_order
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.source import open_source, side_files
from llama4_quant.errors import CheckpointError, OutputError

NUM_SHARDS = 5
HEADER_BYTES = 128 * 1024


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return five_shards(tmp_path / "model")


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with running_hub({**tree(model), "README.md": b"-", "other.safetensors": b"-"}, tmp_path, monkeypatch) as hub:
        yield hub


def read_all(reader: CheckpointReader, local: CheckpointReader, after_each: Callable[[], None]) -> None:
    for entry in sorted(reader.tensors.values(), key=shard_order):
        if len(entry.shape) == 3:
            for expert in range(entry.shape[0]):
                part = reader.read_slice(entry.name, expert, 0, entry.shape[1])
                assert same_bits(part, local.read_slice(entry.name, expert, 0, entry.shape[1]))
                after_each()
        else:
            assert same_bits(reader.read(entry.name), local.read(entry.name))
            after_each()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_disk_holds_a_few_shards_and_none_at_the_end(
    hub: LocalHub, model: Path, tmp_path: Path, num_shards: int
) -> None:
    folder, seen = tmp_path / "download", []
    hub.on_download = lambda _: seen.append(len(shards(folder)))  # at the start of each: that file is there already
    with (
        HubReader.connect("org/name", "main", folder=folder, num_shards=num_shards) as reader,
        CheckpointReader.open(model) as local,
    ):
        assert dict(reader.tensors).keys() == dict(local.tensors).keys()
        read_all(reader, local, lambda: seen.append(len(shards(folder))))
    assert max(seen) <= num_shards
    assert shards(folder) == []
    assert whole(hub) == [f"model-{n}.safetensors" for n in range(NUM_SHARDS)]
    assert open_files(tmp_path) == []


def test_headers_are_known_before_any_shard_is_downloaded(hub: LocalHub, model: Path, tmp_path: Path) -> None:
    with (
        HubReader.connect("org/name", folder=tmp_path / "download") as reader,
        CheckpointReader.open(model) as local,
    ):
        assert reader.config == local.config
        for name, entry in local.tensors.items():
            found = reader.tensors[name]
            assert (found.dtype, found.shape, found.start, found.nbytes) == (
                entry.dtype,
                entry.shape,
                entry.start,
                entry.nbytes,
            )
        assert [path.name for path in side_files(reader.path)] == ["tokenizer.json"]
    assert whole(hub) == []
    assert set(hub.sent.values()) == {HEADER_BYTES}
    assert set(hub.sent) == {f"model-{n}.safetensors" for n in range(NUM_SHARDS)}


def test_a_long_header_takes_a_second_request(hub: LocalHub, tmp_path: Path) -> None:
    header = {f"t{n}": record(offsets=(4 * n, 4 * n + 4)) for n in range(3000)}
    data = raw_file(header, bytes(12_000))
    hub.revisions[COMMIT] = {"config.json": b"{}", "model.safetensors": data}
    with HubReader.connect("org/name", folder=tmp_path / "download") as reader:
        assert len(reader.tensors) == 3000
    assert hub.sent["model.safetensors"] == len(data) - 12_000  # the header, and no byte of the data


def test_the_next_shard_arrives_while_this_one_is_read(hub: LocalHub, tmp_path: Path) -> None:
    folder = tmp_path / "download"
    with HubReader.connect("org/name", folder=folder) as reader:
        reader.read("e0")
        until(lambda: shards(folder) == ["model-0.safetensors", "model-1.safetensors"])
        reader.read("w0")
        until(lambda: shards(folder) == ["model-1.safetensors", "model-2.safetensors"])


def test_an_interrupted_process_is_continued(hub: LocalHub, tmp_path: Path) -> None:
    folder = tmp_path / "download"
    with HubReader.connect("org/name", folder=folder, num_shards=1) as reader:
        reader.expect([("w1", 200_000), ("w3", 200_000), ("w4", 200_000)])  # the others are in the journal
        reader.read_rows("w1", 0, 50)
        facts = dict(reader.facts)
    assert shards(folder) == ["model-1.safetensors"]
    (folder / ".cache/huggingface/download/x.incomplete").write_bytes(b"-")  # a killed download
    (folder / ".headers-x").mkdir()
    with HubReader.connect("org/name", folder=folder, num_shards=1) as reader:
        assert dict(reader.facts) == facts
        assert not list(folder.glob(".headers-*"))
        assert shards(folder) == ["model-1.safetensors"]
        reader.expect([("w1", 100_000), ("w3", 200_000), ("w4", 200_000)])
        reader.read_rows("w1", 50, 100)
        reader.done("model-4.safetensors")  # before w3 is read: its end makes room for the next download
        reader.read("w3")
    assert shards(folder) == []
    assert whole(hub) == ["model-1.safetensors", "model-3.safetensors"]


def test_another_commit_starts_with_an_empty_folder(hub: LocalHub, tmp_path: Path) -> None:
    folder = tmp_path / "download"
    with HubReader.connect("org/name", folder=folder, num_shards=1) as reader:
        reader.read("e0")
    hub.revisions["f" * 40] = dict(hub.revisions[COMMIT])
    with HubReader.connect("org/name", "f" * 40, folder=folder, num_shards=1) as reader:
        assert shards(folder) == []
        reader.read("e0")
    assert whole(hub) == ["model-0.safetensors"] * 2


def test_in_any_order_with_threads(hub: LocalHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_reader, "PATIENCE_SECONDS", 0.0)
    folder, seen = tmp_path / "download", []
    hub.on_download = lambda _: seen.append(len(shards(folder)))
    with HubReader.connect("org/name", folder=folder) as reader, CheckpointReader.open(model) as local:

        def check(row: int) -> bool:
            name = f"w{row * 7 % NUM_SHARDS}"
            return same_bits(reader.read_rows(name, row, row + 1), local.read_rows(name, row, row + 1))

        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(check, range(30), timeout=60))
    assert max(seen) <= 2


def test_a_lost_connection_says_what_is_there_and_the_same_call_continues(
    hub: LocalHub, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "download"
    with HubReader.connect("org/name", folder=folder, num_shards=1) as reader:
        reader.read("e0")
        hub.down = True
        reader.read("w0")
        with pytest.raises(CheckpointError) as caught:
            reader.read("e1")
        text = str(caught.value)
        assert text.startswith(f"org/name at commit {COMMIT[:12]}: model-1.safetensors: the download failed")
        assert f"{folder} keeps 0 of 5 shards (none; " in text
        assert text.endswith("what was converted is kept too, and the same command continues")
        hub.down = False
        with CheckpointReader.open(model) as local:
            assert same_bits(reader.read("e1"), local.read("e1"))


def test_a_connection_dropped_in_a_shard(
    hub: LocalHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.cuts = {f"model-{n}.safetensors": [100_000, 50_000] for n in range(NUM_SHARDS)}
    with (
        HubReader.connect("org/name", folder=tmp_path / "download") as reader,
        CheckpointReader.open(model) as local,
    ):
        read_all(reader, local, lambda: None)
    size = (model / "model-0.safetensors").stat().st_size
    assert set(hub.sent.values()) == {HEADER_BYTES + size}


def test_what_the_cache_has_is_read_there_and_stays(hub: LocalHub, model: Path, tmp_path: Path) -> None:
    cache = Path(snapshot_download("org/name", allow_patterns=["model-0.*", "model-1.*"]))
    hub.ranges.clear()
    folder, copies = tmp_path / "download", set[str]()
    with HubReader.connect("org/name", folder=folder) as reader, CheckpointReader.open(model) as local:
        assert reader.max_disk_bytes == 2 * (model / "model-0.safetensors").stat().st_size
        read_all(
            reader, local, lambda: copies.update(set(shards(folder)) & {"model-0.safetensors", "model-1.safetensors"})
        )
    assert copies == set()
    assert whole(hub) == [f"model-{n}.safetensors" for n in (2, 3, 4)]
    assert [path.name for path in sorted(cache.iterdir())] == ["model-0.safetensors", "model-1.safetensors"]
    assert shards(folder) == []


def test_space_is_checked_for_the_largest_shards_and_the_output(hub: LocalHub, model: Path, tmp_path: Path) -> None:
    with HubReader.connect("org/name", folder=tmp_path / "download", num_shards=3) as reader:
        assert reader.max_disk_bytes == 3 * (model / "model-0.safetensors").stat().st_size
        reader.require_space()
        with pytest.raises(OutputError, match=r"no space left: .*for up to 3 shards of the source"):
            reader.require_space(2**60)


def test_sources_open_alike(hub: LocalHub, model: Path) -> None:
    for reader in (open_source(str(model)), open_source("org/name")):
        with reader:
            assert len(reader.tensors) == 2 * NUM_SHARDS
