"""Locks on a staging folder: who writes to it, and whose turn it is to change it as a whole.

All are `flock` on files in the folder, so the kernel releases them when their holder dies, however it dies. A process
that works alone holds `lock` exclusively; processes of one launch that work together share it. `turn` is held for
moments: to set the folder up, and to publish it.

On several machines that takes a file system that passes `flock` on to all of them. Where it does not, a holder on
another machine is told from a dead one by its pulse (pulse.py), and torchrun's processes try it out before they begin
(`see_locks`).
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from llama4_quant.checkpoint.files import open_own
from llama4_quant.checkpoint.machine import boot_id, host_name
from llama4_quant.checkpoint.pulse import Pulse, is_alive
from llama4_quant.errors import OutputError

LOCK_NAME = "lock"
TURN_NAME = "turn"
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_MAX_SIGNATURE_BYTES = 500


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
        self._pulse: Pulse | None = None
        try:
            self.alone = self._take(together=together)
            self._pulse = Pulse(self._descriptor)
        except BaseException:
            self._give_up()
            raise

    def share(self) -> None:
        """Let other processes of this launch in."""
        if not self._try(fcntl.LOCK_SH):
            raise OutputError(f"{self._path.parent.parent}: another process has just begun to write to this folder")

    def is_alone(self) -> bool:
        """Whether no other process works here now; nobody can join while this is true, until `share`."""
        return self._try(fcntl.LOCK_EX)

    def close(self) -> None:
        """Release the lock; if nobody else holds it, without the signature by which a holder that died is known."""
        if self._descriptor is not None and self.is_alone():
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
        self._give_up()

    def _give_up(self) -> None:
        if self._pulse is not None:
            self._pulse.stop()
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _take(self, *, together: bool) -> bool:
        """Get the lock; whether nobody else has it."""
        assert self._descriptor is not None
        out, (holder, boot) = self._path.parent.parent, _signature(self._descriptor)
        if not self._try(fcntl.LOCK_EX):
            if together and self._try(fcntl.LOCK_SH):
                return False
            raise OutputError(
                f"{out}: another process is writing to this folder ({holder}); wait for it, stop it there, or choose "
                "another folder"
            )
        # Nobody holds it as far as this machine can see; is the one on another machine who signed it really dead?
        if boot not in {"", boot_id()} and is_alive(self._path):
            raise OutputError(
                f"{out}: another process is writing to this folder ({holder}), and this file system does not pass its "
                f"lock on to {host_name()}; wait for it, stop it there, or choose another folder"
            )
        _sign(self._descriptor)
        return True

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
    """Take a lock, or say that somebody else has it.

    Raises:
        OutputError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as problem:
        if problem.errno not in _NO_LOCKS:
            raise
        raise OutputError(
            f"{Path(f'/proc/self/fd/{descriptor}').readlink()}: this file system has no file locks (flock: "
            f"{problem.strerror}), and without them two conversions could write to one folder; mount it with locks "
            "(Lustre: -o flock; NFS: without nolock), or choose a folder on another one"
        ) from problem
    return True


def see_locks(path: Path) -> bool | None:
    """Whether a lock that another process holds on a file is seen from here; None if the file is not there."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        return not try_lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """A file that exists and is locked until the end."""
    descriptor = _open(path)
    try:
        if not try_lock(descriptor, fcntl.LOCK_EX):
            raise OutputError(f"{path}: another process holds this lock; stop it, and start all processes again")
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def is_still(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at `path`, and not one that its last owner has just deleted."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _open(path: Path) -> int:
    return open_own(path, os.O_RDWR | os.O_CREAT)


def _sign(descriptor: int) -> None:
    text = f"process {os.getpid()} on {host_name()}\n{boot_id()}\n".encode()
    with suppress(OSError):  # a full disk must not matter here
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)


def _signature(descriptor: int) -> tuple[str, str]:
    """Who signed the lock, and the boot id of that machine; the latter empty if nobody has."""
    text = os.pread(descriptor, _MAX_SIGNATURE_BYTES, 0).decode("utf-8", "replace")
    holder, _, boot = text.removesuffix("\n").partition("\n")
    return (holder, boot) if holder and holder.isprintable() else ("an unknown process", boot)
