"""Tokens per second when routed experts stay in their file, as the memory that caches them shrinks.

    python tests/benchmarks/offload.py                    # int4, 2.3 GB of experts
    python tests/benchmarks/offload.py --kernel reference --width 8 --layers 8

The model of runtime.py in W4A16 with int4 attention, all experts in memory first; then with `load(...,
offload="experts")`: mapped, where the page cache decides, and with `expert_cache` from all of the experts' bytes down
to a tenth. Logits have to be equal to those of the model in memory, bit by bit, which takes the same kernel for both;
the command fails otherwise. Tokens are random, so every expert is as likely as any other: a text prefers some, and does
better.

"from disk" is the same with experts kept out of the page cache, so that what is not in the expert cache is read from
the disk, as of a model larger than memory; without that, from the page cache.

Behind the speeds of a cache: of the experts that were asked for, how many it had ("hits"), and how many MB a token
took from the file. These bytes over the rate of the disk, which the command measures, are the least that misses take
there.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime_kit.artifacts import Workshop
from runtime_kit.benchmark import Work
from runtime_kit.child import ChildFailedError, run_worker
from runtime_kit.contenders import Files
from runtime_kit.results import Speed
from runtime_kit.shapes import TINY, Shape, scout
from synthetic import circumstances, make_checkpoint

from llama4_quant.architecture import Llama4Config, Role
from llama4_quant.planning.make import make_plan
from llama4_quant.scheme import preset

IN_MEMORY, MAPPED = "all in memory", "in the file, mapped"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to hold the experts.

    Attributes:
        prefill: tokens per second.
        decode: tokens per second by batch size.
        kernels: what ran the weights.
        hits: of the experts that were asked for, the share that was in the cache, by kind of call; empty without cache.
        bytes_per_token: from the file, likewise.
        is_equal: logits are those of the model in memory.
    """

    name: str
    evicted: bool
    prefill: float
    decode: Mapping[int, float]
    peak_bytes: int
    kernels: tuple[str, ...]
    hits: Mapping[str, float]
    bytes_per_token: Mapping[str, float]
    is_equal: bool

    @property
    def line(self) -> str:
        decode = "".join(f"{speed:10.2f}" for speed in self.decode.values())
        where = "from disk" if self.evicted else ""
        equal = "equal" if self.is_equal else "DIFFER"
        counts = "".join(f"{hits:6.0%}{self.bytes_per_token[kind] / 1e6:6.1f}" for kind, hits in self.hits.items())
        speeds = f"{self.name:20}{where:>10}{self.prefill:9.1f}{decode}"
        return f"{speeds}{self.peak_bytes / 1e9:8.2f}  {equal:6}{counts}"


class Benchmark:
    """One run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.shape: Shape = options.shape
        self.work = Work(
            prompt=options.prompt,
            batch=options.batch,
            steps=options.steps,
            rounds=options.rounds,
            seconds=options.seconds,
        )
        self.folder: Path = options.work.absolute()
        self.kernel: str = options.kernel
        workshop = Workshop(folder=self.folder, run=self._no_gguf)
        if not workshop.path(Files.INT4).exists():
            make_checkpoint(workshop.source, self.shape.config(), sparse=False, runs=True)
        self.model = workshop.make(Files.INT4)

    @staticmethod
    def _no_gguf(_worker: str, _job: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("no row of this benchmark is a GGUF file")

    @property
    def expert_bytes(self) -> int:
        """Of all routed experts."""
        plan = make_plan(Llama4Config.from_dict(self.shape.config()), preset("W4A16", quantize=["attention"]))
        return sum(decision.bytes_out for decision in plan.decisions if decision.role is Role.ROUTED_EXPERT)

    def row(self, name: str, settings: Mapping[str, Any], *, evicted: bool = False) -> Row:
        """Load and measure in a process of its own. The one place that knows how `load` spells it."""
        logits, reference = self.folder / "logits", self.folder / "reference.logits"
        job = self.work.job(self.shape.vocabulary) | {
            "model": str(self.model),
            "load": {"kernel": self.kernel} | dict(settings),
            "logits": str(reference if name == IN_MEMORY else logits),
            "evict": evicted,
        }
        result = run_worker(Path(sys.executable), self.folder, "worker_offload", job)
        found = result["variants"][""]
        counts = {kind: total for kind in ("prefill", *found["decode"]) if (total := result["counts"][kind])[1]}
        decode = {int(size): Speed.of({"": found["decode"][size]}, int(size)).best for size in found["decode"]}
        return Row(
            name=name,
            evicted=evicted,
            prefill=Speed.of({"": found["prefill"]}, self.work.prompt).best,
            decode=decode,
            peak_bytes=result["peak_bytes"],
            kernels=tuple(result["notes"]),
            hits={kind: hits / used for kind, (_, used, hits, _) in counts.items()},
            bytes_per_token={kind: read / tokens for kind, (tokens, _, _, read) in counts.items()},
            is_equal=name == IN_MEMORY or logits.read_bytes() == reference.read_bytes(),
        )


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=options.keep)
    try:
        report = run(options)
    except ChildFailedError as error:
        sys.exit(str(error))
    finally:
        if not options.keep:
            shutil.rmtree(options.work)
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(
        0 if all(row["is_equal"] for row in report["rows"]) else "logits differ: with the same kernels they must not"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Make and print the rows."""
    benchmark, where = Benchmark(options), circumstances()
    total = benchmark.expert_bytes
    rates = read_rates(max(benchmark.model.glob("*.safetensors"), key=lambda path: path.stat().st_size))
    print(f"{where['processor']}, {where['cores']} cores, load {where['load']}; {total / 1e9:.2f} GB of experts")
    print(f"GB/s: {'; '.join(f'{name} {rate / 1e9:.1f}' for name, rate in rates.items())}")
    sizes = [f"decode {size}" for size in (1, options.batch)]
    decode = "".join(f"{size:>10}" for size in sizes)
    counts = "".join(f"{name:>12}" for name in ("prefill", *sizes))
    print(f"{'':54}{'':10}peak  {'':8}hits, MB per token")
    print(f"{'tokens per second':30}{f'prefill {options.prompt}':>9}{decode}{'GB':>8}  logits{counts}", flush=True)
    ways: list[tuple[str, dict[str, Any], bool]] = [(IN_MEMORY, {}, False)]
    ways += [(MAPPED, {"offload": "experts"}, evicted) for evicted in (False, True)]
    for share in options.shares:
        settings = {"offload": "experts", "expert_cache": int(total * share)}
        ways += [(f"cache of {share:.0%}", settings, evicted) for evicted in (False, True)]
    rows = []
    for name, settings, evicted in ways:
        rows.append(benchmark.row(name, settings, evicted=evicted))
        print(rows[-1].line, flush=True)
    for row in rows[:2]:
        print(f"{row.name}: {'; '.join(row.kernels)}")
    return {
        **where,
        "rates": rates,
        "expert_bytes": total,
        "shape": asdict(benchmark.shape),
        "rows": [asdict(row) for row in rows],
    }


def read_rates(path: Path, size: int = 2**25, num_reads: int = 16) -> dict[str, float]:
    """Best bytes per second of reading `size` bytes of a file, from the disk and then from the page cache."""
    memory, best = memoryview(bytearray(size)), {"disk": 0.0, "page cache": 0.0}
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for source in ("disk", "page cache"):
            file.seek(0)
            for _ in range(num_reads):
                started = time.perf_counter()
                count = file.readinto(memory) or 0
                best[source] = max(best[source], count / (time.perf_counter() - started))
    return best


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1, 0.75, 0.5, 0.25, 0.1], help="of the experts' bytes"
    )
    parser.add_argument(
        "--kernel", default="auto", help="of every row: native, torch, reference (default: %(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="a model of 20 MB, for a test of this command")
    parser.add_argument("--width", type=int, default=6, help="eighths of Scout's width (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows of the other decode (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="decode steps of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=30, help="no new round of a kind after (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/offload"), help="folder (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint in --work, and use what is there")
    parser.add_argument("--output", type=Path, help="write all numbers here as JSON")
    options = parser.parse_args()
    options.shape = TINY
    if not options.tiny:
        options.shape = scout(kv_heads=options.width, layers=options.layers, experts=16, vocabulary=32768)
    return options


if __name__ == "__main__":
    main()
