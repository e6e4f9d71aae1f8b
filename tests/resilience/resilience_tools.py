"""What the tests of interrupted conversions share."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4_quant.checkpoint.resume import FINGERPRINT_NAME, digest
from llama4_quant.conversion.run import Conversion
from llama4_quant.work import WorkItem

DRIVER = Path(__file__).with_name("driver.py")
ROOT = DRIVER.parents[2]
STAGING = ".llama4-quant-partial"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(*arguments: object, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """The driver as a process; `launcher` are the arguments of Python before the script."""
    command = [sys.executable, *launcher, str(DRIVER), *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: object, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """The driver, to its end."""
    process = start(*arguments, launcher=launcher)
    out, err = process.communicate(timeout=500)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def num_finished(out: Path) -> int:
    """How many items the journals of an unfinished output hold."""
    return sum(path.read_bytes().count(b'{"item"') for path in (out / STAGING).glob("journal-*.jsonl"))


def wait_for_items(process: subprocess.Popen[str], out: Path, count: int) -> None:
    """Wait until the conversion has finished that many items."""
    deadline = time.monotonic() + 120
    while num_finished(out) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of an output but the report, which holds times."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "quantization_report.json"}


def journal_of(out: Path) -> str:
    """Which job the journals in an unfinished output belong to."""
    return digest(json.loads((out / STAGING / FINGERPRINT_NAME).read_bytes()))


def count_items(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the items that are done from now on."""
    items, do = [], Conversion._do

    def counted(self: Conversion, item: WorkItem, buffer: torch.Tensor) -> None:
        items.append(item.id)
        do(self, item, buffer)

    monkeypatch.setattr(Conversion, "_do", counted)
    return items


def stop_in(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, after: int, stop: Callable[[], None]) -> None:
    """Call `stop` instead of the `after`th call of a method."""
    method, count = getattr(owner, name), 0

    def stopping(self: Any, *arguments: Any, **settings: Any) -> Any:
        nonlocal count
        count += 1
        if count == after:
            stop()
        return method(self, *arguments, **settings)

    monkeypatch.setattr(owner, name, stopping)


def interrupt() -> None:
    """As Ctrl-C; jobs in the background of a shell start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
