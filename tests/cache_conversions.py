"""Small calibrated conversions with an FP8 KV cache, for the tests of its scales."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from checkpoints import VISION, make_checkpoint
from corpus_files import write_lines

from llama4_quant import preset
from llama4_quant.calibration.settings import Calibration, make_calibration
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.report import Report
from llama4_quant.sample import SAMPLE_DIR

NUM_SAMPLES, LENGTH = 12, 24
ALL_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
"""Every token takes both: noise cannot turn into another expert."""


def token_samples() -> torch.Tensor:
    """Calibration samples [12, 24]; no special tokens, three attention chunks each."""
    return torch.randint(3, 90, (NUM_SAMPLES, LENGTH), generator=torch.Generator().manual_seed(5))


def calibration(folder: Path, algorithm: str = "gptq", **settings: Any) -> Calibration:
    data = write_lines(folder / "tokens.jsonl", [{"input_ids": ids} for ids in token_samples().tolist()])
    sizes = {"num_samples": NUM_SAMPLES, "max_seq_length": LENGTH}
    made = make_calibration(algorithm, data=[data], **(sizes | {"kv_cache_scheme": "fp8"} | settings))
    assert made is not None
    return made


def source(folder: Path, config: dict[str, Any]) -> Path:
    """A small random checkpoint with the sample's tokenizer."""
    made = make_checkpoint(folder / "bf16", config)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(SAMPLE_DIR / name, made)
    settings = json.loads((SAMPLE_DIR / "preprocessor_config.json").read_text())
    size = dict.fromkeys(("height", "width"), VISION["image_size"])
    (made / "preprocessor_config.json").write_text(json.dumps(settings | {"size": size}))
    return made


def converted(
    bf16: Path, out: Path, scheme: str = "W4A16", *, algorithm: str = "gptq", kv_cache: str | None = "fp8"
) -> Report:
    group = {"group_size": 32} if scheme == "W4A16" else {}
    return convert(
        bf16,
        out,
        scheme=preset(scheme, quantize=["attention"], **group),
        calibration=calibration(bf16.parent, algorithm, kv_cache_scheme=kv_cache),
        max_shard_size="200kB",
    )
