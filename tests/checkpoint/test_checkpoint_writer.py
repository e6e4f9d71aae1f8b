"""What is written is what is read, by our reader, by safetensors and by transformers; and it is complete or absent."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checkpoint.checkpoint_files import same_bits, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llama4_quant.checkpoint import files
from llama4_quant.checkpoint.header import DTYPES
from llama4_quant.checkpoint.layout import Layout, OutputTensor, layout_shards
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.errors import OutputError

CONFIG = {"config.json": {"model_type": "llama4"}}


def layout_of(tensors: dict[str, torch.Tensor], max_shard_size: int = 10**9) -> Layout:
    outputs = (
        OutputTensor(name=name, dtype=values.dtype, shape=tuple(values.shape)) for name, values in tensors.items()
    )
    return layout_shards(outputs, max_shard_size)


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(16, 8, generator=generator),
        "b": torch.randint(-128, 127, (7, 3, 5), dtype=torch.int8, generator=generator),
        "c": torch.randn(33, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    tensors = {}
    for number in range(draw(st.integers(1, 8))):
        dtype = draw(st.sampled_from([dtype for dtype in DTYPES.values() if dtype is not torch.bool]))
        shape = draw(st.lists(st.integers(0, 6), max_size=3))
        size = dtype.itemsize * torch.Size(shape).numel()
        values = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
        tensors[f"t{number}"] = values.view(dtype).reshape(shape)
    return tensors


@given(tensors=named_tensors(), sizes=st.tuples(st.integers(1, 2000), st.integers(1, 2000)), data=st.data())
@settings(max_examples=25, deadline=None)  # each writes and syncs two checkpoints
def test_round_trip_whatever_the_shard_size_and_order(
    tensors: dict[str, torch.Tensor],
    sizes: tuple[int, int],
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    for size in sizes:
        out = tmp_path_factory.mktemp("out") / "model"
        with CheckpointWriter(out, layout_of(tensors, size)) as writer:
            for name in data.draw(st.permutations(list(tensors))):
                writer.write(name, tensors[name])
            writer.finish(CONFIG, {})
        with CheckpointReader.open(out) as reader:
            assert set(reader.tensors) == set(tensors)
            assert all(same_bits(reader.read(name), values) for name, values in tensors.items())
        by_safetensors = {}
        for path in out.glob("*.safetensors"):
            by_safetensors.update(load_file(path))
        assert all(same_bits(by_safetensors[name], values) for name, values in tensors.items())
        assert set(by_safetensors) == set(tensors)


def test_transformers_loads_the_output(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    tensors = model.state_dict()
    out = tmp_path / "model"
    layout = layout_of(tensors, 5000)
    assert len(layout.shards) > 2
    with CheckpointWriter(out, layout) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
        writer.finish({"config.json": model.config.to_dict()}, {})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    assert set(loaded) == set(tensors)
    assert all(same_bits(loaded[name], values) for name, values in tensors.items())


def test_rows_in_any_order_from_threads_give_the_same_files(tmp_path: Path) -> None:
    tensors = some_tensors()
    layout = layout_of(tensors, 600)
    with CheckpointWriter(tmp_path / "whole", layout) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
        writer.finish(CONFIG, {})
    rows = [(name, row) for name in "abc" for row in range(len(tensors[name]))]
    barrier = threading.Barrier(4)
    with CheckpointWriter(tmp_path / "rows", layout) as writer, ThreadPoolExecutor(4) as pool:

        def work(thread: int) -> None:
            barrier.wait()
            for name, row in rows[::-1][thread::4]:
                writer.write(name, tensors[name][row : row + 1], row_start=row)

        list(pool.map(work, range(4)))
        writer.write("scalar", tensors["scalar"])  # `empty` has no bytes and needs no write
        writer.finish(CONFIG, {})
    rows_tree, whole_tree = tree(tmp_path / "rows"), tree(tmp_path / "whole")
    # The manifest lists what single writes wrote.
    assert rows_tree.pop("manifest.json") != whole_tree.pop("manifest.json")
    assert rows_tree == whole_tree


def test_strided_and_gradient_tensors_are_written_by_value(tmp_path: Path) -> None:
    values = torch.randn(6, 4)
    parameter = torch.nn.Parameter(torch.randn(3))
    with CheckpointWriter(tmp_path / "out", layout_of({"t": values.t().contiguous(), "p": parameter})) as writer:
        writer.write("t", values.t())
        writer.write("p", parameter)
        writer.finish(CONFIG, {})
    with CheckpointReader.open(tmp_path / "out") as reader:
        assert same_bits(reader.read("t"), values.t())
        assert same_bits(reader.read("p"), parameter.detach())


def test_contiguous_tensors_are_written_from_their_own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(4096, dtype=torch.float32)
    addresses = []
    real = os.pwrite

    def spy(fd: int, view: memoryview, offset: int) -> int:
        addresses.append((torch.frombuffer(view, dtype=torch.uint8).data_ptr(), len(view)))
        return real(fd, view, offset)

    with CheckpointWriter(tmp_path / "out", layout_of({"t": values})) as writer:
        monkeypatch.setattr(os, "pwrite", spy)
        writer.write("t", values[1024:3072], row_start=1024)
    assert addresses == [(values.data_ptr() + 4096, 8192)]


def test_what_is_written_is_written_behind_and_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every range once at its write; again when two more are on their way, and all of a file after a sync."""
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, start, nbytes, _advice: advised.append((start, nbytes)))
    values = torch.arange(64, dtype=torch.float32)
    with CheckpointWriter(tmp_path / "out", layout := layout_of({"t": values})) as writer:
        advised.clear()  # the header's
        start = layout.placements["t"].start
        for row in (0, 16, 32, 48):
            writer.write("t", values[row : row + 16], row_start=row)
        ranges = [(start + 4 * row, 64) for row in (0, 16, 32, 48)]
        assert set(advised) >= set(ranges)
        assert advised.count(ranges[0]) == advised.count(ranges[1]) == 2
        assert advised.count(ranges[2]) == advised.count(ranges[3]) == 1
        writer.sync()
        assert advised[-1] == (0, 0)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_system_that_takes_no_advice_gives_the_same_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    if is_known:
        monkeypatch.setattr(os, "posix_fadvise", refuse)
    else:
        monkeypatch.delattr(os, "posix_fadvise")
    tensors = some_tensors()
    with CheckpointWriter(tmp_path / "out", layout_of(tensors)) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
        writer.finish(CONFIG, {})
    with CheckpointReader.open(tmp_path / "out") as reader:
        assert all(same_bits(reader.read(name), values) for name, values in tensors.items())


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = some_tensors()
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: real(fd, view[:5], offset))
    with CheckpointWriter(tmp_path / "out", layout_of(tensors)) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
        writer.finish(CONFIG, {})
    with CheckpointReader.open(tmp_path / "out") as reader:
        assert all(same_bits(reader.read(name), values) for name, values in tensors.items())


def test_writes_that_do_not_fit_the_layout(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", layout_of(some_tensors())) as writer:
        with pytest.raises(OutputError, match="x: not in the layout"):
            writer.write("x", torch.zeros(1))
        expected = r"a: expected rows of torch.float32 \[16, 8\], found "
        for bad, found in (
            (torch.zeros(16, 8, dtype=torch.float64), "torch.float64"),
            (torch.zeros(8, 16), ""),
            (torch.zeros(128), ""),
        ):
            with pytest.raises(OutputError, match=expected + found):
                writer.write("a", bad)
        for row_start in (-1, 1):
            with pytest.raises(OutputError, match=f"for row {row_start}"):
                writer.write("a", torch.zeros(16, 8), row_start=row_start)
        with pytest.raises(OutputError, match="scalar: expected"):
            writer.write("scalar", torch.tensor(1), row_start=1)
        with pytest.raises(OutputError, match="scalar: expected"):
            writer.write("scalar", torch.tensor([1]))


def test_finish_refuses_a_tensor_with_a_byte_never_written(tmp_path: Path) -> None:
    tensors = some_tensors()
    with CheckpointWriter(tmp_path / "out", layout_of(tensors)) as writer:
        for name in ("b", "c", "scalar"):
            writer.write(name, tensors[name])
        for start, stop in ((0, 5), (5, 9), (5, 9), (11, 16)):  # rows 9 and 10 are left out: 2 rows of 8 floats
            writer.write("a", tensors["a"][start:stop], row_start=start)
        with pytest.raises(
            OutputError, match="1 of 5 tensors not complete, first a, of which 64 bytes were never written"
        ):
            writer.finish(CONFIG, {})
    assert not (tmp_path / "out").exists()


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("module", "call"), [(files, "fallocate"), (os, "pwrite"), (os, "fsync")])
def test_a_full_disk_is_one_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, call: str
) -> None:
    tensors = some_tensors()
    out = tmp_path / "out"

    def convert() -> None:
        with CheckpointWriter(out, layout_of(tensors)) as writer:
            for name, values in tensors.items():
                writer.write(name, values)
            writer.finish(CONFIG, {})

    with monkeypatch.context() as patch:
        patch.setattr(module, call, _full)
        with pytest.raises(OutputError, match=r"no space left: [\d,]+ bytes needed, [\d,]+ free; free some space"):
            convert()
    assert not out.exists()
    convert()
    CheckpointReader.open(out).close()


def test_too_large_an_output_is_refused_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "fallocate", lambda *_: pytest.fail("space was not checked first"))
    layout = layout_shards([OutputTensor(name="a", dtype=torch.uint8, shape=(2**60,))], 2**61)
    with (
        pytest.raises(OutputError, match="no space left: 1,152,921,504,606,8"),
        CheckpointWriter(tmp_path / "out", layout),
    ):
        pass
    assert not (tmp_path / "out").exists()


def test_space_is_reserved_where_the_file_system_can(tmp_path: Path) -> None:
    layout = layout_of({"a": torch.zeros(2**18)})
    with CheckpointWriter(tmp_path / "out", layout):
        (shard,) = (tmp_path / "out" / ".llama4-quant-partial").glob("*.safetensors")
        assert shard.stat().st_size == layout.nbytes
        assert shard.stat().st_blocks * 512 >= 2**20


def test_a_file_system_that_cannot_reserve_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(files, "fallocate", unsupported)
    tensors = {"a": torch.zeros(1000), "b": torch.ones(10)}
    with CheckpointWriter(tmp_path / "out", layout_of(tensors)) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
        writer.finish(CONFIG, {})
    with CheckpointReader.open(tmp_path / "out") as reader:
        assert all(same_bits(reader.read(name), values) for name, values in tensors.items())
