"""What the report of an output says of it: a file that may be damaged, and then promises nothing."""

from pathlib import Path

from llama4_quant.checkpoint.json_files import read_json
from llama4_quant.conversion.report import REPORT_NAME
from llama4_quant.errors import CheckpointError


def promised_errors(folder: Path) -> dict[str, float]:
    """Relative errors by weight, as the report has them."""
    try:
        weights = read_json(folder / REPORT_NAME, CheckpointError)["weights"]
        return {w["name"]: w["relative_error"] for w in weights if isinstance(w["relative_error"], float)}
    except (CheckpointError, KeyError, TypeError):
        return {}  # a damaged report is a problem that files.py names


def is_equalized(folder: Path) -> bool:
    """Whether the report says that powers of two were moved between weights."""
    try:
        calibration = read_json(folder / REPORT_NAME, CheckpointError)["calibration"]
        return calibration is not None and calibration["equalized"] is True
    except (CheckpointError, KeyError, TypeError):
        return False
