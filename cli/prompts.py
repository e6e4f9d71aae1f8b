"""Prompts of `generate`: from flags, or from a file with many."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from llama4_quant.checkpoint.json_files import one_line, shown
from llama4_quant.errors import UsageError
from llama4_quant.runtime.pipeline import Pipeline, user_message

IMAGE = "<|image|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What to answer: a text with images, and a system message or None."""

    text: str
    images: tuple[Path, ...] = ()
    system: str | None = None

    def render(self, pipeline: Pipeline, *, raw: bool) -> str:
        """As the model reads it: through the chat template, or as it is, images first.

        Raises:
            UsageError: no template, or it does not take the messages.
        """
        if raw:
            return IMAGE * len(self.images) + self.text
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return pipeline.tokenizer.render_chat([*system, user_message(self.text, len(self.images))])


def read_prompts(path: Path, images: Sequence[Path], system: str | None) -> list[Prompt]:
    """Prompts of a file, or of stdin for `-`: one per line; in a `.jsonl` file an object per line.

    Args:
        path: UTF-8; empty lines are skipped. Keys of an object: `prompt`, and if you like `images`, a list of files,
            and `system`.
        images: shown with every prompt, before its own.
        system: for prompts that have none.

    Raises:
        UsageError: the file cannot be read or has no prompts, or a line is not such an object.
    """
    try:
        with click.open_file(str(path), encoding="utf-8") as file:
            lines = [(number, line.strip()) for number, line in enumerate(file, 1)]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text in UTF-8 ({one_line(error)})") from error
    is_json = path.suffix in {".jsonl", ".ndjson"}
    prompts = [
        _parsed(f"{path}, line {number}", line, images, system)
        if is_json
        else Prompt(text=line, images=tuple(images), system=system)
        for number, line in lines
        if line
    ]
    if not prompts:
        raise UsageError(f"{path}: expected a prompt per line, and there is none")
    return prompts


def _parsed(where: str, line: str, images: Sequence[Path], system: str | None) -> Prompt:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: this is not JSON ({one_line(error)})") from error
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UsageError(
            f'{where} is {shown(values)}, expected an object like {{"prompt": "...", "images": ["a.jpg"]}}'
        )
    if unknown := values.keys() - {"prompt", "images", "system"}:
        raise UsageError(f"{where}: unknown {shown(min(unknown))}; known keys: prompt, images, system")
    own = values.get("images", [])
    if not isinstance(own, list) or not all(isinstance(image, str) for image in own):
        raise UsageError(f"{where}: images is {shown(own)}, expected a list of files")
    if not isinstance(values.get("system", ""), str):
        raise UsageError(f"{where}: system is {shown(values['system'])}, expected a text")
    return Prompt(text=values["prompt"], images=(*images, *map(Path, own)), system=values.get("system", system))
