"""Peak memory and time of loading a model, against the size of what is loaded.

    python tests/benchmarks/loading.py          # one Scout-shaped MoE layer, 16 x [5120, 8192] experts: 4.5 GB in BF16

Rows: a BF16 checkpoint as it is, quantized on the way in, a converted checkpoint, and one whose experts stay in the
file. The promise: at most the model's weights and 1 GiB. The source is a sparse file (it reads as zeros); what is
loaded is real memory. Each load runs in a process of its own; its peak is VmHWM over what it had after importing torch.
All files are deleted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from synthetic import circumstances, layer_config, make_checkpoint

from llama4_quant import convert

ROOT = Path(__file__).parents[2]
ALLOWANCE = 2**30
CHILD = """
import json, re, sys, time
from pathlib import Path
import torch
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
baseline = peak()
from llama4_quant import load
source, settings = sys.argv[1], json.loads(sys.argv[2])
started = time.perf_counter()
model = load(source, **settings)
seconds = time.perf_counter() - started
weights = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"weights": weights, "peak": peak() - baseline, "seconds": seconds}))
"""


def measure(name: str, source: Path, **settings: Any) -> dict[str, Any]:
    """Load in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(source), json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return {"name": name, **json.loads(done.stdout.splitlines()[-1])}


def rows(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    source = folder / "source"
    config = layer_config(options.experts, options.hidden, options.intermediate)
    make_checkpoint(source, config, sparse=True)
    found = [measure("BF16", source)]
    for scheme in options.schemes:
        found.append(measure(f"{scheme}, quantized on the way", source, scheme=scheme))
        stored = folder / scheme
        convert(source, stored, scheme=scheme)
        found.append(measure(f"{scheme}, converted", stored))
        found.append(measure(f"{scheme}, experts in the file", stored, offload="experts"))
    return found


def show(row: dict[str, Any]) -> str:
    over = row["peak"] - row["weights"]
    verdict = "met" if over <= ALLOWANCE else "MISSED"
    return (
        f"{row['name']:32} {row['weights'] / 2**20:11,.0f} {row['peak'] / 2**20:10,.0f} {over / 2**20:9,.0f} "
        f"{row['seconds']:7.1f}   {verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--schemes", nargs="+", default=["W4A16", "FP8_DYNAMIC"])
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    print(f"{'':32} {'weights MiB':>11} {'peak MiB':>10} {'over MiB':>9} {'s':>7}   at most weights + 1 GiB")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = rows(Path(folder), options)
    for row in found:
        print(show(row))
    if options.output is not None:
        options.output.write_text(json.dumps(circumstances() | {"rows": found}, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(row["peak"] - row["weights"] > ALLOWANCE for row in found))


if __name__ == "__main__":
    main()
