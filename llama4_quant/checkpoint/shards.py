"""The weight files of an output while they are written: open descriptors, and which of them hold unsynced bytes.

Large writes go past the kernel's cache: copying to it, and finding room in it for an output that nobody reads soon,
costs more time than quantizing. Whole pages go directly; what is before and after them, and all that cannot go
directly, goes through the cache, and is given up there once it is on the disk.
"""

import os
import threading
from collections import deque
from collections.abc import Sequence

from llama4_quant.checkpoint.buffers import read_into, write_direct, write_from
from llama4_quant.checkpoint.files import os_errors, reopen_direct, write_behind
from llama4_quant.checkpoint.layout import Layout
from llama4_quant.checkpoint.staging import Staging

DIRECT_BYTES = 2**20
"""Smaller writes go through the cache: for them the way to the disk and back is what takes time."""
WRITES_ON_THEIR_WAY = 2


class ShardFiles:
    """The shards of one output. Writing and syncing are thread-safe."""

    def __init__(self, layout: Layout, staging: Staging) -> None:
        """Nothing is opened before `allocate` or `reopen`."""
        self._layout = layout
        self._staging = staging
        self._descriptors: dict[int, int] = {}
        self._direct: dict[int, int | None] = {}
        self._dirty: set[int] = set()
        self._on_their_way: deque[tuple[int, int, int]] = deque()
        self._lock = threading.Lock()

    def allocate(self) -> None:
        """Create all shards and reserve their space.

        Raises:
            OutputError: the disk is too small.
        """
        self._staging.require_space(self._layout.nbytes)
        for number, shard in enumerate(self._layout.shards):
            self._keep(number, self._staging.allocate(shard.filename, shard.nbytes))

    def reopen(self) -> None:
        """Open the shards that an earlier process has made; those that it has published already stay closed.

        Raises:
            OutputError: one is missing or has another size, or the disk is too small for what was not reserved.
        """
        if not self._staging.was_publishing:
            self._staging.require_space(self._layout.nbytes - self._staging.allocated())
        for number, shard in enumerate(self._layout.shards):
            descriptor = self._staging.reopen(shard.filename, shard.nbytes)
            if descriptor is not None:
                self._keep(number, descriptor)

    def write(self, number: int, view: memoryview, start: int, what: str) -> None:
        """Write bytes of `what` at a position of a shard."""
        path = self._staging.out / self._layout.shards[number].filename
        with os_errors(f"{path}: {what} cannot be written", self._staging.folder, len(view)):
            first, last = self._write_direct(number, view, start)
            write_from(self._descriptors[number], view[:first], start)
            write_from(self._descriptors[number], view[last:], start + last)
        with self._lock:
            self._dirty.add(number)
        if first == last:
            self._write_behind(number, start, len(view))

    def read(self, number: int, view: memoryview, start: int) -> None:
        """Fill `view` with bytes of a shard that were written before."""
        path = self._staging.out / self._layout.shards[number].filename
        with os_errors(f"{path}: cannot be read back"):
            read_into(self._descriptors[number], view, start)

    def write_frames(self, frames: Sequence[Sequence[tuple[int, bytes]]]) -> None:
        """Write what stands around the tensors: (start, bytes) for each shard; published ones have it already."""
        for number, frame in enumerate(frames):
            for start, data in frame if number in self._descriptors else ():
                self.write(number, memoryview(data), start, "what stands around its tensors")

    def sync(self) -> None:
        """Bring to the disk all bytes whose `write` has returned."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        with os_errors(f"{self._staging.out}: cannot be written", self._staging.folder, self._layout.nbytes):
            for number in sorted(dirty):
                os.fdatasync(self._descriptors[number])
                write_behind(self._descriptors[number])

    def sync_all(self) -> None:
        """Bring every shard to the disk, whoever wrote to it."""
        with os_errors(f"{self._staging.out}: cannot be written", self._staging.folder, self._layout.nbytes):
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)

    def close(self) -> None:
        """Close all files."""
        for descriptor in (*self._descriptors.values(), *self._direct.values()):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptors.clear()
        self._direct.clear()

    def _write_direct(self, number: int, view: memoryview, start: int) -> tuple[int, int]:
        """Write what can go past the cache; returns which part of `view` that was."""
        if len(view) < DIRECT_BYTES:
            return 0, 0
        with self._lock:
            if number not in self._direct:
                self._direct[number] = reopen_direct(self._descriptors[number])
        descriptor = self._direct[number]
        return (0, 0) if descriptor is None else write_direct(descriptor, view, start)

    def _write_behind(self, number: int, start: int, nbytes: int) -> None:
        """Begin to bring a range to the disk, and give up the cache of one that has probably arrived there."""
        with self._lock:
            self._on_their_way.append((number, start, nbytes))
            arrived = self._on_their_way.popleft() if len(self._on_their_way) > WRITES_ON_THEIR_WAY else None
        write_behind(self._descriptors[number], start, nbytes)
        if arrived is not None:
            write_behind(self._descriptors[arrived[0]], *arrived[1:])

    def _keep(self, number: int, descriptor: int) -> None:
        self._descriptors[number] = descriptor
