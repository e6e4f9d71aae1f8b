"""What a hostile case is: files in a folder, the commands to run on them, and the error that has to come.

Every case lives in a folder of its own, which is also the working directory:

    model/       the source checkpoint
    out/         the output
    victim.bin   somebody's file, which nobody may touch
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from checkpoint.meta_files import meta_shards, params_json, write_meta
from checkpoints import make_checkpoint, multimodal_config, random_tensors, text_config

from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.run import Conversion

VICTIM = b"somebody's file\n" * 64

COMMANDS = {
    "inspect": ["inspect", "model"],
    "dry-run": ["convert", "model", "--dry-run"],
    "config-only": ["convert", "model/config.json", "--dry-run", "--config-only"],
    "convert": ["convert", "model", "-o", "out", "--workers", "1"],
    "overwrite": ["convert", "model", "-o", "out", "--workers", "1", "--overwrite"],
    "verify": ["verify", "out"],
    "verify-source": ["verify", "out", "--source", "model"],
    "load": ["load", "model"],
    "load-out": ["load", "out"],
    "settings": ["settings", "model"],
    "chat": ["chat", "model"],
}
"""Arguments of the command line; the last four are the library's (see worker.py)."""

SOURCE = ("inspect", "dry-run", "convert", "load")
"""Every way in which a source is opened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One hostile input.

    Attributes:
        name: unique.
        make: writes the case's files into its folder, given also the folder with sound checkpoints (see `Bases`).
        commands: keys of COMMANDS; each has to fail.
        message: regular expression that the error has to match, in full after the path.
    """

    name: str
    make: Callable[[Path, "Bases"], None]
    commands: tuple[str, ...] = SOURCE
    message: str = ""


@dataclass(frozen=True, slots=True)
class Bases:
    """Sound checkpoints that cases start from: bf16, vision, w4a16, fp8, meta, and partial (an interrupted output)."""

    folder: Path

    def put(self, name: str, target: Path) -> Path:
        """A copy, with all times."""
        shutil.copytree(self.folder / name, target)
        return target


class _Stop(Exception):  # noqa: N818 - it stands for a killed process
    pass


def make_bases(folder: Path) -> Bases:
    """Make all sound checkpoints, the same bytes each time; some seconds."""
    folder.mkdir(exist_ok=True)
    clock = SimpleNamespace(perf_counter=lambda: 0.0)
    with (
        contextlib.chdir(folder),  # reports name their source as it was given
        mock.patch("llama4_quant.conversion.convert.time", clock),
        mock.patch("llama4_quant.conversion.run.time", clock),
    ):
        source = make_checkpoint(Path("bf16"), text_config(num_hidden_layers=2))
        for path in source.iterdir():
            os.utime(path, (0, 0))  # in the fingerprint of a conversion
        _write_settings(make_checkpoint(Path("vision"), multimodal_config(num_hidden_layers=1)))
        convert(source, "w4a16", scheme="W4A16", max_shard_size="300kB")
        convert(source, "fp8", scheme="FP8_DYNAMIC")
        _write_meta(Path("meta"))
        _convert_in_part(source, "partial")
    return Bases(folder)


def _convert_in_part(source: Path, out: str) -> None:
    do, count = Conversion._do, [0]

    def stop_early(self: Conversion, *arguments: object) -> None:
        count[0] += 1
        if count[0] > 5:
            raise _Stop
        do(self, *arguments)

    with mock.patch.object(Conversion, "_do", stop_early), contextlib.suppress(_Stop):
        convert(source, out, workers=1)


def _write_settings(folder: Path) -> None:
    """How images are cut and text is sampled, with every key that is read."""
    image = {
        "size": {"height": 28, "width": 28},
        "max_patches": 4,
        "resize_to_max_canvas": False,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9, "max_new_tokens": 64}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "processor_config.json").write_text(json.dumps({"image_token": "<|image|>", "patch_token": "<|patch|>"}))
    tokens = {"eos_token_id": [1, 2], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(sampling | tokens))


def _write_meta(folder: Path) -> None:
    config = multimodal_config(num_hidden_layers=2)
    write_meta(folder, params_json(config), meta_shards(config, random_tensors(config), 1, fused=True))
