"""How fast this machine reads memory: `python -m runtime_kit.worker_bandwidth JOB.json RESULT.json`.

All threads read one buffer from end to end, each its own part, in several plain ways: torch's sum over int64 and over
float32, and the C library's memchr for a byte that is not there. The buffer is in huge pages where the kernel gives
them. The best round of the best way counts. A smaller buffer, read over and over, shows what caches hold.
"""

import ctypes
import json
import mmap
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .loop import read_job


def huge_buffer(num_bytes: int) -> Tensor:
    """Zeros, all pages touched."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).zero_()


def memchr_on(pool: ThreadPoolExecutor, threads: int) -> Callable[[Tensor], object]:
    """A reader by the C library."""
    find = ctypes.CDLL(None).memchr
    find.restype, find.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)

    def read(buffer: Tensor) -> object:
        part = buffer.numel() // threads
        starts = [buffer.data_ptr() + index * part for index in range(threads)]
        return list(pool.map(lambda start: find(start, 1, part), starts))

    return read


def best(read: Callable[[Tensor], object], buffer: Tensor, rounds: int) -> float:
    """Bytes per second of the best round."""
    read(buffer)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        read(buffer)
        seconds.append(time.perf_counter() - start)
    return buffer.numel() / min(seconds)


def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    buffer = huge_buffer(max(job["sizes"]))
    with ThreadPoolExecutor(job["threads"]) as pool:
        readers = {
            "torch sum over int64": lambda part: part.view(torch.int64).sum(),
            "torch sum over float32": lambda part: part.view(torch.float32).sum(),
            "memchr": memchr_on(pool, job["threads"]),
        }
        speeds = {
            size: {name: best(read, buffer[:size], job["rounds"]) for name, read in readers.items()}
            for size in job["sizes"]
        }
    Path(sys.argv[2]).write_text(json.dumps({"speeds": speeds}), encoding="utf-8")


if __name__ == "__main__":
    main()
