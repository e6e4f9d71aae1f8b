"""Text, JSON and JSON Lines files as numbered records, of which an index of byte offsets is kept and nothing else.

A file is read once to find where its records are (24 bytes each are kept) and what its checksum is; later, single
records are read as they are needed, so files may be larger than memory. All of it is untrusted.
"""

import hashlib
import mmap
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama4_quant.calibration.documents import Document, RecordReader, TextDocument
from llama4_quant.checkpoint.json_files import parse_json
from llama4_quant.errors import UsageError

MAX_RECORDS = 2**22
"""Of one PATH; their index takes 96 MiB."""
MAX_RECORD_BYTES = 16 * 2**20
"""Of one line; a line of 131,072 token ids takes 1 MiB."""

_MAX_GAP = 2**16
_RELEASE_BYTES = 32 * 2**20  # a multiple of every page size
_BOM = b"\xef\xbb\xbf"
# Everything up to and with the next bracket outside strings. An unclosed string runs to the end: linear in the file.
_NEXT_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z))*+([\[\]{}]|\Z)', re.DOTALL)
_STEPS = {b"[": 1, b"{": 1, b"]": -1, b"}": -1, b"": 0}

Span = tuple[int, int, int]
"""First byte, end, and the number by which messages call it: a line, an item of an array, a passage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFile:
    """One file.

    Attributes:
        unit: what its records are called in messages: "line", "item" or "passage".
        identity: checksum and size, which tell whether it is still the same file.
    """

    path: Path
    unit: str
    identity: str
    reader: RecordReader
    spans: NDArray[np.int64] = field(repr=False)

    @property
    def num_records(self) -> int:
        """How many records there are."""
        return len(self.spans)

    def read(self, numbers: Sequence[int]) -> Iterator[Document]:
        """Documents by number, in the order asked for.

        Raises:
            UsageError: the record is damaged; says which line.
        """
        for number in numbers:
            start, end, shown_number = self.spans[number].tolist()
            where = f"{self.path}, {self.unit} {shown_number}"
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(end - start)
            if len(data) != end - start:
                raise UsageError(f"{where}: the file is shorter than it was; leave it alone while it is read")
            yield self._document(data, where)

    def _document(self, data: bytes, where: str) -> Document:
        if self.unit == "passage":
            return TextDocument(where=where, text=_decoded(data, where))
        return self.reader.document(parse_json(data, where, UsageError, remedy="correct or remove it"), where)


def open_text_file(path: Path, reader: RecordReader, passage_bytes: int) -> TextFile:
    """Index a .txt, .md, .json or .jsonl file.

    Args:
        path: the file.
        reader: what records mean.
        passage_bytes: plain text longer than this is cut into passages of at most this, at blank lines or at least at
            the ends of lines where there are any.

    Raises:
        UsageError: it cannot be read, has too many records, a line that is too long, or is not a JSON array.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            if size == 0:
                return TextFile(path=path, unit="line", identity=digest, reader=reader, spans=_table(iter(()), path))
            # Not closed by hand: after an error, matches still point into it, and closing would be an error of its own.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            unit, spans = _spans(path, data, passage_bytes)
            table = _table(_releasing(spans, data), path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; check the path and the permissions") from error
    return TextFile(path=path, unit=unit, identity=f"{digest} {size}", reader=reader, spans=table)


def _spans(path: Path, data: mmap.mmap, passage_bytes: int) -> tuple[str, Iterator[Span]]:
    start = len(_BOM) if data[: len(_BOM)] == _BOM else 0
    if path.suffix in {".txt", ".md"}:
        return "passage", passages(data, start, passage_bytes)
    if path.suffix == ".json" and data[start : start + 4096].lstrip()[:1] == b"[":
        return "item", _array_items(data, start, path)
    return "line", _lines(data, start, path)


def passages(data: bytes | mmap.mmap, start: int, passage_bytes: int) -> Iterator[Span]:
    """Cut text into spans of at most `passage_bytes` that cover it, never inside a character of UTF-8."""
    number, size = 0, len(data)
    while start < size:
        end = size if size - start <= passage_bytes else _cut(data, start, start + passage_bytes)
        number += 1
        yield start, end, number
        start = end


def _cut(data: bytes | mmap.mmap, start: int, limit: int) -> int:
    """After a blank line in the second half, else after a line, else before a character."""
    blank = data.rfind(b"\n\n", (start + limit) // 2, limit)
    if blank >= 0:
        return blank + 2
    line = data.rfind(b"\n", start, limit)
    if line >= 0:
        return line + 1
    end = limit
    while end > start + 1 and limit - end < 4 and data[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _lines(data: mmap.mmap, start: int, path: Path) -> Iterator[Span]:
    """Lines that are not blank."""
    number, size = 0, len(data)
    while start < size:
        number += 1
        found = data.find(b"\n", start, start + MAX_RECORD_BYTES + 1)
        end = size if found < 0 else found
        _check_length(end - start, f"{path}, line {number}")
        if data[start:end].strip():
            yield start, end, number
        start = end + 1


def _array_items(data: mmap.mmap, start: int, path: Path) -> Iterator[Span]:
    """Objects of a JSON array, found by counting brackets; each is parsed when it is read."""
    depth = number = begin = 0
    after = start
    for match in _NEXT_BRACKET.finditer(data, start):
        depth += _STEPS[match[1]]
        if depth == 2 and match[1] in {b"[", b"{"}:
            begin = match.end() - 1
            _check_gap(data[after:begin], b"[" if number == 0 else b",", f"{path}, item {number + 1}")
        elif depth == 1 and match[1] in {b"]", b"}"}:
            number, after = number + 1, match.end()
            _check_length(after - begin, f"{path}, item {number}")
            yield begin, after, number
        elif depth <= 0:
            break
    rest = b"" if len(data) - after > _MAX_GAP else b"".join(data[after:].split())
    if rest != (b"]" if number else b"[]"):
        raise UsageError(f"{path}: expected a JSON array of objects, which goes wrong after item {number}; correct it")


def _check_gap(gap: bytes, expected: bytes, where: str) -> None:
    if gap.strip() != expected:
        raise UsageError(f"{where}: expected an object in a JSON array, found {gap[:80]!a} before it; correct it")


def _check_length(length: int, where: str) -> None:
    if length > MAX_RECORD_BYTES:
        raise UsageError(
            f"{where}: has more than {MAX_RECORD_BYTES:,} bytes; JSON Lines have one record per line, and long texts "
            "have to be cut"
        )


def _releasing(spans: Iterator[Span], data: mmap.mmap) -> Iterator[Span]:
    """The spans, while what was read is unmapped, so that the process is not as large as the file."""
    released = 0
    for span in spans:
        if span[1] - released > 2 * _RELEASE_BYTES:
            data.madvise(mmap.MADV_DONTNEED, released, _RELEASE_BYTES)
            released += _RELEASE_BYTES
        yield span


def _table(spans: Iterator[Span], path: Path) -> NDArray[np.int64]:
    """[records, 3] int64."""
    flat = array("q")
    for span in spans:
        flat.extend(span)
        if len(flat) > 3 * MAX_RECORDS:
            raise UsageError(f"{path}: has more than {MAX_RECORDS:,} records; a part of it is enough")
    return np.array(flat, dtype=np.int64).reshape(-1, 3)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: expected UTF-8 text, found byte 0x{data[error.start]:02x} at {error.start}; convert the file"
        ) from None
