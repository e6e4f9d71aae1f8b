"""How fast the CPU kernels are beside memory, torch's int4 kernel and torch's bf16 product.

    python tests/benchmarks/kernels.py [--output FILE.json] [--shape 8192 5120] [--rows 1 2 4 8 32 128 512]

Weights of one shape are run one after another, each at another place of a buffer of --gigabytes (3), far more than any
cache, so that every product reads its weight from memory. Bytes are codes and scales. The best of --repeats rounds
counts. Memory is what torch's sum over the buffer reads on all cores, best of several.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from synthetic import circumstances
from torch import Tensor
from torch.nn import functional

from llama4_quant.ops import native

Product = Callable[[Tensor], Tensor]
_MIN_BUFFER = 256 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[8192, 5120], help="outputs and inputs")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 32, 128, 512], help="of activations")
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    buffer = torch.randint(0, 120, (max(_MIN_BUFFER, int(options.gigabytes * 1e9)) // 64 * 64,), dtype=torch.uint8)
    memory = memory_rate(buffer)
    print(f"{native.description()}; {torch.get_num_threads()} threads; memory reads {memory:.1f} GB/s")
    print(f"{'weight':16} {'rows':>5} {'ms':>9} {'GB/s':>7} {'of memory':>9} {'GFLOP/s':>8}")
    found = []
    for num_rows in options.rows:
        for name, num_bytes, products in kinds(buffer, *options.shape):
            seconds = best_seconds(products, num_rows, options.shape[1], options.repeats)
            rate = num_bytes / seconds / 1e9
            flops = 2 * num_rows * options.shape[0] * options.shape[1] / seconds / 1e9
            print(
                f"{name:16} {num_rows:5} {seconds * 1e3:9.3f} {rate:7.2f} {rate / memory:9.0%} {flops:8.0f}", flush=True
            )
            found.append({"weight": name, "rows": num_rows, "seconds": seconds, "gb_per_second": rate})
    if options.output is not None:
        report: dict[str, Any] = circumstances() | {"shape": options.shape, "memory": memory, "results": found}
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def memory_rate(buffer: Tensor) -> float:
    """GB/s of a plain read."""
    words = buffer.view(torch.int64)
    words.sum()
    best = min(seconds_of(words.sum) for _ in range(5))
    return buffer.numel() / best / 1e9


def kinds(buffer: Tensor, num_outputs: int, num_inputs: int) -> Iterator[tuple[str, int, list[Product]]]:
    """By weight, its bytes and products with it at all its places in the buffer."""
    elements = num_outputs * num_inputs

    def places(num_bytes: int) -> list[Tensor]:
        return [buffer[start : start + num_bytes] for start in range(0, buffer.numel() - num_bytes + 1, num_bytes)]

    def codes(num_bytes: int, dtype: torch.dtype) -> list[Tensor]:
        return [place.view(dtype).view(num_outputs, -1) for place in places(num_bytes)]

    for group_size in (128, 64, 32):
        scale = torch.full((num_outputs, num_inputs // group_size), 0.01).bfloat16()
        products = [lambda x, w=w, s=scale: native.linear_int4(x, w, s) for w in codes(elements // 2, torch.int32)]
        yield f"int4 g{group_size}", elements // 2 + scale.nbytes, products
    row_scale = torch.full((num_outputs, 1), 0.01)
    weights = codes(elements, torch.float8_e4m3fn)
    yield "fp8", elements, [lambda x, w=w: native.linear_fp8(x, w, row_scale) for w in weights]
    yield "int8", elements, [lambda x, w=w: native.linear_int8(x, w, row_scale) for w in codes(elements, torch.int8)]
    bf16 = codes(2 * elements, torch.bfloat16)
    yield "bf16", 2 * elements, [lambda x, w=w: native.linear_dense(x, w) for w in bf16]
    yield "torch bf16", 2 * elements, [lambda x, w=w: functional.linear(x, w) for w in bf16]
    zeros = torch.full((num_inputs // 128, num_outputs, 2), 0.01).bfloat16()
    packed = codes(elements // 2, torch.uint8)
    yield (
        "torch int4 g128",
        elements // 2 + zeros.nbytes,
        [lambda x, w=w: torch._weight_int4pack_mm_for_cpu(x, w, 128, zeros) for w in packed],
    )


def best_seconds(products: list[Product], num_rows: int, num_inputs: int, repeats: int) -> float:
    """Of one product; all of them are run, so that each finds its weight in memory."""
    x = torch.randn(num_rows, num_inputs).bfloat16()
    some = products if num_rows < 64 else products[:4]

    def run() -> None:
        for product in some:
            product(x)

    products[0](x)
    return min(seconds_of(run) for _ in range(repeats)) / len(some)


def seconds_of(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
