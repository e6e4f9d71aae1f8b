"""Reading tensors, or just some rows of one expert of one tensor, from a checkpoint in Hugging Face layout.

Maverick's largest tensor has 21.5 GB, so nothing here loads a tensor unasked or maps a file: opening reads headers
only, and every read moves exactly the bytes it was asked for from the file into one torch buffer. Files are opened
once, when their headers are checked, and stay open: what is read later is what was checked.

Shape letters: E experts, A and B the other two dimensions of a stacked expert weight.
"""

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch

from llama4_quant.checkpoint.buffers import byte_view, read_ahead, read_into
from llama4_quant.checkpoint.header import TensorEntry, read_header
from llama4_quant.checkpoint.index import check_against_index, check_folder, shards_of
from llama4_quant.checkpoint.json_files import read_json
from llama4_quant.checkpoint.paths import CONFIG_NAME, locate
from llama4_quant.checkpoint.resume import source_facts
from llama4_quant.errors import CheckpointError

READ_AHEAD = 2
"""So many times what was read is read ahead: items lie one behind the other, and two workers take two of them."""

__all__ = ["CheckpointReader", "TensorEntry", "read_json"]


class CheckpointReader:
    """An open checkpoint; a context manager. Reads are thread-safe.

    Attributes:
        path: its folder.
        config: config.json, parsed.
        tensors: every stored tensor by name, in the order of files and bytes.
    """

    def __init__(
        self,
        *,
        path: Path,
        config: dict[str, Any],
        tensors: dict[str, TensorEntry],
        descriptors: dict[Path, int],
        files: ExitStack,
    ) -> None:
        self.path = path
        self.config = config
        self.tensors: Mapping[str, TensorEntry] = MappingProxyType(tensors)
        self._descriptors = descriptors
        self._files = files

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the checkpoint in folder `path` and check its config.json, its index and the header of every shard.

        Raises:
            CheckpointError: not a checkpoint, files missing, cut short, damaged or contradicting each other.
            ConfigError: config.json is not usable JSON.
        """
        check_folder(path)
        config = read_json(locate(path, CONFIG_NAME))
        with ExitStack() as files:
            tensors: dict[str, TensorEntry] = {}
            descriptors: dict[Path, int] = {}
            for name, promised in shards_of(path).items():
                shard = locate(path, name)
                descriptors[shard] = open_file(shard, files)
                entries = read_header(descriptors[shard], shard)
                if promised is not None:
                    check_against_index(shard, promised, entries)
                tensors.update((entry.name, entry) for entry in entries)
            if not tensors:
                raise CheckpointError(f"{path}: expected weights, and its files hold no tensors; download it again")
            return cls(path=path, config=config, tensors=tensors, descriptors=descriptors, files=files.pop_all())

    def stop_waiting(self) -> None:
        """Let reads that wait for data fail, since their results are not wanted any more; local files never wait."""

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
        self._descriptors.clear()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the source is, for fingerprints: by file, size, time of change and what a header says."""
        return source_facts(self.tensors, self.files)

    @property
    def files(self) -> tuple[Path, ...]:
        """What decides, beside the files of `tensors`, what is read."""
        return (self.path / CONFIG_NAME,)

    def duplicate(self, path: Path) -> int:
        """Another descriptor of one of the files of `tensors`, for the caller to close."""
        return os.dup(self._descriptors[path])

    def read(self, name: str, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """The whole tensor, in its stored dtype, in a fresh buffer or in `out` (same shape and dtype, contiguous).

        Raises:
            CheckpointError: no tensor of this name, or the file has become shorter or unreadable.
        """
        entry = self._entry(name)
        return self._read(entry, entry.start, entry.shape, out)

    def read_rows(self, name: str, start: int, stop: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of dimension 0: shape [stop - start, ...]; see `read`."""
        entry = self._entry(name)
        _check_range(entry, 0, start, stop)
        row_nbytes = math.prod(entry.shape[1:]) * entry.torch_dtype.itemsize
        return self._read(entry, entry.start + start * row_nbytes, (stop - start, *entry.shape[1:]), out)

    def read_slice(
        self, name: str, expert: int, start: int, stop: int, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows `start` to `stop` of dimension 1 of one expert of an [E, A, B] tensor: [stop - start, B]; see `read`."""
        entry = self._entry(name)
        if len(entry.shape) != 3:
            raise CheckpointError(
                f"{name}: expected a stacked [experts, rows, columns] tensor, found {list(entry.shape)}"
            )
        _check_range(entry, 0, expert, expert + 1)
        _check_range(entry, 1, start, stop)
        _, A, B = entry.shape
        row_nbytes = B * entry.torch_dtype.itemsize
        return self._read(entry, entry.start + (expert * A + start) * row_nbytes, (stop - start, B), out)

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: expected a tensor {name}, and no file holds it; config.json and the weights do not "
                "belong together, or the download is incomplete"
            ) from None

    def _read(self, entry: TensorEntry, start: int, shape: tuple[int, ...], out: torch.Tensor | None) -> torch.Tensor:
        if out is None:
            out = torch.empty(shape, dtype=entry.torch_dtype)
        elif tuple(out.shape) != shape or out.dtype != entry.torch_dtype or not out.is_contiguous():
            raise CheckpointError(
                f"{entry.name}: expected a contiguous buffer {entry.torch_dtype} {list(shape)}, found {out.dtype} "
                f"{list(out.shape)}"
            )
        self._fill(entry, start - entry.start, out)
        return out

    def _fill(self, entry: TensorEntry, offset: int, out: torch.Tensor) -> None:
        """Fill `out` with the tensor's bytes from its byte `offset` on."""
        self._read_bytes(entry.path, entry.start + offset, byte_view(out), entry.name)

    def _read_bytes(self, path: Path, start: int, view: memoryview, name: str) -> None:
        try:
            count = read_into(self._descriptors[path], view, start)
            read_ahead(self._descriptors[path], start + count, READ_AHEAD * count)
        except KeyError:
            raise CheckpointError(f"{path}: the checkpoint is closed; read inside its `with` block") from None
        except OSError as problem:
            raise CheckpointError(f"{path}: reading {name} failed: {problem.strerror}; check the disk") from problem
        if count < len(view):
            raise CheckpointError(
                f"{path}: {name}: expected {len(view):,} bytes, found {count:,}: the file became shorter while it was "
                "in use; download it again"
            )


def open_file(path: Path, files: ExitStack) -> int:
    """Open `path` for reading until `files` is closed.

    Raises:
        CheckpointError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as problem:
        raise CheckpointError(
            f"{path}: cannot be opened: {problem.strerror}; check permissions and ulimit -n"
        ) from problem
    files.callback(os.close, descriptor)
    return descriptor


def _check_range(entry: TensorEntry, dim: int, start: int, stop: int) -> None:
    size = entry.shape[dim] if dim < len(entry.shape) else 0
    if not 0 <= start <= stop <= size:
        raise CheckpointError(
            f"{entry.name}: rows {start} to {stop} of dimension {dim} do not exist in {list(entry.shape)}"
        )
