"""docs/generation.md: every command and every program on the page runs, on the sample model."""

import json
import random
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_runs import run_cli

from llama4_quant.runtime.sampling import GenerationSettings
from llama4_quant.sample import SAMPLE_DIR, shapes

PAGE = (Path(__file__).parents[1] / "docs" / "generation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def _blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with everything that the page names."""
    shutil.copytree(SAMPLE_DIR, tmp_path / "scout-w4a16")
    for index, name in enumerate(("a.jpg", "b.jpg")):
        shapes.draw(shapes.scenes(held_out=True)[index], random.Random(index)).save(tmp_path / name)
    (tmp_path / "questions.txt").write_text("What is a list?\nWhat is a tuple?\n")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"prompt": "What is this?", "images": ["a.jpg"]}) + "\n")
    (config,) = _blocks("yaml")
    (tmp_path / "generate.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_programs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In order, as one program."""
    names: dict[str, Any] = {}
    programs = _blocks("python")
    assert len(programs) == 6
    for program in programs:
        exec(compile(program, "docs/generation.md", "exec"), names)
        assert capsys.readouterr().out.strip()


def test_commands(folder: Path) -> None:
    lines = [line for text in _blocks("") for line in text.splitlines()]
    commands = [shlex.split(line) for line in lines]
    assert len(commands) == 8
    assert {command[0] for command in commands} == {"llama4-quant"}
    for command in commands:
        ran = run_cli(*command[1:], stdin="What is a list?\n")
        assert ran.code == 0, (command, ran.err)
        assert ran.out.strip()
        assert ("ended by" in ran.err) == ("--config" not in command)  # the file says quiet


def test_every_setting_is_in_the_table() -> None:
    for name in GenerationSettings.__dataclass_fields__:
        assert f"`{name}`" in PAGE
