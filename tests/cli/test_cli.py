"""The command line's contract: exit codes, one clean message, data on stdout and talk on stderr, JSON."""

import json
import re
from pathlib import Path

import click
import pytest
from checkpoints import make_checkpoint
from cli_runs import all_commands, run_cli

from llama4_quant.architecture import Llama4Config
from llama4_quant.cli.main import cli
from llama4_quant.conversion import request
from llama4_quant.planning.make import make_plan
from llama4_quant.runtime.cache import cache_bytes
from llama4_quant.runtime.cache_formats import CacheDtype
from llama4_quant.sample import HELD_OUT_TEXT, SAMPLE_DIR

PROMPT = "Return a new string object with"
"""The sample continues it for more than a few tokens."""
MAVERICK = Path(__file__).parent.parent / "data" / "maverick.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "bf16")


@pytest.mark.parametrize("command", [[], *([name] for name in all_commands())], ids=" ".join)
def test_help_names_every_command_and_fits_the_contract(command: list[str]) -> None:
    ran = run_cli(*command, "--help")
    assert ran.code == 0
    assert "Usage: llama4-quant" in ran.out
    assert ran.err == ""
    # At most 20 flags a command; rarer ones are in --help-all, docs/cli.md and --config.
    flags = [flag for name in command for flag in all_commands()[name].params if isinstance(flag, click.Option)]
    assert len([flag for flag in flags if not flag.hidden]) <= 20
    assert set(all_commands()) == {"convert", "inspect", "verify", "generate", "chat", "eval", "demo"}


def test_version() -> None:
    assert run_cli("--version").out.startswith("llama4-quant, version 0.")


def test_convert_prints_a_table_and_writes(source: Path, tmp_path: Path) -> None:
    ran = run_cli("convert", source, "-o", tmp_path / "out", "--group-size", 32, "--quantize", "attention")
    assert ran.code == 0
    assert "W4A16 (int4 g32, mse)" in ran.out
    assert "not asked for: --quantize lm-head" in ran.out
    assert (tmp_path / "out" / "quantization_report.json").exists()
    assert str(tmp_path / "out") in ran.out


def test_convert_plans_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    monkeypatch.setattr(request, "make_plan", lambda *a, **k: plans.append(make_plan(*a, **k)) or plans[-1])
    assert run_cli("convert", source, "-o", tmp_path / "out").code == 0
    assert len(plans) == 1


def test_convert_json_is_the_report(source: Path, tmp_path: Path) -> None:
    ran = run_cli("convert", source, "-o", tmp_path / "out", "--scheme", "fp8-dynamic", "--json")
    assert json.loads(ran.out) == json.loads((tmp_path / "out" / "quantization_report.json").read_text())


def test_kv_cache_scales_need_calibration(source: Path, tmp_path: Path) -> None:
    ran = run_cli("convert", source, "-o", tmp_path / "out", "--group-size", 32, "--kv-cache-scheme", "fp8")
    assert ran.code != 0
    assert "--kv-cache-scheme is for calibration, and rtn rounds to nearest without data" in ran.err
    assert not (tmp_path / "out").exists()
    planned = ("convert", source, "--dry-run", "--group-size", 32, "--json")
    plain = json.loads(run_cli(*planned).out)
    cached = json.loads(run_cli(*planned, "--algorithm", "gptq", "--kv-cache-scheme", "fp8").out)
    assert cached["totals"]["bytes_out"] == plain["totals"]["bytes_out"] + 4 * 2 * 4
    assert cached["weights"] == plain["weights"]


def test_dry_run_of_maverick_without_weights(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    ran = run_cli("convert", "--dry-run", "--config-only", MAVERICK, "--scheme", "W4A16", "--save-plan", plan)
    assert ran.code == 0
    assert "401.6 B parameters, 803.2 GB in, 215.9 GB out: 4.302 bits per weight" in ran.out
    assert "9,216" in ran.out
    saved = json.loads(plan.read_text())
    assert saved["totals"]["bytes_in"] == 803_167_562_752
    # 1,061 tensors, of which 48 are fused experts: 24 layers x 128 experts x 3 projections instead.
    assert len(saved["weights"]) == 1_061 - 48 + 24 * 128 * 3
    assert saved == json.loads(run_cli("convert", "--dry-run", "--config-only", MAVERICK, "--json").out)


@pytest.mark.parametrize(
    "pattern", [r"re:.*layers\.[a-z0]\..*_proj", r"re:.*layers\.0\..*[/gu].*proj", "re:.*:cat:|.*gate"]
)
def test_patterns_are_shown_as_they_are(source: Path, pattern: str) -> None:
    """Brackets and colons mean something to rich: it would drop `[a-z0]` and fail on `[/gu]`."""
    ran = run_cli("convert", "--dry-run", source, "--group-size", 32, "--ignore", pattern, "--ignore", "re:.*experts")
    assert ran.code == 0
    assert f"--ignore {pattern}" in ran.out


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    assert run_cli("convert", source, "-o", tmp_path / "out", "--dry-run").code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["convert"], 2, "Missing argument 'SRC'"),
        (["convert", "{source}"], 1, "convert needs -o OUT"),
        (
            ["convert", "{source}", "-o", "{tmp}/out", "--scheme", "W3"],
            1,
            "known schemes: W4A16, FP8_DYNAMIC, FP8_BLOCK",
        ),
        (["convert", "{source}", "-o", "{tmp}/out", "--observer", "magic"], 1, "known observers: absmax, mse"),
        (["convert", "{source}", "-o", "{tmp}/out", "--ignore", "nothing"], 1, "matches none of the model's"),
        (["convert", "{source}", "-o", "{tmp}/out", "--max-shard-size", "big"], 1, "is not a size"),
        (["convert", "{source}", "--dry-run", "--max-shard-size", "big"], 1, "is not a size"),
        (["convert", "{source}", "-o", "{tmp}/out", "--config-only"], 1, "go with --dry-run"),
        (["convert", "{source}", "-o", "{source}"], 1, "source"),
        (["convert", "{tmp}", "-o", "{tmp}/out"], 1, "expected a folder with config.json"),
        (["convert", "{source}", "--dry-run", "--save-plan", "{tmp}/no/plan.json"], 1, "No such file"),
        (["inspect", "{tmp}/nowhere"], 1, "nowhere"),
        (["generate", "{source}", "--prompt", "x", "--image", "{tmp}/none.png"], 2, "does not exist"),
        (["generate", "{source}", "--prompt", "x", "--group-size", "32"], 1, "add --scheme"),
        (["generate", "{source}", "--prompt", "x", "--observer", "absmax"], 1, "add --scheme"),
        (["generate", "{source}", "--prompt", "x", "--device", "abacus"], 1, "device abacus cannot be used"),
        (["generate", "{source}", "--prompt", "x", "--dtype", "int8"], 1, "dtype int8 is not supported"),
        (["eval", "{source}", "--text", "{tmp}"], 2, "is a directory"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_mistakes_give_one_message(source: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    ran = run_cli(*(argument.format(source=source, tmp=tmp_path) for argument in arguments))
    assert ran.code == code
    assert message in ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    if code == 1:
        assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        run_cli("--debug", "inspect", tmp_path / "nowhere")


def test_inspect_json() -> None:
    found = json.loads(run_cli("inspect", SAMPLE_DIR, "--json").out)
    assert found["num_bytes"] == 2 * found["num_weights"]
    assert sum(role["num_weights"] for role in found["roles"]) == found["num_weights"]
    assert "experts.7.down_proj" in run_cli("inspect", SAMPLE_DIR, "--weights").out


def test_inspect_says_what_a_cache_takes() -> None:
    facts = dict(json.loads(run_cli("inspect", SAMPLE_DIR, "--context", 1000, "--json").out)["facts"])
    text = Llama4Config.from_dict(json.loads((SAMPLE_DIR / "config.json").read_text())).text
    for kind in ("bf16", "fp8", "int8"):
        predicted = cache_bytes(text, 1000, kind=CacheDtype(kind))
        assert facts[f"KV cache, 1,000 tokens, {kind}"].startswith(f"{predicted:,} bytes (")
    refused = run_cli("inspect", SAMPLE_DIR, "--context", 0)
    assert refused.code == 1
    assert "context is 0, expected at least 1" in refused.err


@pytest.mark.parametrize("flags", [("--kv-cache-dtype", "int8"), ("--prefill-chunk-size", 5), ("--attention", "eager")])
def test_generate_with_other_caches_chunks_and_attention(flags: tuple[object, ...]) -> None:
    command = ("generate", SAMPLE_DIR, "--prompt", "What is a list?", "--max-new-tokens", 4, "--json", *flags)
    assert json.loads(run_cli(*command).out)["text"].strip()


def test_generate_streams_text_and_counts() -> None:
    ran = run_cli("generate", SAMPLE_DIR, "--prompt", PROMPT, "--max-new-tokens", 5, "--raw")
    assert ran.code == 0
    assert re.fullmatch(
        r"\d+ prompt tokens \(at [\d.]+ tokens/s\), first token after \d+\.\d\d s, "
        r"5 new tokens \(at [\d.]+ tokens/s\), peak memory [\d.]+ [MG]B, ended by length\n",
        ran.err,
    )
    as_json = json.loads(
        run_cli("generate", SAMPLE_DIR, "--prompt", PROMPT, "--max-new-tokens", 5, "--raw", "--json").out
    )
    assert as_json["text"] == ran.out.removesuffix("\n")
    assert as_json["num_new_tokens"] == 5


def test_generate_on_the_fly_equals_offline(tmp_path: Path) -> None:
    run_cli("convert", SAMPLE_DIR, "-o", tmp_path / "out", "--scheme", "W4A16", "--group-size", 64)
    arguments = ["--prompt", "What is `len`?", "--max-new-tokens", 12]
    offline = run_cli("generate", tmp_path / "out", *arguments)
    on_the_fly = run_cli("generate", SAMPLE_DIR, "--scheme", "W4A16", "--group-size", 64, *arguments)
    assert offline.out == on_the_fly.out != ""


def test_eval_table_and_json(tmp_path: Path) -> None:
    run_cli("convert", SAMPLE_DIR, "-o", tmp_path / "out", "--scheme", "W4A16")
    arguments = ["--reference", SAMPLE_DIR, "--text", HELD_OUT_TEXT, "--seq-length", 64, "--num-windows", 3]
    ran = run_cli("eval", tmp_path / "out", *arguments)
    assert ran.code == 0
    for line in ("perplexity", "KL to reference (nats/token)", "top-1 agreement", "standard error"):
        assert line in ran.out
    result = json.loads(run_cli("eval", tmp_path / "out", *arguments, "--json").out)
    assert result["num_tokens"] == 3 * 63
    assert result["comparison"]["divergence"]["value"] > 0
    itself = json.loads(run_cli("eval", SAMPLE_DIR, *arguments, "--json").out)
    assert itself["comparison"]["divergence"]["value"] == 0
    assert itself["comparison"]["agreement"]["value"] == 1


def test_eval_text_too_short_says_how_many_windows_fit(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("hello " * 50)
    ran = run_cli("eval", SAMPLE_DIR, "--text", text, "--seq-length", 32, "--num-windows", 100)
    assert ran.code == 1
    assert "windows of 32 positions fit, but 100 are needed" in ran.err


def test_every_flag_is_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    flags = {
        name
        for command in [cli, *all_commands().values()]
        for parameter in command.params
        for name in parameter.opts
        if name.startswith("-")
    }
    assert {flag for flag in flags if f"`{flag}" not in text} == set()


def test_tests_that_the_docs_name_exist() -> None:
    root = Path(__file__).parents[2]
    named = set(re.findall(r"`(test_\w+)`", (root / "docs" / "resilience.md").read_text()))
    files = (root / "tests").rglob("test_*.py")
    there = {name for path in files for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert named
    assert named - there == set()
