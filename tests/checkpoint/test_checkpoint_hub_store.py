"""The bound on shards, without a network: fetching is a function that the test controls."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from llama4_quant.checkpoint.shard_store import ShardStore
from llama4_quant.errors import CheckpointError

NAMES = ("a", "b", "c", "d", "e")
SIZE = 10


class Disk:
    """Shards that are there; `log` has every fetch and drop; fetching waits while `gate` is closed."""

    def __init__(self, present: tuple[str, ...] = ()) -> None:
        self.present = set(present)
        self.most = 0
        self.log: list[str] = []
        self.failing: dict[str, int] = {}
        self.gate = threading.Event()
        self.gate.set()

    def fetch(self, name: str) -> None:
        self.log.append(f"+{name}")
        self.present.add(name)  # a shard on its way takes room too
        self.most = max(self.most, len(self.present))
        assert self.gate.wait(10)
        if self.failing.get(name):
            self.failing[name] -= 1
            self.present.discard(name)
            raise CheckpointError(f"{name} is lost")

    def drop(self, name: str) -> None:
        self.log.append(f"-{name}")
        self.present.remove(name)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


Make = Callable[..., ShardStore]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[ShardStore] = []

    def store(
        disk: Disk,
        num_shards: int = 2,
        leftover: tuple[str, ...] = (),
        names: tuple[str, ...] = NAMES,
        patience: float = 0.0,
    ) -> ShardStore:
        made.append(ShardStore(disk.fetch, disk.drop, num_shards, leftover, patience))
        made[-1].expect((name, SIZE) for name in names)
        return made[-1]

    yield store
    for store_made in made:
        store_made.close()


def read(store: ShardStore, name: str, disk: Disk, nbytes: int = SIZE) -> None:
    with store.held(name, nbytes):
        assert name in disk.present


@pytest.mark.parametrize("num_shards", [1, 2, 3, 9])
def test_in_order_every_shard_is_fetched_once_and_dropped_when_read(make: Make, num_shards: int) -> None:
    disk = Disk()
    store = make(disk, num_shards)
    for name in NAMES:
        for _ in range(2):
            read(store, name, disk, SIZE // 2)
    assert sorted(disk.log) == sorted([f"{sign}{name}" for name in NAMES for sign in "+-"])
    assert disk.most <= num_shards
    assert disk.present == set()


def test_the_next_shard_is_fetched_while_this_one_is_read(make: Make) -> None:
    disk = Disk()
    store = make(disk)
    with store.held("a", SIZE):
        until(lambda: disk.log == ["+a", "+b"])
    until(lambda: disk.log == ["+a", "+b", "-a", "+c"])  # room for the one after
    assert disk.present == {"b", "c"}


def test_nothing_is_fetched_before_it_is_needed(make: Make) -> None:
    disk = Disk()
    make(disk)
    time.sleep(0.02)
    assert disk.log == []


def test_out_of_order_costs_the_shard_used_least_recently(make: Make) -> None:
    disk = Disk()
    store = make(disk)
    read(store, "a", disk, 1)
    until(lambda: disk.present == {"a", "b"})
    read(store, "b", disk, 1)
    read(store, "a", disk, 1)
    read(store, "e", disk, 1)
    assert disk.present == {"a", "e"}
    read(store, "b", disk, SIZE - 1)
    assert disk.most == 2


def test_a_shard_with_reads_to_come_is_waited_for(make: Make) -> None:
    """A thread has taken work on `a` and not come to it yet, while others are done with `b` and ask for `c`."""
    disk = Disk()
    store = make(disk, patience=60.0)
    read(store, "a", disk, 1)
    until(lambda: disk.present == {"a", "b"})
    with ThreadPoolExecutor(1) as pool, store.held("b", SIZE):
        ahead = pool.submit(read, store, "c", disk)
        time.sleep(0.02)
        assert disk.present == {"a", "b"}
        read(store, "a", disk, SIZE - 1)
        ahead.result(timeout=10)
    assert disk.log.count("+a") == 1


def test_waiting_for_reads_ends(make: Make) -> None:
    disk = Disk()
    store = make(disk, patience=0.05)
    read(store, "a", disk, 1)
    until(lambda: disk.present == {"a", "b"})
    read(store, "d", disk, 1)
    assert disk.present == {"a", "d"}


def test_a_shard_that_was_read_can_be_read_again_and_then_stays(make: Make) -> None:
    disk = Disk()
    store = make(disk, names=("a",))
    read(store, "a", disk)
    assert disk.present == set()
    for _ in range(3):
        read(store, "a", disk)
    assert disk.log == ["+a", "-a", "+a"]


def test_shards_that_are_not_expected_are_not_fetched_ahead(make: Make) -> None:
    disk = Disk()
    store = make(disk, names=("a", "d"))
    read(store, "a", disk, 1)
    until(lambda: disk.log == ["+a", "+d"])
    store.expect([("a", SIZE)])
    until(lambda: disk.log == ["+a", "+d", "-d"])
    store.done("a")
    assert disk.present == set()


def test_what_is_done_is_dropped_and_makes_room(make: Make) -> None:
    disk = Disk()
    store = make(disk)
    read(store, "a", disk, 1)
    store.done("c")
    until(lambda: disk.present == {"a", "b"})
    store.done("a")
    until(lambda: disk.present == {"b", "d"})
    assert disk.log == ["+a", "+b", "-a", "+d"]


def test_leftovers_are_used_if_needed_and_dropped_if_not(make: Make) -> None:
    disk = Disk(("b", "c", "e"))
    store = make(disk, leftover=("b", "c", "e"), names=("c", "d", "e"))
    assert disk.log == []
    read(store, "c", disk)
    until(lambda: disk.present == {"d", "e"})
    assert disk.log[0] == "-b"
    assert disk.log.count("-e") == 0


def test_an_error_reaches_who_waits_and_the_next_try_starts_anew(make: Make) -> None:
    disk = Disk()
    disk.failing = {"a": 1}
    store = make(disk, 1)
    with pytest.raises(CheckpointError, match="a is lost"):
        read(store, "a", disk)
    read(store, "a", disk)
    assert disk.log == ["+a", "+a", "-a"]


def test_an_error_while_fetching_ahead_is_forgotten_when_the_shard_is_needed(make: Make) -> None:
    disk = Disk()
    disk.failing = {"b": 1}
    store = make(disk)
    with store.held("a", SIZE):
        until(lambda: disk.failing["b"] == 0)
    read(store, "b", disk)


def test_a_failed_read_does_not_count(make: Make) -> None:
    disk = Disk()
    store = make(disk, 1)
    with pytest.raises(ZeroDivisionError), store.held("a", SIZE):
        _ = 1 / 0
    assert disk.present == {"a"}


def test_closing_frees_who_waits_and_does_not_wait_for_the_network(make: Make) -> None:
    disk = Disk()
    disk.gate.clear()
    store = make(disk)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(read, store, "a", disk)
        until(lambda: disk.log == ["+a"])
        start = time.monotonic()
        store.close(seconds=0.01)
        with pytest.raises(CheckpointError, match="a: the checkpoint is closed"):
            waiting.result(timeout=10)
        assert time.monotonic() - start < 5  # the gate opens after 10
        disk.gate.set()


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_many_threads_in_any_order_stay_within_the_bound(make: Make, num_shards: int) -> None:
    disk = Disk()
    store = make(disk, num_shards)
    work = [name for name in NAMES for _ in range(20)]
    random.Random(0).shuffle(work)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: read(store, name, disk, 1), work, timeout=60))
    assert disk.most <= num_shards
