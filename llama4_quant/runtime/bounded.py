"""Running a program that came with a checkpoint (its chat template) in bounded time and memory.

transformers' sandbox keeps a template from reaching files or code, but not from building a string of 10 GB or looping
for hours, and neither can be stopped inside a process. So the template runs in a copy of this process, made by `fork`,
that has limits of its own, answers through a pipe, and is killed when it takes too long.
"""

import os
import resource
import select
import signal
import time
from collections.abc import Callable
from typing import NoReturn

MAX_SECONDS = 5
"""Of the processor; on the clock five times as many, for a busy machine."""
MAX_MEMORY = 512 * 2**20
"""Over what is mapped at the start."""
MAX_ANSWER_BYTES = 16 * 2**20
"""Some million tokens."""

_GIVEN, _FAILED = b"+", b"-"


class BoundedError(Exception):
    """The function failed, or took too much time or memory; the message says which."""


def bounded(function: Callable[[], str]) -> str:
    """The text that `function` returns when it runs in a copy of this process; what else it does is lost.

    Raises:
        BoundedError: it raised an exception (the message is that exception's), or went beyond a limit.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(function, sender)
    os.close(sender)
    try:
        data = _read(receiver)
    finally:
        os.close(receiver)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    text = data[1:].decode("utf-8", "replace")
    if not data:
        raise BoundedError(f"it took more than {MAX_SECONDS} s or {MAX_MEMORY // 2**20} MiB")
    if data[:1] == _FAILED:
        raise BoundedError(text)
    return text


def _answer(function: Callable[[], str], sender: int) -> NoReturn:
    """The child: everything ends in `_exit`, so that nothing of the parent's runs twice."""
    try:
        _limit()
        try:
            answer = _GIVEN + function().encode("utf-8", "replace")
        except MemoryError:
            answer = _FAILED + f"it took more than {MAX_MEMORY // 2**20} MiB".encode()
        except Exception as problem:  # noqa: BLE001 - what a program of somebody else raises is for the parent to tell
            answer = _FAILED + (str(problem) or type(problem).__name__).encode("utf-8", "replace")
        while answer:
            answer = answer[os.write(sender, answer) :]
    finally:
        os._exit(0)


def _limit() -> None:
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: PTH123, SIM115 - as little as possible after a fork
    most = pages * resource.getpagesize() + MAX_MEMORY
    used = int(time.process_time()) + 1
    for kind, limit in (
        (resource.RLIMIT_AS, most),
        (resource.RLIMIT_CPU, used + MAX_SECONDS),
        (resource.RLIMIT_FSIZE, 0),  # no file of any length; a pipe is none
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _read(receiver: int) -> bytes:
    """All that the child says; nothing if that is not in time."""
    deadline = time.monotonic() + 5 * MAX_SECONDS
    data = b""
    while select.select([receiver], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(receiver, 2**20)
        if not part:
            return data
        data += part
        if len(data) > MAX_ANSWER_BYTES:
            return _FAILED + f"it wrote more than {MAX_ANSWER_BYTES // 2**20} MiB".encode()
    return b""
