"""Running a converter in a process of its own, with its wall time and its peak memory."""

import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.02
LOG_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A process that ended well.

    Attributes:
        seconds: wall time, from start to end: imports, loading, conversion, saving.
        cpu_seconds: of all its threads; unlike `seconds` it hardly depends on what else the machine does.
        peak_bytes: largest resident memory (VmHWM of its own address space, so not what it was forked from); what it
            may gain in its last POLL_SECONDS is missed.
        load_before: the machine's load average over a minute when it started.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    load_before: float


class ChildFailedError(RuntimeError):
    """A process that failed; the message has the last lines of its log."""


def run(
    command: Sequence[str | Path], *, log: Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Finished:
    """Run to the end.

    Args:
        command: program and arguments.
        log: file for stdout and stderr.
        cwd: working directory.
        env: variables besides ours.

    Raises:
        ChildFailedError: it ended with another status than 0.
    """
    load_before = os.getloadavg()[0]
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=output, cwd=cwd, env={**os.environ, **(env or {})}
        )
        watcher = _PeakMemory(process.pid)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    watcher.stop()
    if process.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LOG_LINES:]
        raise ChildFailedError(
            f"status {process.returncode}; the end of {log}:\n" + "\n".join(line[-300:] for line in lines)
        )
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Finished(seconds=seconds, cpu_seconds=cpu_seconds, peak_bytes=watcher.peak_bytes, load_before=load_before)


class _PeakMemory(threading.Thread):
    """Reads a process's high-water mark until it is gone."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            try:
                found = re.search(r"VmHWM:\s*(\d+) kB", self._status.read_text())
            except (FileNotFoundError, ProcessLookupError):
                return
            if found:
                self.peak_bytes = max(self.peak_bytes, int(found[1]) * 1024)

    def stop(self) -> None:
        self._stopped.set()
        self.join()
