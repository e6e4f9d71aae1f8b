"""Everything that decides the bytes of an output: a conversion is continued only by one with the same."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from llama4_quant._version import __version__
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.source import side_files
from llama4_quant.conversion.mixed_precision import MIXED_SECTION
from llama4_quant.conversion.prepare import Preparation


def fingerprint(reader: CheckpointReader, preparation: Preparation, max_shard_size: int) -> dict[str, Any]:
    """JSON data by section (source, scheme, settings, ...), so that what differs can be named."""
    plan, calibration, mixed = preparation.plan, preparation.calibration, preparation.mixed
    copied = {path.name: _sha256(path) for path in side_files(reader.path)}
    return {
        "source": {**reader.facts, "copied": copied},
        "scheme": None if plan.scheme is None else dataclasses.asdict(plan.scheme),
        "settings": {
            "format": plan.format,
            "max_shard_size": max_shard_size,
            **({} if plan.model_parallel is None else {"model_parallel": plan.model_parallel}),
        },
        **({} if calibration is None else {"calibration": calibration.fingerprint}),
        **({} if mixed is None else {MIXED_SECTION: dataclasses.asdict(mixed)}),
        "version": {"llama4_quant": __version__},
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
