"""Every hostile input gives one clear error, quickly, in bounded memory, and touches nothing.

Commands run in a process of their own whose memory is limited; see worker.py. What a case is: cases.py.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile.cases import COMMANDS, VICTIM, Bases, Case, make_bases
from hostile.corpus import KINDS, corpus
from hostile.output_cases import JOURNAL, UNREADABLE_LINES, line, session
from hostile.sandbox import Process, snapshot
from resilience.resilience_tools import contents

from llama4_quant.checkpoint.paths import STAGING_NAME

CASES = corpus()
MAX_SECONDS = 2.0
"""Of the processor: the clock on the wall says more about the machine."""
MAX_RESIDENT = 400 * 2**20
"""Above what the process holds before its first command: a header of 64 MiB is read, decoded and searched."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return make_bases(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def worker() -> Iterator[Process]:
    process = Process("worker.py")
    yield process
    process.close()


def test_the_corpus_is_as_large_as_the_docs_say() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs" / "security.md").read_text().split())
    assert f"{len(CASES)} hostile inputs" in text
    for kind, cases in KINDS.items():
        assert f"{len(cases())} {kind}" in text
    assert len(CASES) >= 60


@pytest.mark.parametrize("command", COMMANDS)
def test_the_bases_are_sound(bases: Bases, worker: Process, tmp_path: Path, command: str) -> None:
    """Otherwise every case could fail for a reason of its own."""
    bases.put("vision" if command == "settings" else "bf16", tmp_path / "model")
    if "out" in command or "verify" in command:
        bases.put("w4a16", tmp_path / "out")
    if command == "convert":
        bases.put("partial", tmp_path / "out")
    if command in {"settings", "chat"}:
        for file in (Path(__file__).parents[2] / "llama4_quant" / "sample" / "model").glob("*[a-z].j*"):
            if file.name not in {"config.json", "model.safetensors.index.json", "preprocessor_config.json"}:
                shutil.copy(file, tmp_path / "model")
        (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": {"height": 28, "width": 28}}')
        (tmp_path / "model" / "processor_config.json").unlink()
    result = worker.ask({"arguments": COMMANDS[command], "folder": str(tmp_path)})
    assert (result["code"], result["err"]) == (0, "")
    assert result["seconds"] < MAX_SECONDS


@pytest.mark.parametrize("base", ["vision", "meta"])
def test_the_other_bases_are_sound(bases: Bases, worker: Process, tmp_path: Path, base: str) -> None:
    bases.put(base, tmp_path / "model")
    for command in ("inspect", "dry-run", "convert", "load"):
        result = worker.ask({"arguments": COMMANDS[command], "folder": str(tmp_path)})
        assert (result["code"], result["err"]) == (0, "")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile_input(case: Case, bases: Bases, worker: Process, tmp_path: Path) -> None:
    (tmp_path / "victim.bin").write_bytes(VICTIM)
    case.make(tmp_path, bases)
    has_output = (tmp_path / "out").exists()
    before = snapshot(tmp_path, leave_out="out" if has_output else None)
    for command in case.commands:
        result = worker.ask({"arguments": COMMANDS[command], "folder": str(tmp_path)})
        said = result["err"]
        assert result["code"] == 1, (command, result)
        assert "Traceback" not in said
        if "verify" in command and not said:
            said = result["out"]  # damage is a result, not an error
        else:
            assert result["out"] == ""
            assert said.startswith("error: ")
            assert said.endswith("\n")
            assert said[:-1].isprintable(), said  # so it is one line
            assert len(said) < 1000
        assert re.search(case.message, said), (command, said)
        assert result["seconds"] < MAX_SECONDS, command
        assert result["peak"] - worker.greeting["peak"] < MAX_RESIDENT
        assert snapshot(tmp_path, leave_out="out" if has_output else None) == before, command


@pytest.mark.parametrize("name", UNREADABLE_LINES)
def test_a_line_that_no_conversion_writes_ends_a_journal(
    name: str, bases: Bases, worker: Process, tmp_path: Path
) -> None:
    """What comes before it counts, and the rest is done again: the bytes are those of an uninterrupted run."""
    bases.put("bf16", tmp_path / "model")
    staging = bases.put("partial", tmp_path / "out") / STAGING_NAME
    (staging / JOURNAL).write_bytes(session(staging) + line(UNREADABLE_LINES[name]))
    result = worker.ask({"arguments": COMMANDS["convert"], "folder": str(tmp_path)})
    assert (result["code"], result["err"]) == (0, "")
    reference = tmp_path / "reference"
    reference.mkdir()
    bases.put("bf16", reference / "model")
    result = worker.ask({"arguments": COMMANDS["convert"], "folder": str(reference)})
    assert contents(tmp_path / "out") == contents(reference / "out")
