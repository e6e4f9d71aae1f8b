"""A bounded number of shards at hand, each fetched when it is first needed and dropped when it has been read.

While one shard is in use the next one is fetched in the background. Which shards will be needed, in which order, and
how many bytes of each will be read is announced by `expect`; a shard whose bytes have all been read is dropped at
once. A shard that is asked for out of order is fetched too, at the cost of the one that was used least recently:
order and announcement decide how fast this is, not whether it is right. A shard that has announced reads left is given
up last, and only after a while: most often a thread has just not come to them yet, and downloading it again is dear.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from queue import SimpleQueue

from llama4_quant.errors import CheckpointError


class _State(Enum):
    ABSENT = auto()
    FETCHING = auto()
    READY = auto()


_UNANNOUNCED = sys.maxsize
"""Bytes still to be read of a shard that is needed though nobody announced it: it stays until its room is needed."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Shard:
    """`left`: bytes still to be read; `used`: when it was asked for last, counted in requests."""

    name: str
    state: _State = _State.ABSENT
    left: int = 0
    num_users: int = 0
    used: int = 0
    error: Exception | None = None


class ShardStore:
    """At most `num_shards` shards at a time; thread-safe."""

    def __init__(
        self,
        fetch: Callable[[str], None],
        drop: Callable[[str], None],
        num_shards: int,
        leftover: Iterable[str] = (),
        patience: float = 0.0,
    ) -> None:
        """Nothing is fetched before the first `held`.

        Args:
            fetch: makes a shard usable; it may take long, runs in a thread of its own, one shard at a time.
            drop: gives up a shard that `fetch` made usable, or one of `leftover`; quick.
            num_shards: how many shards there may be, those on their way included.
            leftover: shards that are there from earlier; `fetch` is quick for them.
            patience: seconds to wait for announced reads of other shards before one of these is given up.
        """
        assert num_shards >= 1
        self._fetch, self._drop, self._num_shards = fetch, drop, num_shards
        self._shards: dict[str, _Shard] = {}
        self._order: list[_Shard] = []
        self._leftover = sorted(leftover)
        self._patience = patience
        self._num_requests = 0
        self._changed = threading.Condition()
        self._closed = False
        self._queue: SimpleQueue[_Shard | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._fetch_all, name="shard-download", daemon=True)
        self._thread.start()

    def expect(self, reads: Iterable[tuple[str, int]]) -> None:
        """Announce all reads to come, as (shard, bytes), in their order; replaces what was announced before."""
        with self._changed:
            for shard in self._shards.values():
                shard.left = 0
            for name, nbytes in reads:
                self._shard(name).left += nbytes
            self._order = [shard for shard in self._shards.values() if shard.left > 0]
            for shard in self._shards.values():
                self._drop_if_read(shard)

    def done(self, name: str) -> None:
        """Announce that a shard will not be needed any more."""
        with self._changed:
            shard = self._shard(name)
            shard.left = 0
            self._drop_if_read(shard)
            self._fetch_ahead(shard)

    @contextmanager
    def held(self, name: str, nbytes: int) -> Iterator[None]:
        """Keep a shard usable while `nbytes` of it are read; waits until it is.

        Raises:
            CheckpointError: whatever `fetch` raised, or the store is closed.
        """
        with self._changed:
            self._adopt()
            shard = self._shard(name)
            shard.num_users += 1
            try:
                self._wait_for(shard)
            except BaseException:
                shard.num_users -= 1
                raise
            self._fetch_ahead(shard)
        read = 0
        try:
            yield
            read = nbytes
        finally:
            with self._changed:
                shard.num_users -= 1
                shard.left -= read
                self._drop_if_read(shard)
                self._fetch_ahead(shard)
                self._changed.notify_all()  # it may be the one to make room

    def close(self, seconds: float = 1.0) -> None:
        """Fetch nothing more; waits a moment for what is on its way. Shards that are at hand stay as they are."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._queue.put(None)
        self._thread.join(seconds)

    def _shard(self, name: str) -> _Shard:
        return self._shards.setdefault(name, _Shard(name=name))

    def _adopt(self) -> None:
        """Take over what is there from earlier, as far as it is needed."""
        for name in self._leftover:
            shard = self._shard(name)
            if shard.left > 0 and self._num_present() < self._num_shards:
                self._start(shard)
            else:
                self._drop(name)
        self._leftover = []

    def _wait_for(self, shard: _Shard) -> None:
        self._num_requests += 1
        shard.used = self._num_requests
        if shard.state is _State.ABSENT:
            shard.error = None  # of fetching ahead: that was some time ago
            shard.left = shard.left if shard.left > 0 else _UNANNOUNCED
        give_up_at = time.monotonic() + self._patience
        while shard.state is not _State.READY:
            if self._closed:
                raise CheckpointError(f"{shard.name}: the checkpoint is closed; read inside its `with` block")
            if shard.error is not None:
                raise shard.error
            left = give_up_at - time.monotonic()
            if shard.state is _State.ABSENT and self._make_room(patient=left > 0):
                self._start(shard)
            self._changed.wait(left if shard.state is _State.ABSENT and left > 0 else None)

    def _num_present(self) -> int:
        return sum(shard.state is not _State.ABSENT for shard in self._shards.values())

    def _make_room(self, *, patient: bool) -> bool:
        if self._num_present() < self._num_shards:
            return True
        idle = [shard for shard in self._shards.values() if shard.state is _State.READY and not shard.num_users]
        if patient:
            idle = [shard for shard in idle if not 0 < shard.left < _UNANNOUNCED]
        if idle:
            self._discard(min(idle, key=lambda shard: shard.used))
        return bool(idle)

    def _start(self, shard: _Shard) -> None:
        shard.state, shard.error = _State.FETCHING, None
        self._queue.put(shard)

    def _fetch_ahead(self, shard: _Shard) -> None:
        """Use free room for the shards that come after this one."""
        position = self._order.index(shard) + 1 if shard in self._order else 0
        for following in self._order[position:]:
            if self._closed or self._num_present() >= self._num_shards:
                return
            if following.state is _State.ABSENT and following.left > 0 and following.error is None:
                self._start(following)

    def _drop_if_read(self, shard: _Shard) -> None:
        if shard.left <= 0 and shard.state is _State.READY and not shard.num_users:
            self._discard(shard)

    def _discard(self, shard: _Shard) -> None:
        shard.state = _State.ABSENT
        self._drop(shard.name)
        self._changed.notify_all()

    def _fetch_all(self) -> None:
        while (shard := self._queue.get()) is not None and not self._closed:
            error = None
            try:
                self._fetch(shard.name)
            except Exception as problem:  # noqa: BLE001 - raised by whoever waits for this shard
                error = problem
            with self._changed:
                shard.state, shard.error = (_State.READY, None) if error is None else (_State.ABSENT, error)
                self._changed.notify_all()
