"""`convert --target-bits` on the command line."""

import json
import sys
from pathlib import Path

import pytest
from mixed_runs import tiny_model, token_lines

from llama4_quant.cli.main import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target-bits")
    token_lines(folder / "tokens.jsonl")
    return tiny_model(folder / "bf16")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["llama4-quant", "convert", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_convert(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--calibration", source.parent / "tokens.jsonl", "--max-seq-length", 64]
    arguments = ["--quantize", "attention", "--algorithm", "gptq", "--target-bits", 4.6, "--json"]
    assert run(monkeypatch, source, "-o", tmp_path / "out", *data, *arguments) == 0
    record = json.loads(capsys.readouterr().out)["calibration"]["mixed_precision"]
    assert record["target_bits"] == 4.6
    assert 4.4 < record["bits"] <= 4.6


def test_a_dry_run_says_that_schemes_are_not_known_yet(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, source, "--dry-run", "--target-bits", 4.5) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--target-bits 4.5: weights of the decoder will get int4, FP8 or BF16" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-bits", 4.01], "--target-bits 4.01 is too little"),
        (["--target-bits", 4.5, "--algorithm", "rtn"], "--target-bits is for calibration"),
        (["--target-bits", 4.5, "--scheme", "FP8_DYNAMIC"], "drop --scheme, or give W4A16"),
    ],
)
def test_refused(
    options: list[object],
    message: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, source, "--dry-run", *options) != 0
    assert message in " ".join(capsys.readouterr().err.split())
