"""The user's walk through a calibrated conversion on the command line."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from calibrated_runs import tiny_checkpoint, token_data
from cli_runs import all_commands

from llama4_quant.calibration import run as calibration_run
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.cli.main import main
from llama4_quant.sample import SAMPLE_DIR


@dataclass(frozen=True)
class Ran:
    """What a command printed and how it ended."""

    exit_code: int
    stdout: str
    stderr: str


def convert(*arguments: object) -> Ran:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["llama4-quant", "convert", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("cli") / "bf16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithm", "rtn", "--calibration", "x.txt"], "--calibration is for calibration, and rtn"),
        (["--num-calibration-samples", "8"], "--num-calibration-samples is for calibration"),
        (["--seed", "1", "--device", "cpu"], "--seed, --device are for calibration"),
        (["--min-tokens-per-expert", "5"], "--min-tokens-per-expert is for calibration"),
        (["--algorithm", "best", "--min-tokens-per-expert", "-1"], "expected 0 or more"),
        (["--algorithm", "gptq", "--format", "bf16"], "bf16"),
        (["--algorithm", "gptq", "--format", "fbgemm-fp8"], "--format fbgemm-fp8 is written without calibration"),
        (["--algorithm", "gptq", "--calibration", "nowhere.txt", "--max-seq-length", "64"], "nowhere.txt"),
        (["--algorithm", "gptq", "--num-calibration-samples", "0"], "expected an integer of at least 1"),
        (["--algorithm", "gptq", "--max-seq-length", "100000"], "positions"),
        (["--algorithm", "gptq", "--device", "nowhere"], "device 'nowhere' cannot be used here"),
        (["--algorithm", "gptq", "--max-memory", "110MiB"], "--max-memory"),
        (["--algorithm", "best", "--max-memory", "300MiB"], "or --algorithm rtn"),
    ],
)  # fmt: skip
def test_wrong_combinations(source: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    """One message that names the flag; nothing is left in the output."""
    done = convert(source, "-o", tmp_path / "out", *arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_tables_after_a_calibration(source: Path, tmp_path: Path) -> None:
    data = token_data(tmp_path / "tokens.jsonl")
    done = convert(
        source, "-o", tmp_path / "out", "--group-size", 32, "--calibration", data, "--num-calibration-samples", 6,
        "--max-seq-length", 64,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("calibrated (best) on 6 samples, 154 tokens: ") for line in lines)
    start = next(index for index, line in enumerate(lines) if "hidden states after each layer" in line)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines[start:] if "│" in line]
    layers = [row for row in rows if row[0] in {"0", "1", "2", "3"}]
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())["calibration"]
    for row, layer in zip(layers, report["layers"], strict=True):
        rows_per_expert = layer["rows_per_expert"]
        assert row[1].startswith(f"{min(rows_per_expert)} to {max(rows_per_expert)}" if rows_per_expert else "dense")
        assert row[2] == f"{layer['relative_error']:.2%}"
        assert row[3] == f"{layer['sqnr_db']:.1f} dB"
    for note in report["notes"]:
        assert note[:60] in done.stdout


def test_the_built_in_text_is_mentioned(tmp_path: Path) -> None:
    done = convert(
        SAMPLE_DIR, "-o", tmp_path / "out", "--algorithm", "gptq", "--num-calibration-samples", 1,
        "--max-seq-length", 64,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "note: No calibration data was given, so the built-in text is used" in done.stdout
    assert "calibrated (gptq) on 1 samples, 64 tokens" in done.stdout


@pytest.mark.parametrize("arguments", [["--algorithm", "best"], ["--calibration", "not-there.jsonl"]])
def test_a_dry_run_reads_neither_weights_nor_data(
    source: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """It shows the memory that calibration takes."""

    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    for name in ("read", "read_rows", "read_slice"):
        monkeypatch.setattr(CheckpointReader, name, read)
    monkeypatch.setattr(calibration_run, "open_corpus", read)
    plain = json.loads(convert(source, "--dry-run", "--json").stdout)
    planned = json.loads(convert(source, "--dry-run", "--json", *arguments).stdout)
    assert planned["memory"]["smallest"] > plain["memory"]["smallest"]
    assert planned["memory"]["predicted"] >= plain["memory"]["predicted"]
    assert planned["calibration"] is None
    refused = convert(source, "--dry-run", *arguments, "--max-memory", "300MiB")
    assert refused.exit_code == 1
    assert "is too little to calibrate" in refused.stderr


def test_a_dry_run_of_maverick(tmp_path: Path) -> None:
    """From config.json alone."""
    config = Path(__file__).parents[1] / "data" / "maverick.json"
    done = convert("--dry-run", "--config-only", config, "--algorithm", "best", "--max-memory", "64GiB", "--json")
    assert done.exit_code == 0, done.stderr
    memory = json.loads(done.stdout)["memory"]
    assert 4 * 2**30 < memory["smallest"] < 20 * 2**30


def test_every_flag_is_documented() -> None:
    """In docs/cli.md, under `convert`."""
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    section = text.partition("## convert")[2].partition("\n## ")[0]
    flags = {option for parameter in all_commands()["convert"].params for option in parameter.opts if "--" in option}
    assert {flag for flag in flags if f"`{flag}" not in section} <= {"--help", "--json", "--revision"}
