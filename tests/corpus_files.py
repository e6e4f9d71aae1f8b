"""Calibration files and checkpoints without weights, for the tests of calibration data."""

import json
import random
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llama4_quant.calibration.corpus import CalibrationSettings, Corpus, Sample, open_corpus
from llama4_quant.sample import SAMPLE_DIR, shapes


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def numbered(count: int, words: int = 30) -> list[str]:
    """Texts of which no two are equal."""
    rng = random.Random(0)
    vocabulary = ["return", "the", "module", "object", "string", "number", "file", "path"]
    return [f"Document {number}: " + " ".join(rng.choices(vocabulary, k=words)) for number in range(count)]


def write_image(path: Path, index: int, canvas: tuple[int, int] = (1, 1)) -> str:
    scene = shapes.scenes(held_out=False)[index]
    shapes.draw(scene, random.Random(index), tiles_high=canvas[0], tiles_wide=canvas[1]).save(path)
    return path.name


def corpus(*data: str, folder: Path = SAMPLE_DIR, **settings: Any) -> Corpus:
    settings = {"num_samples": 4, "max_seq_length": 64, **settings}
    return open_corpus(folder, CalibrationSettings(data=data, **settings))


def rows(samples: Iterable[Sample]) -> list[list[int]]:
    return [sample.input_ids.tolist() for sample in samples]


def text_only_checkpoint(folder: Path) -> Path:
    """The sample's tokenizer with a config.json that has no vision."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copy(SAMPLE_DIR / name, folder)
    config = json.loads((SAMPLE_DIR / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config["text_config"]))
    return folder
