"""A folder that turns into a checkpoint in one step, or stays what it was.

Everything is prepared in `OUT/.llama4-quant-partial/` and moved into OUT by renames, weights first and config.json
(in Meta's layout: params.json) last, because a folder without it is not a checkpoint to any loader. When OUT holds an
older checkpoint it stays whole and loadable until all files of the new one are written and synced. Then its config.json
and index are removed, and until the new config.json is in place (some renames, milliseconds) OUT is not loadable. A
crash in that window leaves the staging folder and no config.json: readers call that an unfinished output, and the next
run replaces it.

What is staged may be kept, to be continued by a later process: then the folder also holds a fingerprint of the job
(resume.py), journals (journal.py), and, once the renames have begun, a mark that says so. Locks (locks.py) keep other
conversions out.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from llama4_quant.checkpoint.buffers import write_from
from llama4_quant.checkpoint.files import has_size, no_space, open_own, os_errors, replacing, reserve, sync_folder
from llama4_quant.checkpoint.layout import SHARD_NAME
from llama4_quant.checkpoint.locks import LOCK_NAME, TURN_NAME, FolderLock, Turn
from llama4_quant.checkpoint.paths import CONFIG_NAME, DOWNLOAD_NAME, INDEX_NAME, PARAMS_NAME, STAGING_NAME
from llama4_quant.errors import OutputError

_ENTRIES = frozenset({CONFIG_NAME, PARAMS_NAME})
"""Each makes a folder a checkpoint: in Hugging Face layout, in Meta's."""
_PUBLISHING_NAME = "publishing"
_BLOCK = 512
_COPY_BYTES = 2**20


class Staging:
    """The staging folder of one output, locked by this process.

    Attributes:
        out: the output folder, links resolved.
        folder: the staging folder inside it.
        alone: whether no other process was at work in it.
        was_publishing: whether an earlier process had begun to replace the files of `out`.
    """

    def __init__(self, out: Path, *, overwrite: bool, source: Path | None = None, together: bool = False) -> None:
        """Check that `out` may be written, create it if need be, and take its lock; what is staged is not touched.

        Args:
            out: the output folder; its parents are created too.
            overwrite: whether an existing checkpoint in it may be replaced.
            source: the checkpoint that is being read, which must not be replaced.
            together: work in it together with other processes; until `ready` they wait.

        Raises:
            OutputError: `out` is the source, is not a folder, holds something else, or another process writes to it.
        """
        self.out = out.resolve()
        self.folder = self.out / STAGING_NAME
        self._together = together
        with os_errors(f"{out}: cannot be created", self.out, 1):
            self._made_out = not self.out.exists()
            check_output(self.out, overwrite=overwrite, source=source)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._turn = Turn(self.folder) if together else None
            try:
                self._lock = FolderLock(self.folder, together=together)
            except BaseException:
                self._end_turn()
                raise
        self.alone = self._lock.alone
        self.was_publishing = (self.folder / _PUBLISHING_NAME).exists()
        self._publishing = self.was_publishing

    def ready(self) -> None:
        """Everything is set up: let the processes in that this one works together with."""
        if self._together:
            self._lock.share()
        self._end_turn()

    def empty(self) -> None:
        """Remove what an earlier process has left, but not the locks."""
        with os_errors(f"{self.folder}: cannot be emptied"):
            for entry in list(self.folder.iterdir()):
                if entry.name == DOWNLOAD_NAME:
                    continue  # in use by the reader of this very conversion
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name not in {LOCK_NAME, TURN_NAME}:
                    entry.unlink()
        self.was_publishing = False

    def allocated(self) -> int:
        """Bytes of disk that staged files occupy already."""
        return reserved_bytes(self.out)

    def require_space(self, needed: int) -> None:
        """Raise OutputError if the file system has less than `needed` bytes free."""
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OutputError(f"{self.out}: {no_space(needed, free)}")

    def allocate(self, name: str, nbytes: int) -> int:
        """Create a file of `nbytes` whose disk blocks are reserved; returns its descriptor, open for writing.

        Raises:
            OutputError: the disk is full, or the file system refuses such a file.
        """
        with os_errors(f"{self.out / name}: cannot reserve {nbytes:,} bytes", self.folder, nbytes):
            descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                reserve(descriptor, nbytes)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor

    def reopen(self, name: str, nbytes: int) -> int | None:
        """A file that `allocate` has made in an earlier process; None if it is in `out` already.

        Raises:
            OutputError: it is missing, or has another size.
        """
        staged = self.folder / name
        with os_errors(f"{staged}: cannot be opened"):
            if has_size(staged, nbytes):
                return open_own(staged, os.O_RDWR)
        if self.was_publishing and not staged.exists() and has_size(self.out / name, nbytes):
            return None
        raise OutputError(
            f"{staged}: expected {nbytes:,} bytes from the interrupted run, and the file is missing or has another "
            "size; give --resume never to start anew"
        )

    def put(self, name: str, data: bytes) -> None:
        """Write a small file and sync it; an earlier one is replaced."""
        what = f"{self.out / name}: cannot be written"
        with os_errors(what, self.folder, len(data)), replacing(self.folder / name) as descriptor:
            write_from(descriptor, memoryview(data), 0)
            os.fsync(descriptor)

    def sync(self) -> None:
        """Make names of staged files durable."""
        with os_errors(f"{self.folder}: cannot be synced"):
            sync_folder(self.folder)

    def copy(self, name: str, origin: Path) -> tuple[int, str]:
        """Copy the content of a file (through links) and sync it; an earlier copy is replaced.

        Returns:
            Size and SHA-256 of what was copied.
        """
        with os_errors(f"{origin}: cannot be read"):
            nbytes = origin.stat().st_size
        what = f"{self.out / name}: cannot be copied from {origin}"
        digest, copied = sha256(), 0
        with (
            os_errors(what, self.folder, nbytes),
            replacing(self.folder / name) as descriptor,
            origin.open("rb") as file,
        ):
            while chunk := file.read(_COPY_BYTES):
                write_from(descriptor, memoryview(chunk), copied)
                digest.update(chunk)
                copied += len(chunk)
            os.fsync(descriptor)
        return copied, digest.hexdigest()

    def publish(self, weights: Sequence[str], others: Sequence[str], last: str = CONFIG_NAME) -> None:
        """Move staged files into the output: weights, others, config.json; then drop the staging folder.

        Args:
            weights: names of the staged shards; weight files of an older checkpoint that are not among them go.
            others: names of the other staged files, in the order in which they are moved.
            last: the file that makes it a checkpoint: config.json, or params.json in Meta's layout.
        """
        self.was_publishing = self.was_publishing or (self.folder / _PUBLISHING_NAME).exists()
        with os_errors(f"{self.out}: cannot be completed"):
            self.put(_PUBLISHING_NAME, b"")
            sync_folder(self.folder)
            self._publishing = True
            for name in (*_ENTRIES, INDEX_NAME):
                (self.out / name).unlink(missing_ok=True)
            sync_folder(self.out)
            for entry in list(self.out.iterdir()):
                if SHARD_NAME.fullmatch(entry.name) and entry.name not in weights:
                    entry.unlink()
            for name in (*weights, *others):
                if (self.folder / name).exists() or not self.was_publishing:  # else an earlier process has moved it
                    (self.folder / name).replace(self.out / name)
            sync_folder(self.out)
            (self.folder / last).replace(self.out / last)
            sync_folder(self.out)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.leave()

    def discard(self) -> None:
        """Remove what was staged, and the output folder if this object made it.

        Not while other processes are at work in it; and once `publish` has begun to replace files the staging folder
        is kept: it marks the output as unfinished.
        """
        if not self._publishing and self._lock.is_alone():
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._made_out:
                with suppress(OSError):  # somebody else has put a file there meanwhile
                    self.out.rmdir()
        self.leave()

    def leave(self) -> None:
        """Release the locks; what is staged stays."""
        self._end_turn()
        self._lock.close()

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._turn.close()


def reserved_bytes(out: Path) -> int:
    """Bytes of disk that an unfinished output occupies already."""
    folder = out / STAGING_NAME
    return sum(path.lstat().st_blocks * _BLOCK for path in folder.iterdir()) if folder.is_dir() else 0


def is_publishing(out: Path) -> bool:
    """Whether an earlier process was making an output visible when it ended: nothing but moving files is left."""
    return (out / STAGING_NAME / _PUBLISHING_NAME).exists()


def check_output(out: Path, *, overwrite: bool, source: Path | None) -> None:
    """Raise OutputError if `out` must not be written: it is the source, holds a checkpoint, or something else."""
    if source is not None and out.exists() and source.exists() and out.samefile(source):
        raise OutputError(f"{out}: this is the source itself; choose another output folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out}: expected a folder, found a file; choose another output folder")
    names = {entry.name for entry in out.iterdir()}
    if STAGING_NAME in names and ((out / STAGING_NAME).is_symlink() or not (out / STAGING_NAME).is_dir()):
        raise OutputError(
            f"{out / STAGING_NAME}: expected a folder made by llama4-quant, found a link or file; remove it"
        )
    if names & _ENTRIES and not overwrite:
        raise OutputError(f"{out}: a checkpoint exists here; give --overwrite to replace it, or another output folder")
    if names and not names & {*_ENTRIES, STAGING_NAME}:
        raise OutputError(
            f"{out}: not empty, and not a checkpoint (no {CONFIG_NAME}), so it is not overwritten; choose another "
            "output folder"
        )
