"""`--config FILE`: values from files, what wins, and how mistakes are told; and which flags `--help` shows."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from checkpoints import make_checkpoint
from cli_runs import all_commands, run_cli

from llama4_quant.cli.config_file import MAX_BYTES, load_config
from llama4_quant.errors import UsageError

CONFIGURABLE = ("convert", "generate", "chat")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("config") / "bf16")


def _written(folder: Path, text: str, name: str = "flags.yaml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def _load(path: Path, command: str = "convert") -> dict[str, Any]:
    return load_config(path, click.Context(all_commands()[command], info_name=command))


def _plan(*arguments: object) -> dict[str, Any]:
    ran = run_cli("convert", *arguments, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_a_file_is_like_flags(source: Path, tmp_path: Path) -> None:
    text = "scheme: w4a16\ngroup_size: 32\nobserver: absmax\nquantize: [attention, lm-head]\ndry_run: true\n"
    flags = ("--scheme", "w4a16", "--group-size", 32, "--observer", "absmax", "--quantize", "attention")
    expected = _plan(source, *flags, "--quantize", "lm-head", "--dry-run")
    assert _plan(source, "--config", _written(tmp_path, text)) == expected
    as_json = {"scheme": "w4a16", "group-size": 32, "observer": "absmax", "quantize": ["attention", "lm-head"]}
    path = _written(tmp_path, json.dumps(as_json), "flags.json")
    assert _plan(source, "--config", path, "--dry-run") == expected


def test_flags_win(source: Path, tmp_path: Path) -> None:
    path = _written(tmp_path, "group_size: 64\nquantize: attention\n")
    for order in (("--group-size", 32, "--config", path), ("--config", path, "--group-size", 32)):
        planned = _plan(source, "--dry-run", *order, "--quantize", "lm-head")
        assert planned == _plan(source, "--dry-run", "--group-size", 32, "--quantize", "lm-head")


def test_values_of_a_file_count_as_given(source: Path, tmp_path: Path) -> None:
    ran = run_cli("convert", source, "--dry-run", "--config", _written(tmp_path, "max_seq_length: 128"))
    assert ran.code == 1
    assert "--max-seq-length is for calibration" in ran.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("groupsize: 64", "convert has no flag 'groupsize'; did you mean group_size?"),
        ("ignored: x", "did you mean ignore?"),
        ("zzz: 1", "convert has no flag 'zzz'; known keys: output, format, scheme, group_size"),
        ("config: x.yaml", "convert has no flag 'config'"),
        ("is_dry_run: true", "did you mean dry_run?"),
        ("group_size: big", "group_size: 'big' is not a valid integer"),
        ("group_size: 3.7", "group_size: '3.7' is not a valid integer"),
        ("group_size: [32, 64]", "group_size is [32, 64], expected one text or number"),
        ("group_size: {a: 1}", "group_size is {'a': 1}, expected one text or number"),
        ("resume: no", "resume is False, expected one text or number (words like 'yes' need quotes)"),
        ("resume: often", "resume: 'often' is not one of"),
        ("ignore: [[a]]", "ignore is [['a']], expected texts or numbers"),
        ("overwrite: 1", "overwrite is 1, expected true or false"),
        ("group-size: 32\ngroup_size: 64", "group_size is there twice"),
        ("- group_size", "expected flags and their values, like 'group_size: 64', found ['group_size']"),
        ("group_size: [", "this is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "this is not YAML"),
        ("# " + "x" * MAX_BYTES, "expected at most 1,048,576 bytes"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    path = _written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        _load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_damaged_json_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this is not JSON"):
        _load(_written(tmp_path, "group_size: 64", "flags.json"))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read as text in UTF-8"):
        _load(tmp_path / "x.yaml")


def test_a_mistake_is_one_message(source: Path, tmp_path: Path) -> None:
    ran = run_cli("convert", source, "--dry-run", "--config", _written(tmp_path, "groupsize: 64"))
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)


@pytest.mark.parametrize("text", ["", "# nothing\n", "scheme:\n", "{}"])
def test_nothing_is_no_mistake(tmp_path: Path, text: str) -> None:
    assert _load(_written(tmp_path, text)) == {}


@pytest.mark.parametrize("command", CONFIGURABLE)
def test_every_flag_can_be_in_a_file(tmp_path: Path, command: str) -> None:
    """Under the name of its flag; --config, --help and --help-all are none of a file's business."""
    flags = [p for p in all_commands()[command].params if isinstance(p, click.Option) and p.expose_value]
    assert len(flags) > 15
    for flag in flags:
        key = max(flag.opts, key=len).lstrip("-").replace("-", "_")
        value: Any = True if flag.is_flag else 1 if "INT" in flag.type.name.upper() or flag.type is click.FLOAT else "x"
        if isinstance(flag.type, click.Choice):
            value = flag.type.choices[0]
        if isinstance(flag.type, click.Path) and flag.type.exists:
            value = str(_written(tmp_path, "x", "there"))
        path = _written(tmp_path, json.dumps({key: value}), "flags.json")
        assert list(_load(path, command)) == [flag.name]


@pytest.mark.parametrize("command", CONFIGURABLE)
def test_help_shows_few_flags_and_help_all_every_one(command: str) -> None:
    options = [p for p in all_commands()[command].params if isinstance(p, click.Option)]
    rare = {max(option.opts, key=len) for option in options if option.hidden}
    assert rare
    for shown, flags in (("--help", set()), ("--help-all", rare), ("--help", set())):
        text = run_cli(command, shown).out
        assert {flag for flag in rare if f"{flag} " in text} == flags
