"""Functions in a bounded copy of the process: what they return, raise, or take too much of."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama4_quant.runtime import bounded as bounded_module
from llama4_quant.runtime.bounded import BoundedError, bounded


@pytest.fixture(autouse=True)
def no_traces() -> Iterator[None]:
    """Neither children nor open files stay."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("text", ["", "text", "caf\u00e9 \U0001f600", "x" * 10**7])
def test_text_comes_back(text: str) -> None:
    assert bounded(lambda: text) == text


def test_beside_other_threads() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert bounded(lambda: "text") == "text"
    done.set()
    thread.join()


def fail() -> str:
    raise KeyError("the reason")


def fail_without_words() -> str:
    raise RecursionError


def spin() -> str:
    while True:
        pass


def exit_quietly() -> str:
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fail, "the reason"),
        (fail_without_words, "RecursionError"),
        (spin, "more than 1 s or 512 MiB"),
        (lambda: "a" * 10**10, "more than 512 MiB"),
        (lambda: "a" * (17 * 2**20), "wrote more than 16 MiB"),
        (exit_quietly, "it took more than"),
        (lambda: os.kill(os.getpid(), 9), "it took more than"),
    ],
)
def test_what_goes_wrong(monkeypatch: pytest.MonkeyPatch, function: object, message: str) -> None:
    monkeypatch.setattr(bounded_module, "MAX_SECONDS", 1)
    with pytest.raises(BoundedError, match=message):
        bounded(function)


def test_files_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(BoundedError):
        bounded(lambda: str((tmp_path / "file").write_text("something")))
    assert (tmp_path / "file").read_bytes() == b""


def test_what_the_copy_changes_is_lost() -> None:
    values: list[str] = []
    assert bounded(lambda: values.append("x") or "text") == "text"
    assert values == []
