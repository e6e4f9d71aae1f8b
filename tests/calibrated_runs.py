"""Tiny checkpoints, data, and calibrated conversions that can be looked into, for tests of calibration."""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_tensors, text_config, write_checkpoint
from torch import Tensor

from llama4_quant.calibration.hessian import Moments
from llama4_quant.calibration.records import LayerRecord
from llama4_quant.calibration.sequential import SequentialPass
from llama4_quant.calibration.settings import make_calibration
from llama4_quant.calibration.streams import Sequences, StreamFiles, Streams
from llama4_quant.calibration.weights import Weights
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.report import Report
from llama4_quant.runtime.loader import load
from llama4_quant.sample import SAMPLE_DIR

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
LENGTHS = (24, 24, 7, 19, 40, 40, 33)


def tiny_checkpoint(
    folder: Path, *, seed: int = 0, change: Callable[[dict[str, Tensor]], None] | None = None, **config: Any
) -> Path:
    """A random text model with the sample's tokenizer, which token data does not use; `change` edits its tensors."""
    settings = text_config(**config)
    tensors = random_tensors(settings, seed)
    if change is not None:
        change(tensors)
    write_checkpoint(folder, settings, tensors)
    for name in TOKENIZER_FILES:
        shutil.copy(SAMPLE_DIR / name, folder)
    return folder


def token_data(path: Path, lengths: Sequence[int] = LENGTHS, *, vocab_size: int = 96, seed: int = 0) -> str:
    """Random token sequences as JSON lines; gives the path as --calibration takes it."""
    rng = random.Random(seed)
    rows = [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return str(path)


def read_tokens(data: str) -> list[list[int]]:
    return [json.loads(line)["input_ids"] for line in Path(data).read_text().splitlines()]


@dataclass
class Seen:
    """What a calibrated conversion ended with: its report, and the hidden states [T, H] of both models."""

    report: Report
    quantized: Tensor
    original: Tensor | None


def calibrate(
    source: Path, out: Path, data: Sequence[str], *, algorithm: str = "best", scheme: Any = "W4A16", **settings: Any
) -> Report:
    conversion = {key: settings.pop(key) for key in ("max_memory", "resume", "progress") if key in settings}
    calibration = make_calibration(algorithm, data=data, **{"max_seq_length": 64} | settings)
    return convert(source, out, scheme=scheme, calibration=calibration, **conversion)


def calibrate_and_look(source: Path, out: Path, data: Sequence[str], **settings: Any) -> Seen:
    """Convert, and read the files of hidden states before they are deleted."""
    seen: list[tuple[Tensor, Tensor | None]] = []
    run = SequentialPass.run

    def looked(self: SequentialPass, sequences: Sequences, embed: Callable[[Streams], None]) -> tuple[LayerRecord, ...]:
        records = run(self, sequences, embed)
        text = self._config.text
        files = StreamFiles(
            self._folder,
            sequences.num_rows,
            text.hidden_size,
            with_original=self._with_original,
            device=torch.device("cpu"),
        )
        with files.open(text.num_hidden_layers) as streams:
            whole = slice(0, sequences.num_rows)
            original = None if streams.original is None else streams.original.read(whole)
            seen.append((streams.quantized.read(whole), original))
        return records

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequentialPass, "run", looked)
        exact_matmul(patch)
        report = calibrate(source, out, data, **settings)
    return Seen(report=report, quantized=seen[0][0], original=seen[0][1])


def collect_moments(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Moments, int]]:
    """Moments, and prior rows among them, by the name of each weight that is quantized from now on."""
    seen: dict[str, tuple[Moments, int]] = {}
    quantize = Weights.quantize

    def watched(self: Weights, names: list[str], moments: Moments, num_prior_rows: int = 0) -> Any:
        seen.update(dict.fromkeys(names, (moments, num_prior_rows)))
        return quantize(self, names, moments, num_prior_rows)

    quantize_rows = Weights.quantize_rows

    def watched_rows(self: Weights, name: str, moments: Moments) -> Iterator[int]:
        seen[name] = moments, 0
        return quantize_rows(self, name, moments)

    monkeypatch.setattr(Weights, "quantize", watched)
    monkeypatch.setattr(Weights, "quantize_rows", watched_rows)
    exact_matmul(monkeypatch)
    return seen


def exact_matmul(patch: pytest.MonkeyPatch) -> None:
    """Matrix products in float32 on every machine."""
    patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def hidden_states(checkpoint: Path, sequences: Sequence[Sequence[int]]) -> Tensor:
    """What the last decoder layer of our runtime gives for each sequence by itself, [T, H] in float32."""
    model = load(checkpoint, dtype="float32")
    states: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _module, _inputs, output: states.append(output[0]))
    with torch.inference_mode():
        for ids in sequences:
            model(torch.tensor([list(ids)]))
    return torch.cat(states)


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm())
