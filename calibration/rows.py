"""Activations of all calibration tokens, in files: what is held in memory at a time does not grow with their number.

Files are read and written in place (pread, pwrite); the kernel's page cache keeps them in memory as far as there is
room, and gives it back when somebody needs it. Where all rows are few, they are in memory (`MemoryRows`): reading is a
view then, and nothing is copied to the kernel and back.

Shape letters: R rows, W width.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from llama4_quant.checkpoint.buffers import byte_view, read_into, write_from
from llama4_quant.checkpoint.files import open_own, os_errors

_FLOAT_BYTES = 4
_CHUNK_ELEMENTS = 1 << 22
"""Elements of one chunk of rows: 16 MiB."""
_CALL_BYTES = 1 << 15
MEMORY_BYTES = 1 << 28
"""What all rows of a pass may take in memory; with their smaller chunks, less than the chunks of files."""
_MEMORY_CHUNK_ELEMENTS = 1 << 20
"""Of one chunk of rows in memory: 4 MiB, so that what is made of them fits beside them, and in a processor's cache."""


class RowFile:
    """float32 [num_rows, width] in a file; a context manager.

    Attributes:
        path: the file.
        num_rows: rows.
        width: elements of a row.
    """

    def __init__(self, path: Path, num_rows: int, width: int, device: torch.device | str = "cpu") -> None:
        """Open the file, or create it; what is in it stays.

        Args:
            path: the file.
            num_rows: rows.
            width: elements of a row.
            device: where rows go that are read.

        Raises:
            OutputError: it cannot be opened, or the disk is full.
        """
        self.path, self.num_rows, self.width = path, num_rows, width
        self._device = torch.device(device)
        self._row_bytes = width * _FLOAT_BYTES
        with os_errors(f"{path}: cannot be opened", path.parent, num_rows * self._row_bytes):
            self._descriptor = open_own(path, os.O_RDWR | os.O_CREAT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; it stays."""
        os.close(self._descriptor)

    def sync(self) -> None:
        """Bring what was written to the disk."""
        with os_errors(f"{self.path}: cannot be written", self.path.parent, 1):
            os.fsync(self._descriptor)

    def chunks(self) -> Iterator[slice]:
        """All rows, a chunk at a time."""
        return row_chunks(self.num_rows, self.width)

    def read(self, rows: slice) -> Tensor:
        """Rows [R, W] of a slice."""
        values = torch.empty(rows.stop - rows.start, self.width)
        self._read(values, rows.start)
        return values.to(self._device)

    def write(self, rows: slice, values_RW: Tensor) -> None:
        """Replace the rows of a slice."""
        self._write(values_RW.to(dtype=torch.float32, device="cpu").contiguous(), rows.start)

    def gather(self, rows_R: Tensor) -> Tensor:
        """Rows [R, W] by number, in any order; fast where numbers ascend."""
        values = torch.empty(len(rows_R), self.width)
        for places, rows in self._spans(rows_R):
            if len(places) == rows.stop - rows.start:
                self._read(values[places.start : places.stop], rows.start)
            else:
                numbers = rows_R[places.start : places.stop].cpu() - rows.start
                values[places.start : places.stop] = self._span(rows)[numbers]
        return values.to(self._device)

    def scatter(self, rows_R: Tensor, values_RW: Tensor) -> None:
        """Replace rows by number, in any order but none twice; fast where numbers ascend."""
        values = values_RW.to(dtype=torch.float32, device="cpu").contiguous()
        for places, rows in self._spans(rows_R):
            if len(places) == rows.stop - rows.start:
                self._write(values[places.start : places.stop], rows.start)
            else:
                span = self._span(rows)
                span[rows_R[places.start : places.stop].cpu() - rows.start] = values[places.start : places.stop]
                self._write(span, rows.start)

    def load(self, values_RW: Tensor) -> None:
        """Read rows from the first on into memory, as far as the file goes."""
        self._read(values_RW, 0, may_end=True)

    def _spans(self, rows_R: Tensor) -> Iterator[tuple[range, slice]]:
        """Places in `rows_R`, and the rows of the file to move at once for them.

        A call costs as much as moving some KiB, so short rows are moved together with those between them.
        """
        gap = max(0, _CALL_BYTES // self._row_bytes)
        longest = max(1, _CHUNK_ELEMENTS // self.width)
        numbers = rows_R.tolist()
        begin = 0
        for place in range(1, len(numbers) + 1):
            if (
                place == len(numbers)
                or not 0 < numbers[place] - numbers[place - 1] <= gap + 1
                or numbers[place] - numbers[begin] >= longest
            ):
                yield range(begin, place), slice(numbers[begin], numbers[place - 1] + 1)
                begin = place

    def _span(self, rows: slice) -> Tensor:
        span = torch.empty(rows.stop - rows.start, self.width)
        self._read(span, rows.start, may_end=True)
        return span

    def _read(self, values: Tensor, start: int, *, may_end: bool = False) -> None:
        with os_errors(f"{self.path}: cannot be read"):
            count = read_into(self._descriptor, byte_view(values), start * self._row_bytes)
        assert count == values.nbytes or may_end, "rows are read that were never written"

    def _write(self, values: Tensor, start: int) -> None:
        with os_errors(f"{self.path}: cannot be written", self.path.parent, values.nbytes):
            write_from(self._descriptor, byte_view(values), start * self._row_bytes)


class MemoryRows(RowFile):
    """The same in memory; the file holds what was there at the last `sync`, and is not there before the first one."""

    def __init__(self, path: Path, num_rows: int, width: int, device: torch.device | str = "cpu") -> None:
        """Take what is in the file, as far as it goes; arguments as of RowFile."""
        self.path, self.num_rows, self.width = path, num_rows, width
        self._device = torch.device(device)
        self._values = torch.empty(num_rows, width)
        if path.exists():
            with RowFile(path, num_rows, width) as file:
                file.load(self._values)

    def close(self) -> None:
        """Nothing is open."""

    def sync(self) -> None:
        """Bring all rows to the disk."""
        with RowFile(self.path, self.num_rows, self.width) as file:
            file.write(slice(0, self.num_rows), self._values)
            file.sync()

    def chunks(self) -> Iterator[slice]:
        """All rows, a chunk at a time."""
        return _slices(self.num_rows, self.width, _MEMORY_CHUNK_ELEMENTS)

    def read(self, rows: slice) -> Tensor:
        """Rows [R, W] of a slice; on a processor a view, which must not be changed."""
        return self._values[rows].to(self._device)

    def write(self, rows: slice, values_RW: Tensor) -> None:
        """Replace the rows of a slice."""
        self._values[rows] = values_RW.to(dtype=torch.float32, device="cpu")

    def gather(self, rows_R: Tensor) -> Tensor:
        """Rows [R, W] by number, in any order."""
        return self._values.index_select(0, rows_R.cpu()).to(self._device)

    def scatter(self, rows_R: Tensor, values_RW: Tensor) -> None:
        """Replace rows by number, in any order but none twice."""
        self._values.index_copy_(0, rows_R.cpu(), values_RW.to(dtype=torch.float32, device="cpu"))


def row_chunks(num_rows: int, width: int) -> Iterator[slice]:
    """Slices of rows of about 16 MiB in float32."""
    return _slices(num_rows, width, _CHUNK_ELEMENTS)


def _slices(num_rows: int, width: int, num_elements: int) -> Iterator[slice]:
    step = max(1, num_elements // width)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
