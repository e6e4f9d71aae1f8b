"""Where the time of a calibrated conversion goes.

    PYTHONPATH=. python tests/benchmarks/calibration_time.py                      # the sample model
    PYTHONPATH=. python tests/benchmarks/calibration_time.py --algorithm best
    PYTHONPATH=. python tests/benchmarks/calibration_time.py --wide               # experts as wide as Llama 4's

Converts in this process, under Python's profiler, and prints the seconds of each part of the pass. The sample is
calibrated on what accuracy.py gives it, 64 samples of 512 tokens; the wide model is one MoE layer with random weights
and one expert, [8192, 5120] and [5120, 8192], on 8 samples of 1024 random tokens. Seconds before the conversion begins,
which are those of importing torch, are not counted. The profiler slows Python down, so small parts look larger.
"""

import argparse
import cProfile
import json
import os
import pstats
import tempfile
import time
from pathlib import Path

import numpy as np

from llama4_quant import convert, make_calibration, preset
from llama4_quant.sample import SAMPLE_DIR

PARTS = {
    "sums over inputs (Hessians)": ("calibration/hessian.py", {"add"}),
    "Cholesky factors": ("calibration/gptq.py", {"factor"}),
    "GPTQ's columns": ("calibration/gptq.py", {"gptq"}),
    "coordinate descent": ("calibration/gptq.py", {"coordinate_descent", "refit_scales"}),
    "correction for drift": ("calibration/hessian.py", {"corrected"}),
    "search for scales": ("calibration/scales.py", {"search_scales"}),
    "no output worse than rounding": ("calibration/solve.py", {"_guarded"}),
    "rounding to nearest": ("quantizers/backend.py", {"quantize"}),
    "products with weights": ("calibration/pieces.py", {"_project"}),
    "attention": ("calibration/decoder.py", {"context"}),
    "rows in and out": ("calibration/rows.py", {"read", "write", "gather", "scatter", "sync"}),
    "output, journal": ("checkpoint/writer.py", {"write", "record", "sync"}),
}
"""File, and functions: what they take together, with all that they call."""


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="llama4-quant-calibration-time-") as name:
        folder = Path(name)
        source, data, length, num_samples = make_wide(folder) if options.wide else sample(folder)
        calibration = make_calibration(
            options.algorithm, data=[str(data)], max_seq_length=length, num_samples=num_samples
        )
        scheme = preset("W4A16", group_size=128 if options.wide else 64, quantize=[] if options.wide else ["attention"])
        load_before, profile = os.getloadavg()[0], cProfile.Profile()
        started = time.perf_counter()
        profile.runcall(convert, source, folder / "out", scheme=scheme, calibration=calibration)
        seconds = time.perf_counter() - started
    print(f"{options.algorithm}, {'wide' if options.wide else 'sample'}: {seconds:.2f} s, load {load_before:.2f}")
    left = seconds
    for part, spent in sorted(seconds_of_parts(pstats.Stats(profile)).items(), key=lambda item: -item[1]):
        print(f"{part:>32} {spent:7.2f} s {spent / seconds:6.1%}")
        left -= spent
    print(f"{'everything else':>32} {left:7.2f} s {left / seconds:6.1%}")


def seconds_of_parts(stats: pstats.Stats) -> dict[str, float]:
    """Cumulative seconds of each part, without calls from one of its functions to another."""
    found = dict.fromkeys(PARTS, 0.0)
    for (filename, _, function), (_, _, _, _, callers) in stats.stats.items():  # type: ignore[attr-defined]
        for part, (suffix, functions) in PARTS.items():
            if filename.endswith(suffix) and function in functions:
                found[part] += sum(
                    times[3]
                    for (file, _, caller), times in callers.items()
                    if not (file.endswith(suffix) and caller in functions)
                )
    return found


def sample(folder: Path) -> tuple[Path, Path, int, int]:
    """Checkpoint, tokens, their number a sample, and samples."""
    from accuracy_kit import tokens  # noqa: PLC0415 - after llama4_quant, which has to come before torch

    drawn = tokens.prepare(
        SAMPLE_DIR, calibration=[], held_out=[], num_samples=64, seq_length=512, num_windows=1, seed=0
    )
    return SAMPLE_DIR, drawn.write_calibration(folder / "tokens.jsonl"), 512, 64


def make_wide(folder: Path) -> tuple[Path, Path, int, int]:
    """The same of one MoE layer with random weights."""
    import calibration_memory  # noqa: PLC0415 - as above

    sizes = argparse.Namespace(experts=1, hidden=5120, intermediate=8192, vocabulary=256)
    calibration_memory.make_checkpoint(folder / "source", calibration_memory.config_of(sizes))
    drawn = np.random.default_rng(0).integers(3, 256, (8, 1024)).tolist()
    (folder / "tokens.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in drawn))
    return folder / "source", folder / "tokens.jsonl", 1024, 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Where the time of a calibrated conversion goes.")
    parser.add_argument("--algorithm", choices=["gptq", "best"], default="gptq")
    parser.add_argument("--wide", action="store_true", help="experts as wide as Llama 4's; 1 GB of disk")
    return parser.parse_args()


if __name__ == "__main__":
    main()
