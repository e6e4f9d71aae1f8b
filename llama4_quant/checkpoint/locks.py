"""Locks on a staging folder: who writes to it, and whose turn it is to change it as a whole.

All are `flock` on files in the folder, so the kernel releases them when their holder dies, however it dies. A process
that works alone holds `lock` exclusively; processes of one launch that work together share it. `turn` is held for
moments: to set the folder up, and to publish it.
"""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Self

from llama4_quant.checkpoint.files import open_own
from llama4_quant.errors import OutputError

LOCK_NAME = "lock"
TURN_NAME = "turn"


class FolderLock:
    """The right of this process to write to a staging folder.

    Attributes:
        alone: whether nobody else held the lock when it was taken.
    """

    def __init__(self, folder: Path, *, together: bool) -> None:
        """Take the lock.

        Args:
            folder: the staging folder; it exists.
            together: share it with other processes of the same launch; otherwise nobody else may hold it.

        Raises:
            OutputError: another conversion holds it; the message names its process and machine.
        """
        self._path = folder / LOCK_NAME
        self._descriptor: int | None = _open(self._path)
        self.alone = self._try(fcntl.LOCK_EX)
        if not self.alone and not (together and self._try(fcntl.LOCK_SH)):
            holder = _holder(self._descriptor)
            self.close()
            raise OutputError(
                f"{folder.parent}: another process is writing to this folder ({holder}); wait for it, or choose another"
            )
        _sign(self._descriptor)

    def share(self) -> None:
        """Let other processes of this launch in."""
        if not self._try(fcntl.LOCK_SH):
            raise OutputError(f"{self._path.parent.parent}: another process has just begun to write to this folder")

    def is_alone(self) -> bool:
        """Whether no other process works here now; nobody can join while this is true, until `share`."""
        return self._try(fcntl.LOCK_EX)

    def close(self) -> None:
        """Release the lock."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _try(self, kind: int) -> bool:
        assert self._descriptor is not None
        return try_lock(self._descriptor, kind) and is_still(self._descriptor, self._path)


class Turn:
    """Waits for its turn, and keeps it until closed; a context manager.

    Attributes:
        here: False if the folder has been published or removed meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = None
        self.here = False
        try:
            self._descriptor = _open(folder / TURN_NAME)
        except FileNotFoundError:
            return
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self.here = is_still(self._descriptor, folder / TURN_NAME)

    def close(self) -> None:
        """Give the turn to whoever waits."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def try_lock(descriptor: int, kind: int) -> bool:
    """Take a lock, or say that somebody else has it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_still(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at `path`, and not one that its last owner has just deleted."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _open(path: Path) -> int:
    return open_own(path, os.O_RDWR | os.O_CREAT)


def _sign(descriptor: int) -> None:
    text = f"process {os.getpid()} on {socket.gethostname()}".encode()
    with suppress(OSError):  # a full disk must not matter here
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)


def _holder(descriptor: int) -> str:
    text = os.pread(descriptor, 200, 0).decode("utf-8", "replace")
    return text if text and text.isprintable() else "an unknown process"
