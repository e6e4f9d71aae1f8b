"""One conversion each, that is killed or runs out of disk at a random moment, or is finished before that.

Forking saves importing torch for every conversion, so that a hundred of them take minutes. An attempt says whether the
output was finished.
"""

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from resilience.resilience_tools import STAGING, num_finished, start

from llama4_quant.checkpoint import files
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.run import Conversion
from llama4_quant.errors import OutputError
from llama4_quant.work import WorkItem

SCHEMES = {"compressed-tensors": "W4A16", "meta-fp8": "FP8_DYNAMIC"}
LAST_FILES = {"compressed-tensors": "config.json", "meta-fp8": "params.json"}
SHARD_SIZE = 200_000
SECONDS_PER_ITEM = 0.02
NUM_WORKERS = 2
NO_SPACE = 4
BALLAST = "ballast"
SECONDS_OF_SET_UP = 0.2
SECONDS_OF_PUBLISHING = 0.003


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is converted, to where, in which format, and in how many items."""

    source: Path
    out: Path
    storage: str
    num_items: int = 0

    def convert(self, **settings: object) -> None:
        """Do it, or continue it."""
        scheme = SCHEMES[self.storage]
        convert(self.source, self.out, scheme=scheme, format=self.storage, max_shard_size=SHARD_SIZE, **settings)

    def is_finished(self) -> bool:
        """Whether the output looks finished."""
        return (self.out / LAST_FILES[self.storage]).exists()


def kill_process(work: Work, rng: random.Random) -> bool:
    """kill -9 of a process with two threads."""
    before = num_finished(work.out)
    pid = fork(lambda: converting(work))
    wait_for_a_moment(lambda: has_ended(pid), work, before, rng)
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in {0, -signal.SIGKILL}, status
    return work.is_finished()


def kill_torchrun(work: Work, rng: random.Random) -> bool:
    """kill -9 of one rank of two, or of torchrun and both."""
    settings = ("--scheme", SCHEMES[work.storage], "--format", work.storage, "--max-shard-size", SHARD_SIZE)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    before = num_finished(work.out)
    process = start("run", work.source, work.out, SECONDS_PER_ITEM, *settings, "--workers", 1, launcher=launcher)
    wait_for_a_moment(lambda: process.poll() is not None, work, before, rng)
    ranks = children(process.pid)
    for pid in [rng.choice(ranks)] if ranks and rng.random() < 0.5 else [process.pid, *ranks]:
        kill(pid)
    process.communicate(timeout=120)
    for pid in ranks:  # of torchrun that was killed between starting one and the other
        kill(pid)
    return work.is_finished()


def wait_for_a_moment(ended: Callable[[], bool], work: Work, before: int, rng: random.Random) -> None:
    """A random moment while the next third of the items is done; or while the output is published; seldom before."""
    if rng.random() < 0.05:
        wait_until(ended, rng.uniform(0, SECONDS_OF_SET_UP))
        return
    target = before + rng.randrange(1, work.num_items // 3)
    if target <= work.num_items:
        wait_until(lambda: ended() or num_finished(work.out) >= target)
        time.sleep(rng.uniform(0, SECONDS_PER_ITEM))
    elif rng.random() < 0.5:
        wait_until(lambda: ended() or (work.out / STAGING / "publishing").exists())
        time.sleep(rng.uniform(0, SECONDS_OF_PUBLISHING))
    else:
        wait_until(ended)


def has_ended(pid: int) -> bool:
    """Whether a child has ended; it may still be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def full_disk(work: Work, rng: random.Random) -> bool:
    """Something else fills the disk before a random item; afterwards that is deleted."""
    ballast, room = work.out.parent / BALLAST, rng.randrange(40_000)
    left = rng.randrange(work.num_items // 3)
    reserves = rng.random() < 0.5

    def do(self: Conversion, item: WorkItem, buffer: object) -> None:
        nonlocal left
        left -= 1
        if left < 0 and not ballast.exists():
            fill(ballast, room)
        original(self, item, buffer)

    def disturbed() -> None:
        Conversion._do = do
        if not reserves:
            files.fallocate = cannot_reserve
        if rng.random() < 0.1:
            fill(ballast, room)
        work.convert(workers=NUM_WORKERS)

    original = Conversion._do
    status = os.waitstatus_to_exitcode(os.waitpid(fork(disturbed), 0)[1])
    ballast.unlink(missing_ok=True)
    assert status in {0, NO_SPACE}, status
    assert (status == 0) == work.is_finished()
    return status == 0


def converting(work: Work) -> None:
    """Convert, with items that take a little longer."""
    do = Conversion._do

    def slow(self: Conversion, item: WorkItem, buffer: object) -> None:
        time.sleep(SECONDS_PER_ITEM)
        do(self, item, buffer)

    Conversion._do = slow
    work.convert(workers=NUM_WORKERS)


def fork(action: Callable[[], None]) -> int:
    """Do something in a child: it ends with 0, with NO_SPACE if that was the error, or with 1."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        action()
        status = 0
    except OutputError as error:
        status = NO_SPACE if "no space left" in str(error) else 1
        sys.stderr.write(f"{error}\n" if status == 1 else "")
    except BaseException as error:  # noqa: BLE001 - the child has to end here
        sys.stderr.write(f"{error!r}\n")
    finally:
        os._exit(status)


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Until the condition is true, or the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(0.0005)


def fill(path: Path, room: int) -> None:
    """Take all space but `room` bytes."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as problem:
            if problem.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, file.tell() - room))


def cannot_reserve(*_: object) -> None:
    """What `fallocate` says on a file system that cannot."""
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def kill(pid: int) -> None:
    """kill -9, if it is still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
