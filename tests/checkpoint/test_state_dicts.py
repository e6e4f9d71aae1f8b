"""Files that torch.load and zipfile read, written piece by piece: archives, their checksums, their pickles."""

import io
import os
import random
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from checkpoint.checkpoint_files import same_bits
from hypothesis import given
from hypothesis import strategies as st

from llama4_quant.checkpoint.archive import ALIGNMENT, lay_out
from llama4_quant.checkpoint.crc import combine
from llama4_quant.checkpoint.layout import Layout, OutputTensor
from llama4_quant.checkpoint.manifest import read_manifest, sha256
from llama4_quant.checkpoint.pickles import read_contents
from llama4_quant.checkpoint.state_dicts import layout_state_dicts, tensor_name
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.errors import OutputError

FILES = ("consolidated.00.pth", "fp8_scales_0.pt")
DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.float16, torch.int64, torch.uint8)


def tensors_of(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every dtype, shapes with and without alignment to anything, in both files."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (3,), (64, 33), (2, 3, 4), (1, 1), (11, 2)]
    return {
        tensor_name(FILES[n % 2], f"layers.{n}.weight"): torch.randint(0, 9, shape, generator=generator).to(dtype)
        for n, (shape, dtype) in enumerate(zip(shapes, DTYPES, strict=True))
    }


def layout_of(tensors: dict[str, torch.Tensor]) -> Layout:
    return layout_state_dicts(OutputTensor(name=n, dtype=t.dtype, shape=tuple(t.shape)) for n, t in tensors.items())


def write(out: Path, tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Row by row, in any order."""
    rows = [(name, row) for name, tensor in tensors.items() for row in range(len(tensor))]
    random.Random(seed).shuffle(rows)
    with CheckpointWriter(out, layout_of(tensors)) as writer:
        for name, row in rows:
            writer.write(name, tensors[name][row : row + 1], row)
        writer.finish({"params.json": {"dim": 8}}, {})


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_checksums_are_combined(parts: list[bytes]) -> None:
    assert combine((zlib.crc32(part), len(part)) for part in parts) == zlib.crc32(b"".join(parts))


def test_torch_reads_what_was_written_in_pieces(tmp_path: Path) -> None:
    tensors = tensors_of()
    write(tmp_path / "a", tensors, 1)
    write(tmp_path / "b", tensors, 2)
    for filename in FILES:
        assert (tmp_path / "a" / filename).read_bytes() == (tmp_path / "b" / filename).read_bytes()
        expected = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(filename)}
        for is_mapped in (True, False):
            found = torch.load(tmp_path / "a" / filename, weights_only=True, mmap=is_mapped)
            assert list(found) == list(expected)
            for name, tensor in expected.items():
                assert found[name].is_contiguous()
                assert same_bits(found[name], tensor), name
    assert {path.name for path in (tmp_path / "a").iterdir()} == {*FILES, "params.json", "manifest.json"}


def test_pickles_are_those_of_torch_save(tmp_path: Path) -> None:
    """The same restricted operations as torch's own, only without memoised strings: both unpickle to equal dicts."""
    tensors = tensors_of()
    write(tmp_path / "out", tensors, 0)
    for filename in FILES:
        own = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(filename)}
        torch.save(own, tmp_path / filename)
        records = []
        for path in (tmp_path / filename, tmp_path / "out" / filename):
            descriptor = os.open(path, os.O_RDONLY)
            records.append({n: (t.dtype, t.shape) for n, t in read_contents(descriptor, path).items()})
            os.close(descriptor)
        assert records[0] == records[1]
        assert list(records[0]) == list(own)


def test_archives_are_whole_and_aligned(tmp_path: Path) -> None:
    tensors = tensors_of()
    write(tmp_path / "out", tensors, 0)
    for filename, digest in zip(FILES, read_manifest(tmp_path / "out"), strict=False):
        path = tmp_path / "out" / filename
        data = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None  # reads everything and compares checksums
            names = [record.filename for record in archive.infolist()]
        folder = filename.rpartition(".")[0]
        assert names[:2] == [f"{folder}/data.pkl", f"{folder}/byteorder"]
        assert names[-1] == f"{folder}/version"
        for name, placement in layout_of(tensors).placements.items():
            if name.startswith(filename):
                assert placement.start % ALIGNMENT == 0
        assert digest.name == filename
        assert all(sha256(data[part.start : part.stop]) == part.sha256 for part in digest.ranges)


def test_a_tensor_that_was_not_written_is_missed(tmp_path: Path) -> None:
    tensors = tensors_of()
    with CheckpointWriter(tmp_path / "out", layout_of(tensors)) as writer:
        for name, tensor in list(tensors.items())[1:]:
            writer.write(name, tensor)
        with pytest.raises(OutputError, match=r"1 of 6 tensors not complete, first consolidated.00.pth/layers.0"):
            writer.finish({"params.json": {}}, {})
    assert not (tmp_path / "out").exists()


def test_the_same_name_twice_is_refused() -> None:
    tensor = OutputTensor(name="a.pt/x", dtype=torch.float32, shape=(1,))
    with pytest.raises(OutputError, match=r"a.pt/x: two output tensors have this name"):
        layout_state_dicts([tensor, tensor])


def test_more_than_four_gigabytes(tmp_path: Path) -> None:
    """Sizes and offsets beyond 32 bits, in a sparse file of zeros; the last tensor lies behind them."""
    large = OutputTensor(name="big.pth/large", dtype=torch.uint8, shape=(5, 2**30))
    small = OutputTensor(name="big.pth/small", dtype=torch.float32, shape=(3,))
    layout = layout_state_dicts([large, small])
    values = torch.tensor([1.0, 2.0, 3.0])
    zeros = combine([(zlib.crc32(bytes(2**20)), 2**20)] * (5 * 2**10))
    crc32s = {large.name: zeros, small.name: zlib.crc32(values.numpy().tobytes())}
    path = tmp_path / "big.pth"
    with path.open("wb") as file:
        for start, data in layout.shards[0].frame(crc32s):
            file.seek(start)
            file.write(data)
        file.seek(layout.placements[small.name].start)
        file.write(values.numpy().tobytes())
    assert path.stat().st_size == layout.shards[0].nbytes
    with zipfile.ZipFile(path) as archive:
        sizes = {record.filename: record.file_size for record in archive.infolist()}
        assert sizes["big/data/0"] == 5 * 2**30
        assert archive.read("big/data/1") == values.numpy().tobytes()
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(loaded["small"], values)
    assert loaded["large"].shape == (5, 2**30)
    assert int(loaded["large"][4, -1]) == 0


def test_more_than_65535_records() -> None:
    contents: dict[str, bytes | int] = {f"a/data/{n}": n.to_bytes(4, "little") for n in range(70_000)}
    archive = lay_out(contents, {})
    data = bytearray(archive.nbytes)
    for start, part in archive.frame({}):
        data[start : start + len(part)] = part
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as found:
        assert len(found.infolist()) == 70_000
        assert found.read("a/data/69999") == (69_999).to_bytes(4, "little")
