"""What another busy process costs: products of a decoding step while some cores are taken.

    python tests/benchmarks/busy.py [--busy 1] [--rounds 200] [--output FILE.json]

A step is forty int4 products with one row of activations, [4096, 5120], each reading its weight from memory, with
as many threads as cores; after each the first thread goes on alone for a tenth of a millisecond, as in a model. It runs
alone, and beside --busy processes that only count, with the patience of threads that llama4_quant sets (threads.py)
and with libgomp's own. Each row is a process of its own. The limit: with n cores and b other processes as important as
ours, ours gets n / (n + b) of the machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from synthetic import circumstances

from llama4_quant import threads
from llama4_quant.ops import native

PRODUCTS = 40
SHAPE = (4096, 5120)
ALONE = 1e-4
"""Seconds."""
PATIENCE = {"ours": str(threads.SPINS), "libgomp's own": "300000"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=1, help="processes that take a core each")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(steps(options.rounds)))
        return
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores; of them a fair share beside {options.busy}: {cores / (cores + options.busy):.0%}")
    print(f"{'threads wait':15} {'beside':>6} {'best ms':>8} {'median':>8} {'tenth worst':>11}")
    rows = []
    for num_busy in (0, options.busy):
        for name, spins in PATIENCE.items():
            with counting(num_busy):
                found = measured(spins, options.rounds)
            best, median, bad = (found[int(share * (len(found) - 1))] * 1e3 for share in (0, 0.5, 0.9))
            print(f"{name:15} {num_busy:6} {best:8.1f} {median:8.1f} {bad:11.1f}", flush=True)
            rows.append({"spins": int(spins), "busy": num_busy, "seconds": found})
    if options.output is not None:
        report: dict[str, Any] = circumstances() | {"results": rows}
        options.output.write_text(json.dumps(report) + "\n", encoding="utf-8")


def measured(spins: str, rounds: int) -> list[float]:
    """Seconds of each step, shortest first, in a process whose threads wait so long."""
    command = [sys.executable, __file__, "--worker", "--rounds", str(rounds)]
    ran = subprocess.run(
        command, env=os.environ | {"GOMP_SPINCOUNT": spins}, stdout=subprocess.PIPE, check=True, text=True
    )
    found: list[float] = json.loads(ran.stdout.splitlines()[-1])
    return sorted(found)


@contextmanager
def counting(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def steps(rounds: int) -> list[float]:
    outputs, inputs = SHAPE
    packed = torch.randint(0, 2**31 - 1, (PRODUCTS, outputs, inputs // 8), dtype=torch.int32)
    scale = torch.full((outputs, inputs // 128), 0.01, dtype=torch.bfloat16)
    x = torch.randn(1, inputs).bfloat16()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for weight in packed:
            native.linear_int4(x, weight, scale)
            goes_on = time.perf_counter() + ALONE
            while time.perf_counter() < goes_on:
                pass
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
