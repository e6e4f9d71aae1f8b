"""What is timed, the same for every engine: prefill of a prompt, then decode steps with one row and with several.

Standard library only: the peers' environments need not have torch. The tokens of a decode step are given, not sampled,
so all engines do the same work on the same experts, and nobody's sampler counts.
"""

import json
import os
import re
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """A loaded model with one cache."""

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        """Forget everything, then compute these prompts of equal length, and the logits of their last tokens."""

    def step(self, tokens: Sequence[int]) -> None:
        """Compute one more token of every row, and its logits."""

    def logits(self) -> list[list[float]]:
        """Of the last call, row by row, fp32. Not timed."""


def read_job() -> dict[str, Any]:
    """The job whose file is the first argument of this process; its threads are in the environment already."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return job


def measure(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Time an engine on a job's tokens.

    Before anything is timed, every kind of call is made once: pages are touched and weights decompressed. Rounds stop
    early when the job's seconds are used up, but not before the second.

    Returns:
        Seconds of every prefill and of every round of decode steps by batch size.
    """
    deadline = time.perf_counter() + job["seconds"]
    engine.prefill([job["prompt"]])
    fingerprint = list(engine.logits())
    prefill = _rounds(lambda _: engine.prefill([job["prompt"]]), job["rounds"], deadline)
    decode = {}
    for prompts in ([job["prompt"]], job["batch"]):
        engine.prefill(prompts)
        tokens = job["decode"]
        engine.step([row[-1] for row in tokens[: len(prompts)]])
        fingerprint += engine.logits()
        columns = [[row[index] for row in tokens[: len(prompts)]] for index in range(len(tokens[0]))]

        def steps(count: int, columns: list[list[int]] = columns) -> None:
            for column in columns[count : count + job["steps"]]:
                engine.step(column)

        deadline = time.perf_counter() + job["seconds"]
        seconds = _rounds(lambda count: steps(count * job["steps"]), job["rounds"], deadline)
        decode[str(len(prompts))] = [value / job["steps"] for value in seconds]
    return {"prefill": prefill, "decode": decode, "fingerprint": _keep(fingerprint, Path(job["logits"]))}


def _rounds(run: Callable[[int], None], count: int, deadline: float) -> list[float]:
    seconds: list[float] = []
    while len(seconds) < count and (len(seconds) < 2 or time.perf_counter() < deadline):
        start = time.perf_counter()
        run(len(seconds))
        seconds.append(time.perf_counter() - start)
    return seconds


def _keep(rows: list[list[float]], path: Path) -> str:
    """Logits in a file, as fp32, row after row."""
    with path.open("wb") as file:
        for row in rows:
            array("f", row).tofile(file)
    return str(path)


def peak_bytes() -> int:
    """Peak resident memory of this process; pages of mapped files count."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


def write_result(variants: dict[str, dict[str, Any]], **facts: Any) -> None:
    """Write what was measured, by variant of settings, to the file that is the second argument of this process."""
    result = {"variants": variants, "peak_bytes": peak_bytes(), "load": os.getloadavg()[0], **facts}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
