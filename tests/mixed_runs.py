"""Tiny checkpoints and conversions with --target-bits, for tests."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from checkpoints import make_checkpoint, text_config

from llama4_quant import Scheme, convert, preset
from llama4_quant.calibration.settings import make_calibration
from llama4_quant.conversion.report import Report
from llama4_quant.sample import SAMPLE_DIR

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
ALL_TEXT = preset("W4A16", quantize=["attention"])


def tiny_model(folder: Path, **changes: Any) -> Path:
    """A random text model, 256 wide so that a channel is more than a group, with the sample's tokenizer."""
    make_checkpoint(folder, text_config(**{"hidden_size": 256, **changes}), seed=1)
    for name in TOKENIZER_FILES:
        shutil.copy(SAMPLE_DIR / name, folder)
    return folder


def token_lines(path: Path, lengths: tuple[int, ...] = (24, 24, 17, 30, 9, 40)) -> str:
    """Random tokens as JSON lines."""
    rng = random.Random(0)
    rows = [{"input_ids": [rng.randrange(3, 90) for _ in range(length)]} for length in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def convert_mixed(
    source: Path, out: Path, data: str, *, bits: float | None, scheme: Scheme | None = ALL_TEXT, **settings: Any
) -> Report:
    """Convert with GPTQ to so many bits."""
    calibration = make_calibration("gptq", data=[data], max_seq_length=64, target_bits=bits)
    return convert(source, out, scheme=scheme, calibration=calibration, **settings)
