"""JSON from strangers: parsed strictly and with bounded time and memory, or refused with one clear message.

Python's parser accepts duplicate keys (the last one wins), NaN, 1e999 (as infinity), halves of surrogate pairs (which
no file can hold), and as many values as fit in memory, where one byte of text can become 30 bytes of objects. So size,
number of tokens and nesting are checked on the bytes first; every limit is several times what Llama 4 Maverick needs
with one tensor per expert (28 thousand names, 4 MB). What is parsed can be written again: `dump_json` does not fail.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama4_quant.errors import ConfigError, Llama4QuantError

MAX_JSON_BYTES = 64 * 2**20
MAX_TOKENS = 4_000_000
"""Commas, colons, quotes and opening brackets; a tensor in a safetensors header takes about 22 of them."""
MAX_DEPTH = 64

_MARKS = (b",", b":", b'"', b"[", b"{")
# Everything up to and with the next bracket outside strings, or up to the end. An unclosed string runs to the end, so
# there is a match at every position and no second look at a byte: linear, whatever the bytes are.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)'
_NEXT_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|%b)*+([\[\]{}]|\Z)' % _STRING, re.DOTALL)
_SURROGATE = re.compile(rb"\\[uU][dD][89a-fA-F]")
_STEPS = {b"[": 1, b"{": 1, b"]": -1, b"}": -1, b"": 0}


def shown(value: object, limit: int = 80) -> str:
    """The value as one short printable string, for error messages."""
    return _cut(ascii(value), limit)


def named(text: str) -> str:
    """A name in a message: itself if it is short and printable, else as `shown`."""
    return text if text.isprintable() and len(text) <= 120 else shown(text)


def one_line(text: object, limit: int = 300) -> str:
    """What a library said, or a program in a checkpoint, as one short printable line."""
    words = " ".join(str(text).split())
    return _cut(words if words.isprintable() else ascii(words), limit)


def _cut(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def read_json(path: Path, error: type[Llama4QuantError] = ConfigError) -> dict[str, Any]:
    """Parse a JSON file that must hold an object.

    Args:
        path: the file; at most 64 MiB, UTF-8, no duplicate keys, nested at most 64 deep.
        error: the class to raise.

    Raises:
        ConfigError: (or `error`) the file is missing, not a regular file, too large, or not such JSON.
    """
    try:
        if not path.is_file():  # a named pipe would block for ever
            what = "not a file" if path.exists() else "missing"
            raise error(f"{path}: expected a JSON file, and it is {what}; download it again")
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}; check the disk and the permissions") from problem
    if len(data) > MAX_JSON_BYTES:
        raise error(f"{path}: expected at most {MAX_JSON_BYTES:,} bytes of JSON, and the file is larger")
    return parse_json(data, str(path), error)


def parse_json(
    data: bytes, where: str, error: type[Llama4QuantError] = ConfigError, *, remedy: str = "download the file again"
) -> dict[str, Any]:
    """Parse bytes that must be one JSON object; `where` opens and `remedy` ends error messages.

    Raises:
        ConfigError: (or `error`) not UTF-8, not JSON, not an object, a duplicate key, too many values, too deep.
    """
    _check_size(data, where, error, remedy)
    try:
        parsed = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
        if _SURROGATE.search(data):
            _check_text(parsed)
    except UnicodeDecodeError as problem:
        raise error(
            f"{where}: expected UTF-8 text, found byte 0x{data[problem.start]:02x} at {problem.start}"
        ) from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: not valid JSON: {_cut(str(problem))}; {remedy}") from None
    if not isinstance(parsed, dict):
        raise error(f"{where}: expected a JSON object, found {shown(parsed)}")
    return parsed


def dump_json(value: Mapping[str, Any]) -> bytes:
    """The object as an indented UTF-8 JSON file; keys keep their order, NaN and Inf are refused (ValueError)."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _check_size(data: bytes, where: str, error: type[Llama4QuantError], remedy: str) -> None:
    num_tokens = sum(data.count(mark) for mark in _MARKS)
    if num_tokens > MAX_TOKENS:
        raise error(f"{where}: expected at most {MAX_TOKENS:,} JSON tokens, found {num_tokens:,}; {remedy}")
    depth = 0
    for match in _NEXT_BRACKET.finditer(data):
        depth += _STEPS[match[1]]
        if depth > MAX_DEPTH:
            raise error(f"{where}: JSON nested more than {MAX_DEPTH} deep; {remedy}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return unique


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is too large a number")
    return value


def _check_text(parsed: object) -> None:
    """Raise ValueError if a string holds half of a surrogate pair: that is no text, and cannot be written."""
    try:
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as problem:
        raise ValueError(f"a string holds {shown(problem.object[problem.start])}, which is no character") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
