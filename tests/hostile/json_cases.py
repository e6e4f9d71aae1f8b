"""JSON that a parser swallows or chokes on, as config.json and as index."""

from pathlib import Path

from checkpoint.checkpoint_files import INDEX
from hostile.cases import SOURCE, Bases, Case

TEXTS: dict[str, tuple[bytes, str]] = {
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
    "1e999": (b'{"a": 1e999}', "'1e999' is too large a number"),
    "half a surrogate pair": (b'{"a": ["\\ud800"]}', r"a string holds '\\ud800', which is no character"),
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
IN_INDEX = ("not UTF-8", "duplicate key inside", "nested lists", "5 million values", "half a surrogate pair")
"""The parser is the same: some of them show that the index goes through it too."""


def _case(file: str, name: str, data: bytes, message: str) -> Case:
    def make(root: Path, bases: Bases) -> None:
        (bases.put("bf16", root / "model") / file).write_bytes(data)

    commands = (*SOURCE, "config-only") if file == "config.json" else SOURCE
    return Case(name=f"{file}: {name}", make=make, commands=commands, message=rf"{file}: .*{message}")


def json_cases() -> list[Case]:
    """One for each text."""
    configs = [_case("config.json", name, data, message) for name, (data, message) in TEXTS.items()]
    return [*configs, *(_case(INDEX, name, *TEXTS[name]) for name in IN_INDEX)]
