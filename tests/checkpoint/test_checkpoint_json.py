"""Strict parsing of JSON; texts that it refuses are in tests/hostile/json_cases.py."""

import json
import os
from pathlib import Path

import pytest

from llama4_quant.checkpoint import json_files
from llama4_quant.checkpoint.json_files import MAX_DEPTH, dump_json, parse_json, read_json, shown
from llama4_quant.errors import CheckpointError, ConfigError


def test_nesting_up_to_the_limit_is_read_and_brackets_in_strings_do_not_count() -> None:
    inner = b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1)
    text = json.dumps('\\"[{' * 100).encode()
    value = parse_json(b'{"deep":' + inner + b',"text":' + text + b"}", "here")
    assert value["text"] == '\\"[{' * 100
    with pytest.raises(ConfigError, match="nested more than 64"):
        parse_json(b'{"deep":[' + inner + b"]}", "here")


def test_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_JSON_BYTES", 20)
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": 1}' + b" " * 12)
    assert read_json(path) == {"a": 1}
    path.write_bytes(b'{"a": 1}' + b" " * 13)
    with pytest.raises(ConfigError, match="at most 20 bytes"):
        read_json(path)


def test_things_that_are_not_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="not a file"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a file"):
        read_json(tmp_path / "pipe")  # would hang if it were opened


def test_the_caller_chooses_the_error_class() -> None:
    with pytest.raises(CheckpointError, match="here"):
        parse_json(b"", "here", CheckpointError)


def test_dump_json_keeps_order_and_refuses_nan() -> None:
    assert dump_json({"b": "é", "a": [1]}) == '{\n  "b": "é",\n  "a": [\n    1\n  ]\n}\n'.encode()
    with pytest.raises(ValueError, match="JSON compliant"):
        dump_json({"a": float("nan")})


def test_shown_is_short_and_printable() -> None:
    assert shown("\x1b[31m") == "'\\x1b[31m'"
    assert len(shown("x" * 10_000)) < 120
