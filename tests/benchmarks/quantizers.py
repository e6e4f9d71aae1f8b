"""Speed of the quantizers in GB of bf16 source a second, plain and compiled, beside a plain copy of the same bytes.

python tests/benchmarks/quantizers.py [--output FILE.json] [--rows N] [--repeats N] [--skip-plain]

One weight is an expert's projection of Llama 4 at real width, 8192 x 5120: a slice of the fused tensor as stored
(transposed), or a matrix of its own (contiguous). From source to packed codes, scales and error sums. With two threads
each quantizes a weight of its own, as the workers of a conversion do. Every figure is the best of the repeats. The
last column divides by the CPU time of one thread instead of the time on the clock, for when the machine is busy.

The limits are copies of the source by torch in the same threads: `copy` to the same layout, and `transpose`, which is
what turning the weight over costs if nothing else is done. A copy also writes as much as it reads; a quantizer writes
a quarter or half.
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from synthetic import cpu_name
from torch import Tensor

from llama4_quant.quantizers.backend import Backend, BackendName, choose_backend
from llama4_quant.quantizers.packed import code_bytes
from llama4_quant.scheme import Scheme, preset

IN_FEATURES = 5120
THREADS = (1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Speeds in GB/s by number of threads, and in GB per second of CPU time of one thread."""

    task: str
    layout: str
    plain: dict[int, float]
    compiled: dict[int, float]
    per_cpu_second: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--rows", type=int, default=8192, help="outputs of the weight")
    parser.add_argument("--repeats", type=int, default=5, help="of which the best counts")
    parser.add_argument("--skip-plain", action="store_true", help="leave out the plain path, which takes the longest")
    options = parser.parse_args()
    torch.set_num_threads(1)

    started = time.perf_counter()
    backend = choose_backend()
    seconds = time.perf_counter() - started
    print(f"{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}")
    print(f"compiled kernels: {backend.name} ({backend.detail}); ready in {seconds:.1f} s")
    results = _limits(options.rows, options.repeats)
    for scheme in _schemes():
        for layout, weights in _weights(options.rows).items():
            results.append(_result(scheme, layout, weights, backend, options.repeats, skip_plain=options.skip_plain))
    _print(results)
    if options.output:
        _write(options.output, backend, seconds, results)


def _schemes() -> list[Scheme]:
    names = (("FP8_DYNAMIC", None), ("W4A16", 128), ("W4A16", -1), ("FP8_BLOCK", None))
    return [preset(name, group_size=size, observer=o) for o in ("absmax", "mse") for name, size in names]


def _weights(num_rows: int) -> dict[str, list[Tensor]]:
    """A weight for each thread, in both layouts; gate and up lie side by side in the transposed one."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(IN_FEATURES, 2 * num_rows, generator=generator).mul_(0.02).to(torch.bfloat16)
    transposed = [half.T for half in (fused[:, :num_rows], fused[:, num_rows:])]
    return {"transposed": transposed, "contiguous": [weight.contiguous() for weight in transposed]}


def _limits(num_rows: int, repeats: int) -> list[Result]:
    weights = _weights(num_rows)
    targets = [torch.empty(num_rows, IN_FEATURES, dtype=torch.bfloat16) for _ in THREADS]
    pairs = {
        ("copy", "contiguous"): list(zip(targets, weights["contiguous"], strict=True)),
        ("transpose", "transposed"): list(zip(targets, weights["transposed"], strict=True)),
    }
    results = []
    for (task, layout), jobs in pairs.items():
        tasks: list[Callable[[], object]] = [partial(target.copy_, source) for target, source in jobs]
        speeds = {count: _speed(tasks[:count], jobs[0][1], repeats) for count in THREADS}
        cpu = _gigabytes(jobs[0][1]) / min(_cpu_seconds(tasks[0]) for _ in range(repeats))
        results.append(Result(task=task, layout=layout, plain=speeds, compiled={}, per_cpu_second=cpu))
    return results


def _result(
    scheme: Scheme, layout: str, weights: list[Tensor], backend: Backend, repeats: int, *, skip_plain: bool
) -> Result:
    def speeds(of: Backend, times: int) -> dict[int, float]:
        pairs = zip(weights, buffers, strict=True)
        tasks: list[Callable[[], object]] = [partial(of.quantize, w, scheme.weights, out) for w, out in pairs]
        return {count: _speed(tasks[:count], weights[0], times) for count in THREADS}

    shape = (weights[0].shape[0], weights[0].shape[1])
    buffers = [torch.empty(code_bytes(shape, scheme.weights), dtype=torch.uint8) for _ in THREADS]
    plain = {} if skip_plain else speeds(choose_backend(BackendName.PLAIN), 1)
    compiled = speeds(backend, repeats) if backend.name is BackendName.COMPILED else {}
    alone = partial(backend.quantize, weights[0], scheme.weights, buffers[0])
    cpu = _gigabytes(weights[0]) / min(_cpu_seconds(alone) for _ in range(repeats))
    return Result(task=scheme.label, layout=layout, plain=plain, compiled=compiled, per_cpu_second=cpu)


def _gigabytes(weight: Tensor) -> float:
    return weight.numel() * weight.element_size() / 1e9


def _speed(tasks: list[Callable[[], object]], weight: Tensor, repeats: int) -> float:
    """GB/s of source over all tasks, each in a thread of its own; the best of `repeats`."""
    seconds = min(_seconds(tasks) for _ in range(repeats))
    return len(tasks) * _gigabytes(weight) / seconds


def _seconds(tasks: list[Callable[[], object]]) -> float:
    threads = [threading.Thread(target=task) for task in tasks]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def _cpu_seconds(task: Callable[[], object]) -> float:
    started = time.thread_time()
    task()
    return time.thread_time() - started


def _print(results: list[Result]) -> None:
    columns = " ".join(f"{name:>8}" for name in ("plain 1", "plain 2", "fused 1", "fused 2", "cpu 1"))
    print(f"\n{'GB/s of bf16 source':33} {'layout':11} {columns}")
    for result in results:
        cells = [speeds.get(count) for speeds in (result.plain, result.compiled) for count in THREADS]
        shown = " ".join("       -" if cell is None else f"{cell:8.2f}" for cell in cells)
        print(f"{result.task:33} {result.layout:11} {shown} {result.per_cpu_second:8.2f}")


def _write(path: Path, backend: Backend, seconds: float, results: list[Result]) -> None:
    report = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "backend": backend.name,
        "detail": backend.detail,
        "seconds_until_ready": seconds,
        "unit": "GB/s of bf16 source, by number of threads; per second of CPU time of one thread",
        "results": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
