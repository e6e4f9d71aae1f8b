"""Converts with solver settings that have no name: `python worker_ours.py JOB.json`, for the ablation."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from llama4_quant import convert, preset
from llama4_quant.calibration.settings import SolverSettings, make_calibration


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    scheme = preset(job["scheme"], group_size=job["group_size"], quantize=job["quantize"])
    lengths = [len(json.loads(line)["input_ids"]) for line in Path(job["tokens"]).read_text("utf-8").splitlines()]
    calibration = make_calibration("best", data=[job["tokens"]], num_samples=len(lengths), max_seq_length=max(lengths))
    assert calibration is not None
    calibration = replace(calibration, solver=SolverSettings(**job["solver"]))
    convert(job["model"], job["output"], scheme=scheme, calibration=calibration)


if __name__ == "__main__":
    main()
