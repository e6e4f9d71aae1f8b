"""Runs conversions in forked children and treats them badly; started by the tests as a process of its own.

Forking saves importing torch for every run, so that hundreds of kills take minutes. Every item is slowed down, so that
a random moment falls into the work rather than into what comes before and after it.

    python driver.py storm SOURCE OUT NUM_KILLS SEED WORLD_SIZE SECONDS_PER_ITEM FORMAT
    python driver.py run SOURCE OUT SECONDS_PER_ITEM [CONVERT ARGUMENT...]
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from llama4_quant.checkpoint.resume import FINGERPRINT_NAME
from llama4_quant.cli.main import main
from llama4_quant.conversion import Conversion
from llama4_quant.convert import convert

SCHEMES = {"compressed-tensors": "W4A16", "meta-fp8": "FP8_DYNAMIC"}
LAST_FILES = {"compressed-tensors": "config.json", "meta-fp8": "params.json"}
SHARD_SIZE = 200_000
GRACE_SECONDS = 2.0


def slow_down(seconds: float) -> None:
    do = Conversion._do

    def slow(self: Conversion, item: object, buffer: torch.Tensor) -> None:
        time.sleep(seconds)
        do(self, item, buffer)

    Conversion._do = slow


def child(source: Path, out: Path, storage: str, rank: int, world_size: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        if world_size > 1:
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )
        convert(source, out, scheme=SCHEMES[storage], format=storage, max_shard_size=SHARD_SIZE, workers=2)
        status = 0
    except SystemExit as stop:
        status = int(stop.code)
    except BaseException as error:  # noqa: BLE001 - the parent kills; complaints of the survivors are expected
        status = 3 if world_size > 1 else 1
        if world_size == 1:
            sys.stderr.write(f"{error!r}\n")
    finally:
        os._exit(status)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end(pids: list[int]) -> list[int]:
    """Wait for all, as torchrun does when it gives up: SIGTERM, and SIGKILL some time later."""
    statuses, deadline = [], time.monotonic() + GRACE_SECONDS
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    for pid in pids:
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses.append(os.waitstatus_to_exitcode(status))
                break
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
    return statuses


def attempt(
    source: Path, out: Path, storage: str, world_size: int, kill_after: float | None = None, victim: int = 0
) -> bool | None:
    """One launch. True: it finished; None: it was killed before that; otherwise this raises."""
    port = free_port()
    pids = [child(source, out, storage, rank, world_size, port) for rank in range(world_size)]
    if kill_after is None:
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert statuses == [0] * world_size, statuses
        return True
    time.sleep(kill_after)
    os.kill(pids[victim], signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(pids[victim], 0)[1])
    statuses = end([pid for pid in pids if pid != pids[victim]])
    # 3: torch's rendezvous failed before the kill, as when another program took the port in the meantime.
    assert killed in {0, -signal.SIGKILL} | ({3} if world_size > 1 else set()), killed
    assert set(statuses) <= {0, 3, 143, -signal.SIGKILL}, statuses
    return True if (out / LAST_FILES[storage]).exists() else None


def contents(out: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in out.iterdir()
        if path.is_file() and path.name != "quantization_report.json"
    }


def storm(source: Path, out: Path, num_kills: int, seed: int, world_size: int, storage: str) -> dict[str, int]:
    """Kill at random moments until it was often enough; every output that is finished in between must be right."""
    rng = random.Random(seed)
    reference = out.with_name("reference")
    started = time.monotonic()
    attempt(source, reference, storage, world_size)
    seconds = time.monotonic() - started
    expected = contents(reference)
    counts = {"kills": 0, "finished": 0, "resumed": 0}
    while counts["kills"] < num_kills:
        counts["resumed"] += (out / ".llama4-quant-partial" / FINGERPRINT_NAME).exists()
        finished = attempt(source, out, storage, world_size, rng.uniform(0, seconds / 2), rng.randrange(world_size))
        counts["kills"] += finished is None
        if finished:
            check(out, expected, counts)
        else:
            assert not (out / LAST_FILES[storage]).exists()
    attempt(source, out, storage, world_size)
    check(out, expected, counts)
    return counts


def check(out: Path, expected: dict[str, bytes], counts: dict[str, int]) -> None:
    found = contents(out)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert all(found[name] == expected[name] for name in expected), [n for n in expected if found[n] != expected[n]]
    counts["finished"] += 1
    # What is killed after config.json is in place has left a staging folder at most.
    shutil.rmtree(out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    what, source, out, *rest = sys.argv[1:]
    if what == "storm":
        num_kills, seed, world_size = map(int, rest[:3])
        slow_down(float(rest[3]))
        print(json.dumps(storm(Path(source), Path(out), num_kills, seed, world_size, rest[4])))
    else:
        slow_down(float(rest[0]))
        sys.argv = ["llama4-quant", "convert", source, "-o", out, *rest[1:]]
        main()
