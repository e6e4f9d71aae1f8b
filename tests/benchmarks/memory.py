"""Peak memory of a conversion against its cap, for a checkpoint with one huge tensor of experts.

    python tests/benchmarks/memory.py                       # [128, 5120, 16384] in BF16: 21.5 GB, in a sparse file
    python tests/benchmarks/memory.py --caps 1GiB 2GiB --workers 1 2 --schemes W4A16 FP8_DYNAMIC --output memory.json

The source is a sparse file: it takes no room, and reads as zeros. The output is real: about 9 GB for W4A16 and 17 GB
for FP8. Every conversion runs in a process of its own, and its peak resident memory (VmHWM) is taken over what the
process had after importing torch. All files are deleted.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from synthetic import circumstances, layer_config, make_checkpoint

ROOT = Path(__file__).parents[2]
CHILD = """
import json, re, sys
from pathlib import Path
import torch
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
baseline = peak()
import time
from llama4_quant import convert, preset
source, out, scheme, observer, storage, cap, workers = sys.argv[1:]
started = time.perf_counter()
cap = None if cap == "smallest" else cap
chosen = preset(scheme, observer=observer)
if cap is None:
    from llama4_quant.conversion.dry_run import dry_run
    cap = dry_run(source, scheme=chosen, format=storage).memory.smallest
report = convert(source, out, scheme=chosen, format=storage, max_memory=cap, workers=int(workers) or None)
print(json.dumps({
    "cap_bytes": report.memory.limit, "predicted_bytes": report.memory.predicted,
    "workers": report.memory.num_workers, "peak_bytes": peak() - baseline,
    "baseline_bytes": baseline, "seconds": time.perf_counter() - started,
}))
"""


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    """One MoE layer, and as little else as the architecture allows (Meta's layout: as the format allows)."""
    if options.format != "meta-fp8":
        return layer_config(options.experts, options.hidden, options.intermediate)
    heads = options.hidden // 128
    config = layer_config(options.experts, options.hidden, options.intermediate, heads=(heads, heads))
    return config | {"num_hidden_layers": 3, "interleave_moe_layer_step": 2}


def measure(
    source: Path, out: Path, options: argparse.Namespace, scheme: str, cap: str, workers: int
) -> dict[str, Any]:
    """Convert in a process of its own."""
    arguments = map(str, [source, out, scheme, options.observer, options.format, cap, workers])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], cwd=ROOT, check=False, capture_output=True, text=True
    )
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return {
        "scheme": scheme,
        "observer": options.observer,
        "format": options.format,
        **json.loads(done.stdout.splitlines()[-1]),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Peak memory of a conversion against its cap.")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--schemes", nargs="+", default=["W4A16"])
    parser.add_argument("--observer", default="absmax")
    parser.add_argument("--format", default="compressed-tensors")
    parser.add_argument("--caps", nargs="+", default=["smallest", "1GiB", "2GiB"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0], help="0: one for each core")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    return parser.parse_args()


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="llama4-quant-memory-") as name:
        source, out = Path(name) / "source", Path(name) / "out"
        config = config_of(options)
        layout = make_checkpoint(source, config, sparse=True)
        largest = max(placement.tensor.nbytes for placement in layout.placements.values())
        stamp = circumstances()
        print(f"largest tensor {largest / 1e9:.1f} GB; {stamp['processor']}, load {stamp['load']}")
        print(f"{'':18} {'workers':>8} {'cap MiB':>8} {'predicted':>9} {'measured':>9} {'ratio':>6} {'seconds':>8}")
        rows = []
        for scheme, workers, cap in itertools.product(options.schemes, options.workers, options.caps):
            row = measure(source, out, options, scheme, cap, workers)
            rows.append(row)
            show(row)
    if options.output is not None:
        options.output.write_text(json.dumps({**stamp, "largest_tensor_bytes": largest, "rows": rows}, indent=1) + "\n")


def show(row: dict[str, Any]) -> None:
    """A line of the table."""
    cap, predicted, peak = (row[key] / 2**20 for key in ("cap_bytes", "predicted_bytes", "peak_bytes"))
    print(
        f"{row['scheme']:11} {row['observer']:6} {row['workers']:8} {cap:8.0f} {predicted:9.0f} {peak:9.0f} "
        f"{predicted / peak:6.2f} {row['seconds']:8.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
