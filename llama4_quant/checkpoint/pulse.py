"""A sign of life on a lock file, for machines that do not see each other's locks.

`flock` is the lock, and the kernel releases it when its holder dies, however it dies. But not every shared file system
passes `flock` on to other machines, and some accept it and do nothing. So a holder also touches its lock file every few
seconds. Who has got the lock of a holder on another machine (or before a reboot) watches the file for a while first: if
it is touched, that holder lives, and the lock means nothing on this file system.
"""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

SECONDS_BETWEEN_PULSES = 2.0
SECONDS_TO_WATCH = 10.0
"""Several pulses, since a busy file server may delay one."""
_SECONDS_BETWEEN_LOOKS = 0.5


class Pulse:
    """Touches an open file until it is stopped, in a thread of its own.

    The time of change goes to a file server at once, where content would wait to be written back.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock-pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop, and wait until the file is not touched any more."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_PULSES):
            with suppress(OSError):  # the next one may succeed
                os.utime(self._descriptor)


def is_alive(path: Path) -> bool:
    """Whether somebody touches the file; takes `SECONDS_TO_WATCH` to say no."""
    first, deadline = _changed(path), time.monotonic() + SECONDS_TO_WATCH
    while time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        if _changed(path) != first:
            return True
    return False


def _changed(path: Path) -> int:
    # Opened each time: a network file system asks its server then, and may answer `stat` from memory.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)
