"""Conversion end to end, beside a plain copy and llm-compressor: one Scout MoE layer at real width, from a warm cache.

    python tests/benchmarks/convert.py [--peer-venv DIR] [--rounds N] [--folder DIR] [--output FILE.json]

The source has hidden size 5120, intermediate size 8192 and 16 experts: 4.5 GB in BF16, random weights, in two shards.
Each row is a process of its own, timed from its start to its end, imports included: `cp -r` of the source;
`llama4-quant convert`; and with --peer-venv llm-compressor's `model_free_ptq`, two workers, with the same modules left
in BF16 (it cuts Llama 4's transposed experts wrongly, so its output is good for its time only). DIR is a virtual
environment with llmcompressor; it is made where there is none. Rows take turns, and the best of the rounds counts.
Before each run the source is read once and earlier output is synced, so that nobody pays for somebody else.

Below, what the machine can do: reading the source into a buffer, SHA-256, and writing and syncing as much as each
output has.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from synthetic import circumstances, layer_config, make_checkpoint

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ("torch==2.13.0", "llmcompressor==0.14.0.1")
PEER = """
import sys
from llmcompressor import model_free_ptq
source, out, scheme = sys.argv[1:]
ignore = ["re:.*router", "re:.*self_attn.*", "re:.*lm_head", "re:.*embed_tokens"]
model_free_ptq(source, out, scheme=scheme, ignore=ignore, max_workers=2, device="cpu")
"""
TIMER = """
import json, os, resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.call(sys.argv[2:], stdout=sys.stderr)
seconds = time.perf_counter() - started
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump([code, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024], file)
"""
"""Runs and measures a command. A small process, because a child's peak memory begins with that of its parent."""
CHUNK_BYTES = 2**26


@dataclass(kw_only=True, slots=True)
class Row:
    """One command: what it is compared with, and its runs.

    Attributes:
        bar: at least so many times faster than `against`, or less than 1 for slower.
        seconds, cpu_seconds, peak_bytes: of each run.
    """

    name: str
    command: list[str]
    against: str | None = None
    bar: float | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    output_bytes: int = 0

    @property
    def best(self) -> float:
        """The time that counts."""
        return min(self.seconds)


def rows_of(source: Path, out: Path, peer: Path | None) -> list[Row]:
    """All commands, in the order in which they take turns."""
    rows = [Row(name="cp -r", command=["cp", "-r", str(source), str(out)])]
    for scheme, bar in (("W4A16", 8.0), ("FP8_DYNAMIC", 5.0)):
        for observer in ("absmax", "mse"):
            convert = [sys.executable, "-m", "llama4_quant.cli", "convert", str(source), "-o", str(out)]
            command = [*convert, "--scheme", scheme, "--observer", observer]
            against = f"model_free_ptq {scheme}" if peer and observer == "absmax" else None
            name = f"llama4-quant {scheme} {observer}"
            rows.append(Row(name=name, command=command, against=against, bar=bar if against else None))
        if peer:
            command = [str(peer), "-c", PEER, str(source), str(out), scheme]
            rows.append(Row(name=f"model_free_ptq {scheme}", command=command))
    return rows


def run(row: Row, source: Path, out: Path) -> None:
    """Run a command once."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for _ in _chunks(source):
        pass
    result = out.with_suffix(".json")
    timed = [sys.executable, "-c", TIMER, str(result), *row.command]
    done = subprocess.run(timed, cwd=ROOT, check=True, capture_output=True, text=True)
    code, seconds, cpu_seconds, peak_bytes = json.loads(result.read_text())
    if code != 0:
        sys.exit(f"{row.name} failed:\n{done.stderr[-2000:]}")
    row.seconds.append(seconds)
    row.cpu_seconds.append(cpu_seconds)
    row.peak_bytes.append(peak_bytes)
    row.output_bytes = _size(out)
    shutil.rmtree(out)


def limits(source: Path, out: Path, output_sizes: dict[str, int]) -> dict[str, float]:
    """Seconds for parts of the work that no program can do without."""
    digest = hashlib.sha256()
    data = bytes(CHUNK_BYTES)
    found = {"read the source": _seconds(lambda: [None for _ in _chunks(source)])}
    for name, nbytes in output_sizes.items():
        count = -(-nbytes // CHUNK_BYTES)
        found[f"SHA-256 of {name}, one thread"] = _seconds(lambda: [digest.update(data) for _ in range(count)])  # noqa: B023
        found[f"write and sync {name}"] = _seconds(lambda: _write(out, data, count))  # noqa: B023
        out.unlink()
    return found


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _chunks(folder: Path) -> Iterator[int]:
    """Read all files, into one buffer."""
    buffer = bytearray(CHUNK_BYTES)
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield count


def _write(path: Path, data: bytes, count: int) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(data)
        os.fsync(file.fileno())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def show(rows: list[Row], source_bytes: int) -> None:
    """The table."""
    copy = rows[0].best
    best = {row.name: row.best for row in rows}
    print(
        f"\n{'':30} {'seconds':>8} {'all rounds':>18} {'GB/s':>6} {'CPU s':>6} {'peak MB':>8} {'/ cp':>6} {'/ peer':>7}"
    )
    for row in rows:
        rounds = " ".join(f"{seconds:.1f}" for seconds in row.seconds)
        times_faster = f"{best[row.against] / row.best:6.1f}x" if row.against else ""
        print(
            f"{row.name:30} {row.best:8.2f} {rounds:>18} {source_bytes / 1e9 / row.best:6.2f} "
            f"{min(row.cpu_seconds):6.1f} {max(row.peak_bytes) / 1e6:8.0f} {row.best / copy:6.2f} {times_faster:>7}"
        )


def peer_python(folder: Path) -> Path:
    """The interpreter of a virtual environment with llm-compressor; made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for requirement in REQUIREMENTS:  # torch first, or pip takes the newest that llmcompressor allows
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", requirement], check=True)
    return python


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-venv", type=Path, metavar="DIR", help="virtual environment with llmcompressor")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    return parser.parse_args()


def main() -> None:
    options = parse()
    peer = peer_python(options.peer_venv.absolute()) if options.peer_venv else None
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="llama4-quant-convert-") as name:
        source, out = Path(name) / "source", Path(name) / "out"
        make_checkpoint(source, layer_config(options.experts, 5120, 8192, heads=(40, 8), vocabulary=4096), sparse=False)
        source_bytes, before = _size(source), circumstances()
        machine = f"{before['processor']}, {before['cores']} cores, load {before['load']}"
        print(f"{source_bytes / 1e9:.2f} GB of BF16; {machine}")
        rows = rows_of(source, out, peer)
        for _ in range(options.rounds):
            for row in rows:
                run(row, source, out)
                print(f"  {row.name}: {row.seconds[-1]:.2f} s", file=sys.stderr, flush=True)
        sizes = {row.name.split()[1]: row.output_bytes for row in rows if row.name.endswith("absmax")}
        floor = limits(source, out, sizes)
    show(rows, source_bytes)
    print("\nwhat the machine can do, seconds")
    for what, seconds in floor.items():
        print(f"  {what:36} {seconds:6.2f}")
    print(f"load at the end: {os.getloadavg()[0]:.2f}")
    if options.output is not None:
        facts: dict[str, Any] = {**before, "load_after": round(os.getloadavg()[0], 2), "source_bytes": source_bytes}
        results = [{key: value for key, value in asdict(row).items() if key != "command"} for row in rows]
        options.output.write_text(json.dumps({**facts, "rows": results, "limits": floor}, indent=1) + "\n")


if __name__ == "__main__":
    main()
