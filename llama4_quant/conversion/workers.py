"""Threads that do independent items, each with buffers of its own; stopping lets them finish the items in hand.

Threads suffice, and share memory: torch, file reads and writes, and SHA-256 all release the interpreter's lock.
"""

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
B = TypeVar("B")

SECONDS_BETWEEN_PAUSES = 1.0


class Workers(Generic[T, B]):
    """Does items on some threads, in their order."""

    def __init__(
        self, items: Sequence[T], do: Callable[[T, B], None], *, num_workers: int, new_buffers: Callable[[], B]
    ) -> None:
        """Nothing is started before `run`.

        Args:
            items: what to do.
            do: does one of them, in buffers that the thread reuses for each of its items.
            num_workers: number of threads. The cores that torch would use are shared out among them.
            new_buffers: makes the buffers of a thread; called in that thread.
        """
        self._todo: queue.SimpleQueue[T] = queue.SimpleQueue()
        for item in items:
            self._todo.put(item)
        self._num_items = len(items)
        self._do = do
        self._num_workers = min(num_workers, len(items))
        self._new_buffers = new_buffers
        self._stop = threading.Event()
        self._next_pause = 0.0
        self._done: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()

    def run(self, pause: Callable[[], None], stopping: Callable[[], None] = lambda: None) -> Generator[T, None, None]:
        """Do all items; yields each when it is finished, in no particular order.

        Whatever ends this early (an error in an item, a signal's exception, `close`) lets the items in hand be finished
        first.

        Args:
            pause: called by the waiting thread about every second.
            stopping: called if this ends early, before the items in hand are waited for: what they wait for themselves
                should fail then.

        Raises:
            BaseException: what `do` raised.
        """
        self._next_pause = time.monotonic() + SECONDS_BETWEEN_PAUSES
        num_threads = torch.get_num_threads()
        threads = [
            threading.Thread(target=self._work, args=(max(1, num_threads // self._num_workers),), daemon=True)
            for _ in range(self._num_workers)
        ]
        try:
            for thread in threads:
                thread.start()
            for _ in range(self._num_items):
                yield self._next(pause)
        except BaseException:
            self._stop.set()
            stopping()
            raise
        finally:
            self._stop.set()
            _join(threads)
            torch.set_num_threads(num_threads)

    def _next(self, pause: Callable[[], None]) -> T:
        while True:
            left = self._next_pause - time.monotonic()
            if left <= 0:
                pause()
                self._next_pause = time.monotonic() + SECONDS_BETWEEN_PAUSES
                continue
            try:
                result = self._done.get(timeout=left)
            except queue.Empty:
                continue
            if isinstance(result, BaseException):
                raise result
            return result

    def _work(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)  # of this thread's parallel regions
        try:
            buffers = self._new_buffers()
            while not self._stop.is_set():
                item = self._todo.get_nowait()
                self._do(item, buffers)
                self._done.put(item)
        except queue.Empty:
            return
        except BaseException as error:  # noqa: BLE001 - it is raised where the items are waited for
            self._done.put(error)


def _join(threads: Sequence[threading.Thread]) -> None:
    """Wait for all of them, and let no second signal cut that short: they write to files that are closed next."""
    for thread in threads:
        while thread.is_alive():
            with suppress(KeyboardInterrupt, SystemExit):
                thread.join()
