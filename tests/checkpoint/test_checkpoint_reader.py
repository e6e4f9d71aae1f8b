import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint.checkpoint_files import (
    CONFIG,
    INDEX,
    num_descriptors,
    raw_file,
    record,
    same_bits,
    sharded,
    single_file,
    two_shards,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from llama4_quant.checkpoint.header import DTYPES
from llama4_quant.checkpoint.reader import READ_AHEAD, CheckpointReader
from llama4_quant.errors import CheckpointError


def test_reads_what_safetensors_reads(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    with CheckpointReader.open(folder) as reader:
        assert reader.path == folder
        assert reader.config == CONFIG
        assert list(reader.tensors) == ["a", "b"]
        for name in ("a", "b"):
            assert same_bits(reader.read(name), load_file(folder / f"{name}.safetensors")[name])
        entry = reader.tensors["b"]
        assert (entry.dtype, entry.shape, entry.nbytes, entry.path) == (
            "BF16",
            (4, 6, 8),
            384,
            folder / "b.safetensors",
        )
        assert entry.start == (folder / "b.safetensors").stat().st_size - 384


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_dtype_in_a_single_file(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randint(0, 2, (3, 8), dtype=torch.uint8).view(dtype)
    folder = single_file(tmp_path / "model", save({"w": values, "scalar": values[0, 0].clone()}))
    with CheckpointReader.open(folder) as reader:
        assert same_bits(reader.read("w"), values)
        assert same_bits(reader.read("scalar"), values[0, 0])


@given(data=st.data(), shape=st.tuples(*[st.integers(1, 7)] * 3))
@settings(max_examples=60, deadline=None)
def test_slices_equal_indexing(
    data: st.DataObject, shape: tuple[int, int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = torch.randn(shape)
    folder = single_file(tmp_path_factory.mktemp("model"), save({"w": values}))
    expert = data.draw(st.integers(0, shape[0] - 1))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, shape[1]), st.integers(0, shape[1]))))
    first, last = sorted(data.draw(st.tuples(st.integers(0, shape[0]), st.integers(0, shape[0]))))
    with CheckpointReader.open(folder) as reader:
        assert same_bits(reader.read_slice("w", expert, start, stop), values[expert, start:stop])
        assert same_bits(reader.read_rows("w", first, last), values[first:last])


def test_reads_only_the_bytes_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two_shards(tmp_path / "model")
    with CheckpointReader.open(folder) as reader:
        calls: list[tuple[int, int]] = []
        real = os.preadv

        def spy(fd: int, buffers: list[memoryview], offset: int) -> int:
            calls.append((offset, len(buffers[0])))
            return real(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", spy)
        reader.read_slice("b", 2, 1, 4)  # rows of 8 values x 2 bytes; 6 rows an expert
        assert calls == [(reader.tensors["b"].start + (2 * 6 + 1) * 16, 3 * 16)]


def test_what_comes_next_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two_shards(tmp_path / "model")
    with CheckpointReader.open(folder) as reader:
        advised: list[tuple[int, int, int]] = []
        monkeypatch.setattr(os, "posix_fadvise", lambda _fd, *advice: advised.append(advice))
        reader.read_slice("b", 1, 0, 6)
        end = reader.tensors["b"].start + 2 * 6 * 16
        assert advised == [(end, READ_AHEAD * 6 * 16, os.POSIX_FADV_WILLNEED)]


def test_reads_into_a_given_buffer_without_another(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    with CheckpointReader.open(folder) as reader:
        out = torch.zeros(2, 6, 8, dtype=torch.bfloat16)
        assert reader.read_rows("b", 1, 3, out=out) is out
        assert same_bits(out, reader.read("b")[1:3])
        for bad in (torch.zeros(2, 6, 8), torch.zeros(2, 8, 6, dtype=torch.bfloat16), out.transpose(0, 1)[:2]):
            with pytest.raises(CheckpointError, match=r"b: expected a contiguous buffer torch.bfloat16 \[2, 6, 8\]"):
                reader.read_rows("b", 1, 3, out=bad)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two_shards(tmp_path / "model")
    real = os.preadv
    with CheckpointReader.open(folder) as reader:
        expected = reader.read("b")
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:7]], offset))
        assert same_bits(reader.read("b"), expected)


@pytest.mark.slow
def test_a_read_of_more_than_2_gib(tmp_path: Path) -> None:
    num_bytes = 2**31 + 4096  # one read call of Linux moves at most 2^31 - 4096 bytes
    folder = single_file(tmp_path / "model", raw_file({"w": record(shape=[num_bytes], offsets=[0, num_bytes])}))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) + num_bytes)  # sparse: takes no disk
        file.seek(-1, os.SEEK_END)
        file.write(b"\x07")
    with CheckpointReader.open(folder) as reader:
        values = reader.read("w")
    assert values[-1] == 7
    assert not values[:-1].any()


def test_threads_share_a_reader(tmp_path: Path) -> None:
    values = torch.randn(64, 32, 16)
    folder = single_file(tmp_path / "model", save({"w": values}))
    barrier = threading.Barrier(4)

    def read(thread: int) -> bool:
        barrier.wait()
        return all(
            same_bits(reader.read_rows("w", row, row + 1), values[row : row + 1]) for row in range(thread, 64, 4)
        )

    with CheckpointReader.open(folder) as reader, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


def test_errors_of_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two_shards(tmp_path / "model")
    reader = CheckpointReader.open(folder)
    with pytest.raises(CheckpointError, match="expected a tensor c, and no file holds it"):
        reader.read("c")
    with pytest.raises(CheckpointError, match=r"b: rows 3 to 5 of dimension 0 do not exist in \[4, 6, 8\]"):
        reader.read_rows("b", 3, 5)
    with pytest.raises(CheckpointError, match="b: rows 4 to 5 of dimension 0"):
        reader.read_slice("b", 4, 0, 1)
    with pytest.raises(CheckpointError, match="b: rows 2 to 7 of dimension 1"):
        reader.read_slice("b", 0, 2, 7)
    with pytest.raises(CheckpointError, match=r"a: expected a stacked .* tensor, found \[3, 5\]"):
        reader.read_slice("a", 0, 0, 1)
    os.truncate(folder / "b.safetensors", reader.tensors["b"].start + 100)
    with pytest.raises(
        CheckpointError, match=r"b.safetensors: b: expected 384 bytes, found 100: the file became shorter"
    ):
        reader.read("b")
    reader.close()
    with pytest.raises(CheckpointError, match="the checkpoint is closed"):
        reader.read("a")


def test_a_read_error_of_the_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointReader.open(two_shards(tmp_path / "model")) as reader:

        def fail(*_: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(
            CheckpointError, match=r"a.safetensors: reading a failed: Input/output error; check the disk"
        ):
            reader.read("a")


def test_open_closes_its_files_when_it_fails_and_when_it_is_left(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    before = num_descriptors()
    with CheckpointReader.open(folder):
        assert num_descriptors() == before + 2
    (folder / "b.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError):
        CheckpointReader.open(folder)
    assert num_descriptors() == before


def _index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    _index(folder, {"a": "a.safetensors", "b": "a.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"a.safetensors: .* promises tensors that are not in it: b; .*download both"
    ):
        CheckpointReader.open(folder)
    sharded(
        folder,
        {"a.safetensors": {"a": torch.zeros(1), "extra": torch.zeros(1)}, "b.safetensors": {"b": torch.zeros(1)}},
    )
    _index(folder, {"a": "a.safetensors", "b": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"a.safetensors: holds tensors that .* does not place in it: extra"):
        CheckpointReader.open(folder)


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards .* are missing: b.safetensors; download them"):
        CheckpointReader.open(folder)


def test_a_name_in_the_index_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Other names that lead elsewhere are in tests/hostile/folder_cases.py; this one, JSON alone would let through."""
    folder = two_shards(tmp_path / "model")
    _index(folder, {"a": "\ud800.safetensors"})
    with pytest.raises(CheckpointError, match="which is no character"):
        CheckpointReader.open(folder)


def test_links_inside_the_checkpoint_are_followed(tmp_path: Path) -> None:
    """Links that leave it are in tests/hostile/folder_cases.py."""
    folder = two_shards(tmp_path / "model")
    (folder / "a.safetensors").rename(folder / "kept.bin")
    (folder / "a.safetensors").symlink_to("kept.bin")
    CheckpointReader.open(folder).close()


NOT_CHECKPOINTS = {
    "empty": ([], "found an empty folder; is the download finished"),
    "meta": (["consolidated.00.pth", "params.json"], "in Meta's original layout, params.json and .* side by side"),
    "gguf": (["model-Q4_K_M.gguf"], "GGUF files are quantized already"),
    "pickle": (["config.json", "pytorch_model.bin"], "pickled weights are not read"),
    "no config": (["model.safetensors"], "config.json is missing: download it"),
    "no weights": (["config.json", "tokenizer.json"], "found config.json, tokenizer.json; download the checkpoint"),
    "no index": (["config.json", "model-00001-of-00002.safetensors"], "index.json: this file is missing"),
    "both": (["config.json", INDEX, "model.safetensors"], "found both"),
    "cache": (["blobs/x", "refs/main", "snapshots/abc/config.json"], "give one of its snapshots: .*snapshots/abc"),
    "unfinished": ([".llama4-quant-partial/lock"], "an unfinished output of llama4-quant"),
    "many files": ([f"{n}.txt" for n in range(9)], "0.txt, 1.txt, 2.txt, 3.txt and 5 more"),
}


@pytest.mark.parametrize(("names", "message"), NOT_CHECKPOINTS.values(), ids=NOT_CHECKPOINTS.keys())
def test_folders_that_are_not_checkpoints(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_paths_that_are_not_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is nothing at this path; check the spelling"):
        CheckpointReader.open(tmp_path / "nothing")
    for name, advice in (
        ("model.safetensors", f"give the folder that holds it: {tmp_path}"),
        ("m.gguf", "GGUF"),
        ("x", "give the folder"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=f"found a file; .*{advice}"):
            CheckpointReader.open(tmp_path / name)


def test_an_old_checkpoint_beside_an_interrupted_overwrite_still_opens(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    (folder / ".llama4-quant-partial").mkdir()
    CheckpointReader.open(folder).close()
