"""How much memory this process has held."""

import re
import resource
from pathlib import Path


def peak_memory() -> int:
    """The most resident memory of this process so far, in bytes; pages of mapped files that were read count too."""
    try:
        # ru_maxrss would begin with what the process was forked from.
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
