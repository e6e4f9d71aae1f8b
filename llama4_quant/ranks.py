"""Several processes that share one job, started by torchrun: who this one is, and a moment when all of them are there.

The environment says who: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Processes meet over gloo while they set up, and
then have nothing to do with each other but the files of the output.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import distributed

from llama4_quant.errors import OutputError, UsageError


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
