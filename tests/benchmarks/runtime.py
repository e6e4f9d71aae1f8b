"""How fast the runtime is beside its peers and the machine's memory: one table, from one run.

    python tests/benchmarks/runtime.py --peer-python CYLLAMA --output runtime.json    # all rows
    python tests/benchmarks/runtime.py --only ours-int4,ours-bf16                     # some
    python tests/benchmarks/runtime.py --tiny                                         # does it run? no figures

CYLLAMA is a virtual environment with llama.cpp and its file format: `pip install cyllama==0.2.18 gguf numpy`.
transformers with compressed-tensors runs from this environment, or from another one given with --peer-python too.

The model has Scout's proportions (16 experts, one per token, a shared one, 5 query heads to a key-value head, every
4th layer NoPE) at --width eighths of Scout's width and with --layers layers, and random weights. By default it is
10.4 GB in BF16, and a decode step of the leanest row reads 0.49 GB. All rows have the same weights, converted by
`convert`, or written as GGUF and quantized by llama.cpp's own quantizer. "logits differ" is |logits - ours in BF16| /
|ours in BF16|, the median over ten positions. Before all rows, a tiny model shows that llama.cpp computes our function:
fp32 logits of both.

Each row runs in a process of its own with as many threads as there are cores, one after another. Rounds are repeated;
the best counts and the median stands beside it. Memory bandwidth is measured before each row, and the best of all is
what the rows are compared with. Files are made in --work, 32 GB at a time with all rows, and deleted at the end.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtime_kit.benchmark import Benchmark, Work
from runtime_kit.child import THREADS, ChildFailedError
from runtime_kit.contenders import Contender, System, choose, named
from runtime_kit.shapes import TINY, scout
from runtime_kit.table import bars, header, lines, settings
from synthetic import circumstances

PACKAGES = {System.LLAMA_CPP: ("cyllama", "gguf"), System.TRANSFORMERS: ("transformers", "compressed_tensors")}
"""What an environment has that can run a system."""


def main() -> None:
    options = parse()
    pythons = find_pythons(options.peer_python)
    try:
        chosen = choose(options.only, pythons)
    except ValueError as error:
        sys.exit(str(error))
    benchmark = Benchmark(
        shape=options.shape,
        work=options.work_to_do,
        folder=options.work.absolute(),
        pythons=pythons,
        read_bytes=options.read_bytes,
        read_rounds=options.read_rounds,
        keep=options.keep,
    )
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        check = check_gguf(benchmark, chosen)
        benchmark.measure(chosen)
        report = conclude(benchmark, check)
    finally:
        if not options.keep:
            shutil.rmtree(options.work)
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    failed = [row.contender.name for row in benchmark.rows if row.problem is not None]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def check_gguf(benchmark: Benchmark, chosen: Sequence[Contender]) -> str | None:
    """Is llama.cpp given the same function?"""
    if not any(contender.system is System.LLAMA_CPP for contender in chosen):
        return None
    try:
        return f"{benchmark.check_gguf():.1e}"
    except ChildFailedError as error:
        return str(error)


def conclude(benchmark: Benchmark, check: str | None) -> dict[str, Any]:
    """Print everything, and give it as JSON."""
    where = circumstances()
    speed, way = benchmark.bandwidth(benchmark.read_bytes)
    cached, _ = benchmark.bandwidth(benchmark.leanest)
    shape, traffic = benchmark.shape, benchmark.traffic(named("ours-bf16"))
    found = bars(benchmark.rows, bandwidth=speed, num_experts=shape.experts)
    gigabytes = f"{benchmark.read_bytes / 1e9:.2f} GB: {speed / 1e9:.2f} GB/s ({way})"
    again = f"{benchmark.leanest / 1e9:.2f} GB again and again: {cached / 1e9:.2f} GB/s"
    print(f"{where['processor']}, {where['cores']} cores, {THREADS} threads, torch {where['torch']}, {where['when']}")
    print(
        f"hidden {shape.hidden}, intermediate {shape.intermediate}, {shape.layers} layers, {shape.experts} experts, "
        f"{shape.vocabulary} words; the head is {traffic.head / traffic.per_step(1):.0%} of the weights of a token"
    )
    print(f"reading {gigabytes}; {again}")
    if check is not None:
        print(f"logits of llama.cpp in fp32 beside ours, tiny model, largest difference: {check}")
    print("\n" + header(benchmark.work.prompt, benchmark.work.batch))
    size = benchmark.work.batch
    table = lines(benchmark.rows, batch_size=size, bandwidth=speed, vocabulary=shape.vocabulary)
    print("\n".join(table) + "\n")
    for bar in found:
        print(bar.line)
    print("\n" + "\n".join(settings(row) for row in benchmark.rows if row.problem is None))
    return {
        **where,
        "shape": asdict(shape),
        "work": asdict(benchmark.work),
        "reads": benchmark.reads,
        "llama.cpp in fp32": check,
        "rows": [row.to_json() for row in benchmark.rows],
        "bars": [asdict(bar) | {"met": bar.is_met} for bar in found],
    }


def find_pythons(given: Sequence[Path]) -> dict[System, Path]:
    """A Python for every system that can run; environments are told apart by what is installed in them."""
    pythons = {System.OURS: Path(sys.executable)}
    for python in (*given, Path(sys.executable)):
        path = (python / "bin" / "python" if python.is_dir() else python).absolute()
        places = list(path.parents[1].glob("lib/python3*/site-packages"))
        for system, packages in PACKAGES.items():
            if all(any((place / package).is_dir() for place in places) for package in packages):
                pythons.setdefault(system, path)
    return pythons


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer-python", type=Path, nargs="*", default=[], help="virtual environments, or their Pythons"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="rows: ours-int4, ...")
    parser.add_argument("--tiny", action="store_true", help="a model of 20 MB, for a test of this command")
    parser.add_argument("--width", type=int, default=6, help="eighths of Scout's width (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--experts", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=32768, help="default: %(default)s")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows of the other decode (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="decode steps of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60, help="no new round of a kind after (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/runtime"), help="folder (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the files, for another run with the same model")
    parser.add_argument("--output", type=Path, help="write all numbers here as JSON")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("layers", "experts", "vocabulary")}
    options.shape = TINY if options.tiny else scout(kv_heads=options.width, **sizes)
    options.read_bytes, options.read_rounds = (1 << 25, 2) if options.tiny else (3 << 30, 6)
    options.work_to_do = Work(
        prompt=options.prompt,
        batch=options.batch,
        steps=options.steps,
        rounds=options.rounds,
        seconds=options.seconds,
    )
    return options


if __name__ == "__main__":
    main()
