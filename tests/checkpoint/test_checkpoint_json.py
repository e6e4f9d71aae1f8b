import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest

from llama4_quant.checkpoint import json_files
from llama4_quant.checkpoint.json_files import MAX_DEPTH, dump_json, parse_json, read_json, shown
from llama4_quant.errors import CheckpointError, ConfigError

HOSTILE = {
    "empty": (b"", "not valid JSON"),
    "cut short": (b'{"a": 1', "not valid JSON"),
    "not an object": (b"[1]", "expected a JSON object, found \\[1\\]"),
    "not UTF-8": (b'{"a": "\xff"}', "expected UTF-8 text, found byte 0xff at 7"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "expected UTF-8"),
    "byte order mark": (b'\xef\xbb\xbf{"a": 1}', "BOM"),
    "duplicate key": (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
    "duplicate key inside": (b'{"x": {"a": 1, "a": 1}}', "the key 'a' occurs twice"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "Infinity": (b'{"a": -Infinity}', "-Infinity is not JSON"),
    "integer of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "nested lists": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 64 deep"),
    "nested objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested more than 64 deep"),
    "unclosed quote": (b'{"a":"' + b"[" * 5_000, "not valid JSON"),
    "a million escaped quotes, unclosed": (b'{"a":"' + b'\\"' * 1_000_000, "not valid JSON"),
    "ends in a backslash": (b'{"a":"' + b"\\", "not valid JSON"),
    "a million opening quotes": (b'"' * 1_000_001, "not valid JSON"),
    "32 MB without a token": (b" " * 2**25, "not valid JSON"),
    "nested behind an escaped quote": (b'{"a":"\\"","b":' + b"[" * 5_000, "nested more than 64 deep"),
    "5 million values": (b'{"a":[' + b"0," * 5_000_000 + b"0]}", "at most 4,000,000 JSON tokens"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_json_is_refused_quickly_and_in_bounded_memory(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(ConfigError, match=message) as caught:
        read_json(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500
    # The file is held as bytes and as text, beside a read buffer that is the limit itself; no tree of values.
    assert peak < json_files.MAX_JSON_BYTES + 3 * len(data) + 2**20
    assert time.monotonic() - started < 5


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
