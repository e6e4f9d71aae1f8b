"""Rows of activations in files, whatever the order in which they are asked for."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_quant.calibration.records import LayerRecord
from llama4_quant.calibration.rows import MemoryRows, RowFile, row_chunks
from llama4_quant.calibration.streams import Position, Sequences, StreamFiles
from llama4_quant.errors import OutputError


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([RowFile, MemoryRows]),
    width=st.sampled_from([1, 64, 3000, 9000]),
    own=st.sets(st.integers(0, 40)),
    prior=st.sets(st.integers(0, 40)),
    again=st.lists(st.integers(0, 40), max_size=5),
)
def test_gather_takes_any_order(
    tmp_path_factory: pytest.TempPathFactory,
    kind: type[RowFile],
    width: int,
    own: set[int],
    prior: set[int],
    again: list[int],
) -> None:
    """Own rows ascend, then those of the prior do, which may be among the own ones."""
    path = tmp_path_factory.mktemp("rows") / "x.rows"
    values = torch.randn(41, width)
    wanted = torch.tensor([*sorted(own), *sorted(prior), *again], dtype=torch.int64)
    with kind(path, 41, width) as file:
        file.write(slice(0, 41), values)
        assert torch.equal(file.gather(wanted), values[wanted])
        changed = torch.tensor(sorted(own), dtype=torch.int64)
        file.scatter(changed, values[changed] + 1)
        expected = values.index_copy(0, changed, values[changed] + 1)
        assert torch.equal(file.read(slice(0, 41)), expected)


def test_scattered_rows_do_not_need_those_between_them(tmp_path: Path) -> None:
    """The first rows of an empty file, with holes."""
    with RowFile(tmp_path / "x.rows", 10, 4) as file:
        file.scatter(torch.tensor([1, 3, 8]), torch.ones(3, 4))
        assert file.gather(torch.tensor([1, 3, 8])).eq(1).all()
        with pytest.raises(AssertionError, match="never written"):
            file.read(slice(0, 10))


def test_rows_in_memory_outlive_the_process_once_they_are_synced(tmp_path: Path) -> None:
    values = torch.randn(10, 4)
    with MemoryRows(tmp_path / "x.rows", 10, 4) as file:
        file.write(slice(0, 10), values)
        assert not file.path.exists()
        file.sync()
        file.write(slice(0, 5), torch.zeros(5, 4))
    with MemoryRows(tmp_path / "x.rows", 10, 4) as again, RowFile(tmp_path / "x.rows", 10, 4) as plain:
        assert torch.equal(again.read(slice(0, 10)), values)
        assert torch.equal(plain.read(slice(0, 10)), values)


def test_chunks_cover_all_rows_once() -> None:
    chunks = list(row_chunks(10_000_000, 5120))
    assert [chunk.stop for chunk in chunks[:-1]] == [chunk.start for chunk in chunks[1:]]
    assert (chunks[0].start, chunks[-1].stop) == (0, 10_000_000)
    assert all((chunk.stop - chunk.start) * 5120 * 4 <= 16 * 2**20 for chunk in chunks)
    assert list(row_chunks(0, 8)) == []


def test_links_in_the_scratch_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"somebody's")
    (tmp_path / "x.rows").symlink_to(tmp_path / "other")
    with pytest.raises(OutputError, match="expected a file made by llama4-quant"):
        RowFile(tmp_path / "x.rows", 1, 1)
    (tmp_path / "y.rows").hardlink_to(tmp_path / "other")
    with pytest.raises(OutputError, match="expected a file made by llama4-quant"):
        RowFile(tmp_path / "y.rows", 1, 1)
    assert (tmp_path / "other").read_bytes() == b"somebody's"


def stream_files(folder: Path) -> StreamFiles:
    return StreamFiles(folder, 1, 1, with_original=False, device=torch.device("cpu"))


def test_the_position_survives_a_round_trip(tmp_path: Path) -> None:
    files = stream_files(tmp_path)
    assert files.position() is None
    record = LayerRecord(layer=0, rows_per_expert=(1, 0), relative_error=0.1, sqnr_db=20.0, rerouted=0.5)
    for position in (Position(), Position(records=(record, LayerRecord(layer=1)))):
        files.advance(position)
        assert files.position() == position


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"{}", b'{"records": 3}', b'{"records": [3]}', b'{"records": [{"layer": 0}]}',
        json.dumps({"records": [{"layer": 1, "rows_per_expert": []}]}).encode(),
        json.dumps({"records": [{"layer": 0, "rows_per_expert": [], "more": 1}]}).encode(),
    ],
)  # fmt: skip
def test_a_damaged_position_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.json").write_bytes(content)
    assert stream_files(tmp_path).position() is None


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1), max_rows=st.integers(1, 30))
def test_batches_are_whole_samples_of_one_length(lengths: list[int], max_rows: int) -> None:
    sequences = Sequences(lengths=tuple(lengths))
    seen: list[int] = []
    for rows, length in sequences.batches(max_rows):
        count = (rows.stop - rows.start) // length
        assert rows.start == sum(seen)
        assert count == 1 or count * length <= max_rows
        seen += [length] * count
        assert rows.stop == sum(seen)
    assert seen == lengths
