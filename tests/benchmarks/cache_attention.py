"""Attention of one token to a long cache, by how the cache is kept and who computes: ms, and bytes read beside memory.

    python tests/benchmarks/cache_attention.py [--columns 32768] [--heads 40 8] [--output FILE.json]

One layer's cache in Scout's shape (40 query heads on 8 key-value heads of 128), several copies one after another, so
that each call reads its own from memory. The best of --repeats rounds counts. Bytes are the stored ones: keys, values,
scales. Memory is what torch's sum over a buffer of 1 GiB reads on all cores.

- `torch, heads apart`: scaled_dot_product_attention(enable_gqa=True), as a straightforward decoding step has it;
- `torch, heads together`: query heads that share keys as rows of one product; codes are decoded in pieces first;
- `ours`: the compiled kernel.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from synthetic import circumstances
from torch import Tensor
from torch.nn import functional

from llama4_quant.ops import native_attention
from llama4_quant.runtime.attention import Attention, attend
from llama4_quant.runtime.cache import LayerCache
from llama4_quant.runtime.cache_formats import CacheDtype, LayerFormat
from llama4_quant.runtime.visibility import plan_segments

CPU = torch.device("cpu")


def memory_rate(num_bytes: int) -> float:
    """GB/s of a plain read."""
    words = torch.ones(num_bytes // 8, dtype=torch.int64)
    words.sum()
    return num_bytes / best([words.sum], 5) / 1e9


def best(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Seconds of a call in the best round."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for call in calls:
            call()
        seconds.append((time.perf_counter() - start) / len(calls))
    return min(seconds)


def filled(kind: CacheDtype, columns: int, groups: int, dim: int) -> LayerCache:
    layer_format = LayerFormat.choose(kind, torch.bfloat16, None)
    cache = LayerCache((1, groups, dim), layer_format, CPU, reserved=columns, window=None)
    for start in range(0, columns, 4096):
        new = torch.randn(1, groups, min(4096, columns - start), dim).bfloat16()
        cache.store(start, cache.encode(new, new))
    return cache


def ways(q: Tensor, cache: LayerCache, columns: int) -> dict[str, Callable[[], object]]:
    visible = plan_segments((0,), columns - 1, 1, None, CPU)
    found: dict[str, Callable[[], object]] = {}
    if cache.format.key.dtype is torch.bfloat16:
        [(_, keys, values)] = cache.stored(0, columns)
        found["torch, heads apart"] = lambda: functional.scaled_dot_product_attention(
            q, keys.codes, values.codes, enable_gqa=True
        )
    found["torch, heads together"] = lambda: attend(q, None, cache, visible, Attention.SDPA)
    if native_attention.probe() is None:
        found["ours"] = lambda: attend(q, None, cache, visible, Attention.SDPA, is_native=True)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=32_768)
    parser.add_argument("--heads", type=int, nargs=2, default=[40, 8], help="of queries, of keys and values")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    memory = memory_rate(1 << 30)
    print(f"{options.columns:,} columns; {torch.get_num_threads()} threads; memory reads {memory:.1f} GB/s")
    print(f"{'cache':6} {'computed by':22} {'MB':>7} {'ms':>8} {'GB/s':>7} {'of memory':>9}")
    q = torch.randn(1, options.heads[0], 1, options.head_dim).bfloat16()
    rows = []
    for kind in (CacheDtype.BF16, CacheDtype.FP8, CacheDtype.INT8):
        caches = [filled(kind, options.columns, options.heads[1], options.head_dim) for _ in range(options.copies)]
        num_bytes = caches[0].num_bytes
        calls = [ways(q, cache, options.columns) for cache in caches]
        for name in calls[0]:
            seconds = best([own[name] for own in calls], options.repeats)
            rate = num_bytes / seconds / 1e9
            print(
                f"{kind:6} {name:22} {num_bytes / 1e6:7.1f} {seconds * 1e3:8.2f} {rate:7.2f} {rate / memory:9.0%}",
                flush=True,
            )
            rows.append({"cache": kind, "by": name, "bytes": num_bytes, "seconds": seconds})
    if options.output is not None:
        report = circumstances() | {"columns": options.columns, "memory": memory, "rows": rows}
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
