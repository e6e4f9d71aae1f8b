"""File operations of an output: errors in words, space reserved, contents and names synced."""

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama4_quant.checkpoint.buffers import write_from
from llama4_quant.errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def os_errors(what: str, folder: Path | None = None, needed: int = 0) -> Iterator[None]:
    """Turn an OSError into an OutputError that opens with `what`; a full disk comes with bytes needed and free."""
    try:
        yield
    except OSError as problem:
        if problem.errno in _FULL and folder is not None:
            free = shutil.disk_usage(existing_parent(folder)).free
            raise OutputError(f"{what}: {no_space(needed, free)}") from problem
        hint = (
            "use a smaller --max-shard-size" if problem.errno == errno.EFBIG else "check the disk and the permissions"
        )
        raise OutputError(f"{what}: {problem.strerror}; {hint}") from problem


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists: it says on which disk the folder would be."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def no_space(needed: int, free: int) -> str:
    """What to say about a full disk."""
    return (
        f"no space left: {needed:,} bytes needed, {free:,} free; free some space and run the same command again, or "
        "choose another output folder"
    )


def reserve(descriptor: int, nbytes: int) -> None:
    """Make an open file `nbytes` long and reserve its blocks, where the file system can."""
    try:
        fallocate(descriptor, nbytes)
    except OSError as problem:
        if problem.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
            raise
        os.ftruncate(descriptor, nbytes)  # this file system cannot reserve; a full disk shows while writing


def fallocate(descriptor: int, nbytes: int) -> None:
    """Reserve the blocks of a file, and raise OSError where the file system cannot.

    Not `os.posix_fallocate`: there the C library would write to every block instead, which takes as long as writing the
    whole output, and on a network file system longer.
    """
    library = ctypes.CDLL(None, use_errno=True)
    while library.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def open_own(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file that this project made in a staging folder: a regular file with one name, never through a link.

    Anything else there (a link, a second name of somebody's file, a pipe that blocks, a device) was put there by
    somebody else, and is neither read nor written.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        OutputError: it is something else.
    """
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as problem:
        if problem.errno in {errno.ELOOP, errno.EISDIR, errno.ENXIO}:
            raise OutputError(_foreign(path)) from problem
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise OutputError(_foreign(path))
    return descriptor


def read_own(path: Path, most: int) -> bytes:
    """The content of such a file, which may hold `most` bytes; errors as of `open_own`."""
    with os.fdopen(open_own(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OutputError(f"{path}: expected at most {most:,} bytes; delete the folder and start anew")
        return file.read(most)


def _foreign(path: Path) -> str:
    return (
        f"{path}: expected a file made by llama4-quant, found a link, folder, device or shared file; find out who put "
        "it there, and delete the folder"
    )


def write_behind(descriptor: int, start: int = 0, nbytes: int = 0) -> None:
    """Have the kernel write what is dirty in a range now, without waiting, and give up what is clean; 0 is to the end.

    So the disk works while we compute, the last sync is short, and the output takes little of the page cache: new
    pages cost more time than writing to pages that were just given up.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # advice: a file system may not know it
            os.posix_fadvise(descriptor, start, nbytes, os.POSIX_FADV_DONTNEED)


def reopen_direct(descriptor: int) -> int | None:
    """The same file once more, for writing past the kernel's cache; None where the system or file system cannot."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A new, empty file at `path`; a link there is not followed."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def replace_durably(path: Path, data: bytes) -> None:
    """Put `data` at `path`, so that a kill or a crash at any moment leaves what was there or all of `data`."""
    new = path.with_name(f"{path.name}.new")
    with replacing(new) as descriptor:
        write_from(descriptor, memoryview(data), 0)
        os.fsync(descriptor)
    new.replace(path)
    sync_folder(path.parent)


def has_size(path: Path, nbytes: int) -> bool:
    """Whether a regular file of this size is at `path`."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size == nbytes


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
