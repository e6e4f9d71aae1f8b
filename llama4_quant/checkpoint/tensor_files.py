"""Tensors that stay in their files while a model runs: mapped, or read when they are wanted.

A reader is closed when a model is loaded; what stays open here are duplicates of its descriptors, so what is read later
is what was checked. Reads take exactly the bytes they are asked for and, unlike a conversion's, nothing ahead.
"""

import mmap
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from llama4_quant.checkpoint.buffers import byte_view, read_ahead, read_into
from llama4_quant.checkpoint.header import TensorEntry
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.errors import CheckpointError


class TensorFiles:
    """Files of a checkpoint, open until `close`. Thread-safe."""

    def __init__(self, descriptors: Mapping[Path, int], files: ExitStack) -> None:
        self._descriptors = dict(descriptors)
        self._files = files
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def of(cls, reader: CheckpointReader, names: Iterable[str]) -> Self:
        """Keep open the files of an open checkpoint that hold these tensors."""
        with ExitStack() as files:
            descriptors = {}
            for path in sorted({reader.tensors[name].path for name in names}):
                descriptors[path] = reader.duplicate(path)
                files.callback(os.close, descriptors[path])
            return cls(descriptors, files.pop_all())

    def close(self) -> None:
        """Close the files; views stay valid as long as they are used."""
        self._maps.clear()
        self._descriptors.clear()
        self._files.close()

    def view(self, entry: TensorEntry) -> Tensor:
        """A tensor whose memory is the file's pages: nothing is read before it is used. Not to be written to.

        Where it does not lie on a multiple of its elements' size it is read into memory of its own.

        Raises:
            CheckpointError: the file has become shorter, or cannot be mapped.
        """
        size = entry.torch_dtype.itemsize
        if entry.start % size:
            return self.read(entry, torch.empty(entry.shape, dtype=entry.torch_dtype))
        mapped = self._map(entry)
        flat = torch.frombuffer(mapped, dtype=entry.torch_dtype, count=entry.nbytes // size, offset=entry.start)
        return flat.view(entry.shape)

    def read(self, entry: TensorEntry, out: Tensor, offset: int = 0) -> Tensor:
        """Fill a contiguous tensor with the entry's bytes from byte `offset` on; gives it back.

        Raises:
            CheckpointError: the file has become shorter or unreadable.
        """
        view = byte_view(out)
        try:
            count = read_into(self._descriptors[entry.path], view, entry.start + offset)
        except OSError as problem:
            raise CheckpointError(
                f"{entry.path}: reading {entry.name} failed: {problem.strerror}; check the disk"
            ) from problem
        if count < len(view):
            raise CheckpointError(_shorter(entry, len(view), count))
        return out

    def will_need(self, entry: TensorEntry) -> None:
        """Have the kernel read a tensor into its cache, without waiting for it."""
        read_ahead(self._descriptors[entry.path], entry.start, entry.nbytes)

    def _map(self, entry: TensorEntry) -> mmap.mmap:
        if entry.path not in self._maps:
            descriptor = self._descriptors[entry.path]
            try:
                # Private pages that nobody writes to are the kernel's own; torch wants memory that could be written.
                self._maps[entry.path] = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as problem:
                raise CheckpointError(f"{entry.path}: cannot be mapped into memory: {problem}") from problem
        mapped = self._maps[entry.path]
        if len(mapped) < entry.start + entry.nbytes:
            raise CheckpointError(_shorter(entry, entry.nbytes, max(0, len(mapped) - entry.start)))
        return mapped


def _shorter(entry: TensorEntry, expected: int, found: int) -> str:
    return (
        f"{entry.path}: {entry.name}: expected {expected:,} bytes, found {found:,}: the file became shorter while it "
        "was in use; download it again"
    )
