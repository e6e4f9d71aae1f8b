"""Running hostile input: in another process, with limits, and with a look at every file before and after."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT = 60.0
"""Seconds of waiting after which a process counts as hanging, on a machine however busy."""


class HangError(Exception):
    """No answer in time; the process has been killed."""


class CrashError(Exception):
    """The process died."""


class Process:
    """A worker script that answers lines of JSON with lines of JSON."""

    def __init__(self, script: str, *arguments: str) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",  # each arena of a thread maps 64 MB that it does not use
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-u", str(Path(__file__).with_name(script)), *arguments]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._buffer = b""
        self.greeting = self.read(TIMEOUT * 3)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ask(self, request: Mapping[str, Any], timeout: float = TIMEOUT) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            HangError: no answer in time.
            CrashError: the process died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as problem:
            raise CrashError(f"exit code {self._process.wait()}") from problem
        return self.read(timeout)

    def read(self, timeout: float = TIMEOUT) -> dict[str, Any]:
        """The next line; errors as of `ask`."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            if not select.select([descriptor], [], [], timeout)[0]:
                self.kill()
                raise HangError(f"no answer in {timeout:g} s")
            data = os.read(descriptor, 2**16)
            if not data:
                raise CrashError(f"exit code {self._process.wait()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it in order."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()


@dataclass(frozen=True, slots=True)
class Entry:
    """What a path is: kind and permissions, size, time of change, and content or target."""

    mode: int
    size: int
    changed_ns: int
    content: str


def snapshot(folder: Path, leave_out: str | None = None) -> dict[str, Entry]:
    """Everything below a folder but one entry of it; links are not followed, pipes not opened."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if leave_out is not None and (name == leave_out or name.startswith(f"{leave_out}/")):
            continue
        status = path.lstat()
        size = 0 if path.is_dir() and not path.is_symlink() else status.st_size
        found[name] = Entry(status.st_mode, size, status.st_mtime_ns, _content(path, status.st_size))
    return found


def _content(path: Path, size: int) -> str:
    if path.is_symlink():
        return str(path.readlink())
    if path.is_file() and size < 2**26:  # larger ones are sparse; their time of change has to do
        return sha256(path.read_bytes()).hexdigest()
    return ""
