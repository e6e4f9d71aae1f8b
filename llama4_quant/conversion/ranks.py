"""Several processes that share one job, started by torchrun: who this one is, and a moment when all of them are there.

The environment says who: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Processes meet over gloo while they set up,
see then that they share the output's folder and its locks, and from there on have nothing to do with each other but
the files in it.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import distributed

from llama4_quant.checkpoint.locks import locked_file, see_locks
from llama4_quant.checkpoint.machine import host_name
from llama4_quant.errors import OutputError, UsageError

SECONDS_FOR_A_FILE_TO_APPEAR = 60.0
"""Network file systems remember for a while that a file was not there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """This process among `world_size`."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Rank":
        """What torchrun says; alone without it.

        Raises:
            UsageError: the variables are not numbers that belong together.
        """
        rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
            raise UsageError(f"RANK={rank} and WORLD_SIZE={world_size} do not belong together; start with torchrun")
        return cls(rank=int(rank), world_size=int(world_size))

    def check_shared(self, folder: Path) -> None:
        """Make sure, inside `meeting`, that all processes see one folder, and each other's locks in it.

        Args:
            folder: is made if need be.

        Raises:
            OutputError: on every process, if that is not so for any of them.
        """
        if self.world_size == 1:
            return
        with ExitStack() as held:
            names: list[str] = [""]
            if self.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                names = [f"meeting-{uuid.uuid4().hex}"]
                held.enter_context(locked_file(folder / names[0]))
            with self._others_needed():
                distributed.broadcast_object_list(names)
                problems: list[str | None] = [None] * self.world_size
                distributed.all_gather_object(problems, None if self.rank == 0 else self._problem(folder / names[0]))
        found = next((problem for problem in problems if problem), None)
        if found is not None:
            raise OutputError(found)

    def _problem(self, path: Path) -> str | None:
        """Why this process cannot work together with process 0, which holds the lock of a file."""
        deadline = time.monotonic() + SECONDS_FOR_A_FILE_TO_APPEAR
        while (seen := see_locks(path)) is None and time.monotonic() < deadline:
            time.sleep(0.5)
        out, who = path.parent.parent, f"process {self.rank} on {host_name()}"
        if seen is None:
            return (
                f"{out}: {who} does not see the folder that process 0 sees under this name; the output has to be on a "
                "file system that all machines share"
            )
        if not seen:
            return (
                f"{out}: {who} does not see the file locks (flock) of process 0: this file system does not pass them "
                "on to other machines; mount it so that it does (NFS: without nolock and local_lock; Lustre: -o "
                "flock), or convert on one machine"
            )
        return None

    @contextmanager
    def meeting(self) -> Iterator[Callable[[], None]]:
        """Connect to the other processes; gives a function that waits until all of them have called it.

        Raises:
            OutputError: another process has ended.
        """
        if self.world_size == 1:
            yield lambda: None
            return
        ours = not distributed.is_initialized()
        if ours:
            with self._others_needed():
                distributed.init_process_group("gloo")
        try:
            yield self._meet
        finally:
            if ours:
                distributed.destroy_process_group()

    def _meet(self) -> None:
        with self._others_needed():
            distributed.barrier()

    @contextmanager
    def _others_needed(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise OutputError(
                f"process {self.rank} of {self.world_size} cannot meet the others: {str(error).splitlines()[0]}"
            ) from error
