"""Which machine this is: its name for messages, and the kernel's boot id for decisions."""

import socket
import uuid
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Names this run of the kernel: who shares it sees the same locks and the same unsynced writes.

    Unique each time where the kernel does not tell.
    """
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return uuid.uuid4().hex


def host_name() -> str:
    """The machine's name, for people."""
    return socket.gethostname()
