"""A folder that turns into a checkpoint in one step, or stays what it was.

Everything is prepared in `OUT/.llama4-quant-partial/` and moved into OUT by renames, weights first and config.json
last, because a folder without config.json is not a checkpoint to any loader. When OUT holds an older checkpoint it
stays whole and loadable until all files of the new one are written and synced. Then its config.json and index are
removed, and until the new config.json is in place (some renames, milliseconds) OUT is not loadable. A crash in that
window leaves the staging folder and no config.json: readers call that an unfinished output, and the next run replaces
it.

A lock on a file in the staging folder keeps a second process out; the kernel releases it when its holder dies.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llama4_quant.checkpoint.layout import SHARD_NAME
from llama4_quant.checkpoint.paths import CONFIG_NAME, INDEX_NAME, STAGING_NAME
from llama4_quant.errors import OutputError

_LOCK_NAME = "lock"
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Staging:
    """The staging folder of one output, locked by this process.

    Attributes:
        out: the output folder, links resolved.
        folder: the staging folder inside it.
    """

    def __init__(self, out: Path, *, overwrite: bool, source: Path | None = None) -> None:
        """Check that `out` may be written, create it if need be, and take its lock.

        Args:
            out: the output folder; its parents are created too.
            overwrite: whether an existing checkpoint in it may be replaced.
            source: the checkpoint that is being read, which must not be replaced.

        Raises:
            OutputError: `out` is the source, is not a folder, holds something else, or another process writes to it.
        """
        self.out = out.resolve()
        self.folder = self.out / STAGING_NAME
        self._publishing = False
        with os_errors(f"{out}: cannot be created"):
            self._made_out = not self.out.exists()
            _check_output(self.out, overwrite=overwrite, source=source)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock: int | None = _take_lock(self.folder)
            try:
                _empty(self.folder)
            except BaseException:
                self._unlock()
                raise

    def require_space(self, needed: int) -> None:
        """Raise OutputError if the file system has less than `needed` bytes free."""
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OutputError(f"{self.out}: {_no_space(needed, free)}")

    def allocate(self, name: str, nbytes: int) -> int:
        """Create a file of `nbytes` whose disk blocks are reserved; returns its descriptor, open for writing.

        Raises:
            OutputError: the disk is full, or the file system refuses such a file.
        """
        with os_errors(f"{self.out / name}: cannot reserve {nbytes:,} bytes", self.folder, nbytes):
            descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                _reserve(descriptor, nbytes)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor

    def put(self, name: str, data: bytes) -> None:
        """Write a small file and sync it."""
        with (
            os_errors(f"{self.out / name}: cannot be written", self.folder, len(data)),
            (self.folder / name).open("xb") as file,
        ):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def copy(self, name: str, origin: Path) -> None:
        """Copy the content of a file (through links) and sync it."""
        with os_errors(f"{origin}: cannot be read"):
            nbytes = origin.stat().st_size
        what = f"{self.out / name}: cannot be copied from {origin}"
        with os_errors(what, self.folder, nbytes), origin.open("rb") as file, (self.folder / name).open("xb") as target:
            shutil.copyfileobj(file, target)
            target.flush()
            os.fsync(target.fileno())

    def publish(self, weights: Sequence[str], others: Sequence[str]) -> None:
        """Move staged files into the output: weights, others, index, config.json; then drop the staging folder.

        Args:
            weights: names of the staged shards; weight files of an older checkpoint that are not among them go.
            others: names of the other staged files, without the index and config.json.
        """
        with os_errors(f"{self.out}: cannot be completed"):
            _sync_folder(self.folder)
            self._publishing = True
            for name in (CONFIG_NAME, INDEX_NAME):
                (self.out / name).unlink(missing_ok=True)
            _sync_folder(self.out)
            for entry in list(self.out.iterdir()):
                if SHARD_NAME.fullmatch(entry.name) and entry.name not in weights:
                    entry.unlink()
            for name in (*weights, *others, INDEX_NAME):
                (self.folder / name).replace(self.out / name)
            _sync_folder(self.out)
            (self.folder / CONFIG_NAME).replace(self.out / CONFIG_NAME)
            _sync_folder(self.out)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()

    def discard(self) -> None:
        """Remove what was staged, and the output folder if this object made it.

        Once `publish` has begun to replace files the staging folder is kept: it marks the output as unfinished.
        """
        if not self._publishing:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._made_out:
                with suppress(OSError):  # somebody else has put a file there meanwhile
                    self.out.rmdir()
        self._unlock()

    def _unlock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


@contextmanager
def os_errors(what: str, folder: Path | None = None, needed: int = 0) -> Iterator[None]:
    """Turn an OSError into an OutputError that opens with `what`; a full disk comes with bytes needed and free."""
    try:
        yield
    except OSError as problem:
        if problem.errno in _FULL and folder is not None:
            raise OutputError(f"{what}: {_no_space(needed, shutil.disk_usage(folder).free)}") from problem
        hint = (
            "use a smaller --max-shard-size" if problem.errno == errno.EFBIG else "check the disk and the permissions"
        )
        raise OutputError(f"{what}: {problem.strerror}; {hint}") from problem


def _no_space(needed: int, free: int) -> str:
    return f"no space left: {needed:,} bytes needed, {free:,} free; free some space or choose another output folder"


def _check_output(out: Path, *, overwrite: bool, source: Path | None) -> None:
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
    if CONFIG_NAME in names and not overwrite:
        raise OutputError(f"{out}: a checkpoint exists here; give --overwrite to replace it, or another output folder")
    if names and not names & {CONFIG_NAME, STAGING_NAME}:
        raise OutputError(
            f"{out}: not empty, and not a checkpoint (no {CONFIG_NAME}), so it is not overwritten; choose another "
            "output folder"
        )


def _take_lock(folder: Path) -> int:
    path = folder / _LOCK_NAME
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = path.exists() and os.path.samestat(os.fstat(lock), path.stat())
    except BlockingIOError:
        held = False
    if not held:  # or held, but of a file that its last owner has just deleted
        os.close(lock)
        raise OutputError(f"{folder.parent}: another process is writing to this folder; wait for it, or choose another")
    return lock


def _empty(folder: Path) -> None:
    """Remove what a killed run has left, but not the lock."""
    for entry in list(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _LOCK_NAME:
            entry.unlink()


def _reserve(descriptor: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as problem:
        if problem.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
            raise
        os.ftruncate(descriptor, nbytes)  # this file system cannot reserve; a full disk shows while writing


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
