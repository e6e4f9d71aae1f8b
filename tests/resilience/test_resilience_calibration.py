"""Interrupted calibrations: killed, stopped, out of disk, continued with something else."""

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from calibrated_runs import calibrate, tiny_checkpoint, token_data
from resilience.resilience_tools import ENVIRONMENT, ROOT, STAGING, contents, interrupt, num_finished, stop_in

from llama4_quant.calibration import rows
from llama4_quant.calibration.rows import RowFile
from llama4_quant.calibration.streams import StreamFiles
from llama4_quant.calibration.weights import Weights
from llama4_quant.checkpoint import journal
from llama4_quant.errors import OutputError
from llama4_quant.scheme import preset
from llama4_quant.verification.verify import verify

SCHEME = preset("W4A16", group_size=32, quantize=["attention"], ignore=["re:.*layers.0.self_attn.k_proj"])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "bf16", num_hidden_layers=2)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return token_data(tmp_path / "tokens.jsonl")


@pytest.fixture
def reference(source: Path, data: str, tmp_path: Path) -> dict[str, bytes]:
    calibrate(source, tmp_path / "reference", [data], scheme=SCHEME)
    return contents(tmp_path / "reference")


@pytest.mark.parametrize("num_kills", [20, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_kills_at_random_moments(tmp_path: Path, num_kills: int) -> None:
    source = tiny_checkpoint(tmp_path / "bf16", num_hidden_layers=3)
    data = token_data(tmp_path / "tokens.jsonl", [24] * 16)
    script = ROOT / "tests" / "resilience" / "calibrated_storm.py"
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, script, source, data, tmp_path / "out", str(num_kills), "5"],
        check=False, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] >= num_kills
    assert counts["finished"] >= 1
    assert counts["resumed"] > num_kills // 3
    assert counts["in layers"] >= num_kills // 4


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (Weights, "quantize", 1), (Weights, "quantize", 4), (Weights, "quantize", 11),
        (Weights, "_record", 2), (Weights, "_record", 9),
        (RowFile, "sync", 1), (RowFile, "sync", 3), (StreamFiles, "advance", 1), (StreamFiles, "advance", 2),
        (Weights, "sync", 1),
    ],
)  # fmt: skip
def test_sigint(
    source: Path, data: str, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
    owner: type, name: str, after: int,
) -> None:  # fmt: skip
    """Wherever it comes, what is finished is kept, and the next run ends with the same bytes and the same report."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_in(patch, owner, name, after, interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrate(source, out, [data], scheme=SCHEME)
    assert num_finished(out) > 0
    assert not (out / "config.json").exists()
    report = calibrate(source, out, [data], scheme=SCHEME, resume="required")
    assert contents(out) == reference
    assert not (out / STAGING).exists()
    first = json.loads((tmp_path / "reference" / "quantization_report.json").read_text())
    assert [w.calibration and w.calibration.num_rows for w in report.weights] == [
        w["calibration"] and w["calibration"]["num_rows"] for w in first["weights"]
    ]
    assert json.loads(json.dumps(report.to_json()))["calibration"] == first["calibration"]
    assert not verify(out, source=source).problems


def test_finished_weights_are_not_solved_again(
    source: Path, data: str, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[str] = []
    solve = Weights._solve

    def watched(self: Weights, name: str, *arguments: Any) -> Any:
        solved.append(name)
        return solve(self, name, *arguments)

    monkeypatch.setattr(Weights, "_solve", watched)
    with monkeypatch.context() as patch:
        stop_in(patch, Weights, "quantize", 6, interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrate(source, tmp_path / "out", [data], scheme=SCHEME)
    calibrate(source, tmp_path / "out", [data], scheme=SCHEME)
    assert len(solved) == len(set(solved)) == sum(name.endswith("weight_packed") for name in names(reference))


def names(output: dict[str, bytes]) -> list[str]:
    return list(json.loads(output["model.safetensors.index.json"])["weight_map"])


def test_progress_adds_up_over_interruptions(
    source: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes reported as done are those of the source, once, whether a run was interrupted or not."""
    for after in (0, 5):
        done: list[int] = []
        if after:
            with monkeypatch.context() as patch:
                stop_in(patch, Weights, "quantize", after, interrupt)
                with pytest.raises(KeyboardInterrupt):
                    calibrate(source, tmp_path / "out5", [data], scheme=SCHEME)
        report = calibrate(
            source, tmp_path / f"out{after}", [data], scheme=SCHEME, progress=lambda _, n, done=done: done.append(n)
        )
        assert sum(done) == report.totals.bytes_in


def test_a_machine_that_crashed_lost_what_was_not_synced(
    source: Path, data: str, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another boot: only what was synced counts, and the position in the layers never says more than that."""
    for after in (3, 9, 12):
        out = tmp_path / f"out{after}"
        with monkeypatch.context() as patch:
            stop_in(patch, Weights, "quantize", after, interrupt)
            with pytest.raises(KeyboardInterrupt):
                calibrate(source, out, [data], scheme=SCHEME)
        with monkeypatch.context() as patch:
            patch.setattr(journal, "boot_id", lambda: "another")
            calibrate(source, out, [data], scheme=SCHEME)
        assert contents(out) == reference


@pytest.mark.parametrize("damage", ["position", "ahead", "no files"])
def test_damaged_scratch_files(
    source: Path, data: str, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """A position that cannot be right begins the pass anew; finished weights are read back."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_in(patch, Weights, "quantize", 9, interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrate(source, out, [data], scheme=SCHEME)
    state = out / STAGING / "calibration" / "state.json"
    content = json.loads(state.read_text())
    assert len(content["records"]) == 1
    if damage == "position":
        state.write_bytes(b"\0" * 50)
    elif damage == "ahead":
        content["records"].append(content["records"][0] | {"layer": 1})
        state.write_text(json.dumps(content))
    else:
        for path in state.parent.iterdir():
            path.unlink()
    calibrate(source, out, [data], scheme=SCHEME)
    assert contents(out) == reference


def test_something_else_is_refused_with_what_differs(
    source: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_in(patch, Weights, "quantize", 4, interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrate(source, out, [data], scheme=SCHEME)
    other = token_data(tmp_path / "other.jsonl", seed=1)
    for changes, named in [
        ({"algorithm": "gptq"}, "calibration algorithm was 'best', is 'gptq'"),
        ({"damp_percent": 0.05}, "calibration solver"),
        ({"data": [other]}, "calibration data"),
        ({"num_samples": 3}, "calibration data"),
        ({"max_seq_length": 63}, "calibration data"),
        ({"seed": 1}, "calibration data"),
        ({"min_tokens_per_expert": 5}, "calibration min_tokens_per_expert was 0, is 5"),
    ]:
        settings = {"scheme": SCHEME, "data": [data]} | changes
        with pytest.raises(OutputError, match=named):
            calibrate(source, out, **settings)
    assert num_finished(out) > 0


def test_a_disk_that_is_full_at_random_moments(
    source: Path, data: str, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of hidden states: a message that names the file, what is finished is kept, and the next run goes on."""
    rng, real, left, out = random.Random(3), rows.write_from, [0], tmp_path / "out"

    def write_from(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    monkeypatch.setattr(rows, "write_from", write_from)
    monkeypatch.setattr(rows, "MEMORY_BYTES", 0)  # in files, however few; the reference had them in memory
    for _ in range(10):
        left[0] = rng.randrange(20)
        with pytest.raises(OutputError, match=r"calibration/[a-z]+(-\d)?\.rows: cannot be written: no space left"):
            calibrate(source, out, [data], scheme=SCHEME)
        assert not (out / "config.json").exists()
    left[0] = 10**9
    calibrate(source, out, [data], scheme=SCHEME)
    assert contents(out) == reference
