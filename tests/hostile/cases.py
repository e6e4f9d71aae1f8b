"""What a hostile case is: files in a folder, the commands to run on them, and the error that has to come.

Every case lives in a folder of its own, which is also the working directory:

    model/       the source checkpoint
    out/         the output
    victim.bin   somebody's file, which nobody may touch
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checkpoints import make_checkpoint, multimodal_config, random_tensors, text_config

from llama4_quant.conversion import Conversion
from llama4_quant.convert import convert

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
    """Make all sound checkpoints; some seconds."""
    source = make_checkpoint(folder / "bf16", text_config(num_hidden_layers=2))
    make_checkpoint(folder / "vision", multimodal_config(num_hidden_layers=1))
    convert(source, folder / "w4a16", scheme="W4A16", max_shard_size="300kB")
    convert(source, folder / "fp8", scheme="FP8_DYNAMIC")
    _write_meta(folder / "meta")
    do, count = Conversion._do, [0]

    def stop_early(self: Conversion, *arguments: object) -> None:
        count[0] += 1
        if count[0] > 5:
            raise _Stop
        do(self, *arguments)

    Conversion._do = stop_early
    try:
        convert(source, folder / "partial", workers=1)
    except _Stop:
        pass
    finally:
        Conversion._do = do
    return Bases(folder)


def _write_meta(folder: Path) -> None:
    from checkpoint.meta_files import meta_shards, params_json, write_meta  # noqa: PLC0415

    config = multimodal_config(num_hidden_layers=2)
    write_meta(folder, params_json(config), meta_shards(config, random_tensors(config), 1, fused=True))
