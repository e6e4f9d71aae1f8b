"""`chat` in a pipe and on a terminal."""

import contextlib
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_runs import CliRun, run_cli

from llama4_quant.runtime.pipeline import Pipeline, user_message
from llama4_quant.sample import SAMPLE_DIR, shapes

LEN, TUPLE = "What is `len`?", "What is a tuple?"


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained(SAMPLE_DIR, dtype="float32")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "a shape.png"
    shapes.draw(shapes.scenes(held_out=True)[2], random.Random(2)).save(path)
    return path


def _chat(*lines: str, flags: tuple[object, ...] = ()) -> CliRun:
    return run_cli("chat", SAMPLE_DIR, "--dtype", "float32", *flags, stdin="".join(f"{line}\n" for line in lines))


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_every_line_is_a_turn(pipeline: Pipeline) -> None:
    ran = _chat(LEN, "", TUPLE)
    first = "".join(pipeline.chat([user_message(LEN)]))
    second = "".join(pipeline.chat([user_message(LEN), _assistant(first), user_message(TUPLE)]))
    assert (ran.code, ran.out) == (0, f"{first}\n{second}\n")
    lines = ran.err.splitlines()
    assert len(lines) == 2
    assert "ended by eos" in lines[0]
    assert re.search(r"prompt tokens, [1-9]\d* of them cached", lines[1])


def test_json_and_quiet(pipeline: Pipeline) -> None:
    ran = _chat(LEN, TUPLE, flags=("--json", "--quiet", "--max-new-tokens", 3))
    assert ran.err == ""
    first, second = map(json.loads, ran.out.splitlines())
    assert (first["finish_reason"], first["num_new_tokens"], first["num_cached_tokens"]) == ("length", 3, 0)
    assert second["num_cached_tokens"] == first["num_prompt_tokens"] + 2


def test_images_and_system(pipeline: Pipeline, image: Path) -> None:
    question = shapes.QUESTIONS[0]
    ran = _chat(question, f"/image {image}", question, flags=("--image", image, "--system", "Be brief."))
    system, asked = {"role": "system", "content": "Be brief."}, user_message(question, 1)
    first = "".join(pipeline.chat([system, asked], [image]))
    second = "".join(pipeline.chat([system, asked, _assistant(first), asked], [image, image]))
    assert (ran.code, ran.out) == (0, f"{first}\n{second}\n")
    assert "1 image with the next message" in ran.err


def test_commands(tmp_path: Path, pipeline: Pipeline) -> None:
    saved = tmp_path / "chat.json"
    lines = (LEN, f"/save {saved}", "/stats", "/system Be brief.", "/reset", TUPLE, f"/save {saved}", "/exit", LEN)
    ran = _chat(*lines, flags=("--quiet",))
    brief = [{"role": "system", "content": "Be brief."}, user_message(TUPLE)]
    answers = ["".join(pipeline.chat(messages)) for messages in ([user_message(LEN)], brief)]
    assert (ran.code, ran.out) == (0, "".join(f"{answer}\n" for answer in answers))
    assert json.loads(saved.read_text()) == {"messages": [*brief, _assistant(answers[1])]}
    assert "2 messages; the cache holds" in ran.err
    assert "all messages are forgotten" in ran.err


def test_help_names_every_command() -> None:
    ran = _chat("/help")
    for command in ("/reset", "/image PATH", "/system TEXT", "/save FILE", "/stats", "/exit", "/help"):
        assert command in ran.err
    assert ran.out == ""


def test_a_failed_line_is_told_and_the_chat_goes_on(tmp_path: Path, pipeline: Pipeline) -> None:
    there = tmp_path / "there.json"
    there.write_text("precious")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG")
    lines = ("/imagine", "/image", "/image none.png", f"/image {broken}", f"/save {there}", "/save", "/frobnicate")
    ran = _chat(*lines, LEN, flags=("--quiet",))
    assert ran.code == 1
    assert ran.out == "".join(pipeline.chat([user_message(LEN)])) + "\n"
    for line, message in zip(
        ran.err.splitlines(),
        (
            "/imagine is no command; did you mean /image?",
            "/image needs a file",
            "no such file",
            "cannot be read as an image",
            "exists; choose another name",
            "/save needs a file",
            "/help lists them",
        ),
        strict=True,
    ):
        assert line.startswith("error: ")
        assert message in line
    assert there.read_text() == "precious"


def test_two_slashes_say_one(pipeline: Pipeline) -> None:
    assert _chat("//reset", flags=("--quiet",)).out == "".join(pipeline.chat([user_message("/reset")])) + "\n"


def test_settings_are_checked() -> None:
    ran = _chat(LEN, flags=("--temperature", -1))
    assert (ran.code, ran.out) == (1, "")
    assert "temperature is -1.0" in ran.err


# On a terminal


ON_A_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
"""Runs a command on a terminal of its own, and passes on what comes and goes through pipes: a Ctrl-C too."""


class Terminal:
    """A chat in a process of its own that is on a terminal."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process
        self._seen = ""

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def type_until(self, text: str, pattern: str) -> None:
        """Python may miss a Ctrl-C in the moment before it waits for input: do as people do, and press again."""
        for _ in range(20):
            self.type(text)
            with contextlib.suppress(TimeoutError):
                return self.wait_for(pattern, seconds=2)
        return self.wait_for(pattern, seconds=0)

    def wait_for(self, pattern: str, seconds: float = 60) -> None:
        """Read on until the pattern has come since the last call."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self._seen)):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{pattern!r} did not come: {self._seen[-1000:]!r}")
            if select.select([self.process.stdout], [], [], 0.2)[0]:
                data = os.read(self.process.stdout.fileno(), 4096)
                assert data, f"it ended without {pattern!r}: {self._seen!r}"
                self._seen += data.decode(errors="replace")
        self._seen = self._seen[found.end() :]


@contextmanager
def _terminal(*arguments: object) -> Iterator[Terminal]:
    command = [sys.executable, "-c", ON_A_TERMINAL, sys.executable, "-m", "llama4_quant.cli", "chat", *arguments]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=root
    ) as process:
        try:
            yield Terminal(process)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample with a token at which it ends that it never says."""
    folder = tmp_path_factory.mktemp("chat") / "endless"
    shutil.copytree(SAMPLE_DIR, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2047, "max_new_tokens": 4000}')
    return folder


def test_ctrl_c_interrupts_an_answer_and_ctrl_d_ends(endless: Path) -> None:
    """4,000 tokens take half a minute; Ctrl-C comes after the first ones."""
    with _terminal(endless) as terminal:
        terminal.wait_for("> ")
        terminal.type_until("\x03", "Ctrl-D or /exit ends the chat")
        for turn in (1, 2):
            terminal.type("What is `len`?\n")
            terminal.wait_for("Abstract base class")
            terminal.type_until("\x03", r"\[\d+ prompt tokens.* ended by Ctrl-C\]")
            terminal.type("/stats\n")
            terminal.wait_for(rf"{2 * turn} messages; the cache holds [1-9]\d*")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
