"""The journal: which items of a job are finished, what they wrote, and what to remember of them.

Each process appends to its own file, one line per finished item, right after the item's bytes were handed to the
kernel. From time to time it syncs the shards and then says so in a line of its own. So a killed process loses only the
items in hand, since the kernel still holds what it wrote; after a crash of the machine, which loses what was not
synced, only items before the last such line count. The two cases are told apart by the kernel's boot id:

    <check> {"session": <digest of the fingerprint>, "boot": <boot id>}
    <check> {"item": 17, "ranges": [[tensor, start, stop, sha256, crc32], ...], "notes": ...}
    <check> {"synced": 1}                       the first record of this session is on the disk

`check` is the beginning of the SHA-256 of the rest. Reading stops at the first line that is torn or damaged.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_quant.checkpoint.buffers import write_from
from llama4_quant.checkpoint.files import open_own, read_own
from llama4_quant.checkpoint.json_files import parse_json
from llama4_quant.checkpoint.locks import try_lock
from llama4_quant.checkpoint.machine import boot_id
from llama4_quant.errors import ConfigError

PATTERN = "journal-*.jsonl"
MAX_JOURNAL_BYTES = 2**28
"""Maverick's take some millions for all processes together."""
_CHECK_DIGITS = 16
_RANGE_TYPES = ([str, int, int, str, int], [str, int, int, str, type(None)])


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenRange:
    """Bytes `start` to `stop` of an output tensor, and their SHA-256 (hexadecimal).

    Attributes:
        crc32: their CRC-32, if the file needs one (archives do).
    """

    name: str
    start: int
    stop: int
    sha256: str
    crc32: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A finished item.

    Attributes:
        item: its number.
        ranges: what it wrote.
        notes: JSON data to remember with it.
    """

    item: int
    ranges: tuple[WrittenRange, ...]
    notes: Any


class Journal:
    """The journal of this process, open for appending. Thread-safe."""

    def __init__(self, folder: Path, rank: int, job: str) -> None:
        """Open `journal-<rank>.jsonl`, cut off what is torn at its end, and begin a session.

        Args:
            folder: the staging folder.
            rank: number of this process; no two live processes use the same.
            job: digest of the fingerprint.

        Raises:
            OSError: the file cannot be written; BlockingIOError if another process is using it.
            OutputError: it is no file of ours.
        """
        path = folder / f"journal-{rank}.jsonl"
        self._descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._end = _parse(read_own(path, MAX_JOURNAL_BYTES), job)[1]
            os.ftruncate(self._descriptor, self._end)
            self._num_records = 0
            self._lock = threading.Lock()
            self._append({"session": job, "boot": boot_id()})
            os.fsync(self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, record: Record) -> None:
        """Note that an item is finished; its bytes must have been written, but need not be synced."""
        ranges = [[part.name, part.start, part.stop, part.sha256, part.crc32] for part in record.ranges]
        with self._lock:
            self._append({"item": record.item, "ranges": ranges, "notes": record.notes})
            self._num_records += 1

    def num_records(self) -> int:
        """Records of this session so far; the shards have to be synced after asking, then call `mark_synced`."""
        with self._lock:
            return self._num_records

    def mark_synced(self, num_records: int) -> None:
        """Note durably that the bytes of the first `num_records` records of this session are on the disk."""
        with self._lock:
            self._append({"synced": num_records})
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; a later session may append to it."""
        os.close(self._descriptor)

    def _append(self, value: object) -> None:
        text = json.dumps(value, separators=(",", ":")).encode()
        line = _check(text) + b" " + text + b"\n"
        # A fixed position: a line that a full disk cut short is overwritten by the next one.
        write_from(self._descriptor, memoryview(line), self._end)
        self._end += len(line)


def read_journals(folder: Path, job: str) -> dict[int, Record]:
    """All items that are known to be finished, by number, from the journals of all processes.

    Raises:
        OSError: a journal cannot be read.
        OutputError: it is no file of ours.
    """
    contents = (read_own(path, MAX_JOURNAL_BYTES) for path in sorted(folder.glob(PATTERN)))
    return {record.item: record for content in contents for record in _parse(content, job)[0]}


def others_alive(folder: Path, rank: int) -> bool:
    """Whether another process holds a journal of this folder."""
    own = f"journal-{rank}.jsonl"
    return any(_is_held(path) for path in folder.glob(PATTERN) if path.name != own)


def _is_held(path: Path) -> bool:
    descriptor = open_own(path, os.O_RDWR)
    try:
        return not try_lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def _check(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_CHECK_DIGITS].encode()


def _parse(data: bytes, job: str) -> tuple[list[Record], int]:
    """Records that count, and the length of the undamaged part."""
    trusted: list[Record] = []
    session: list[Record] = []
    num_synced, same_boot, boot, end = 0, False, boot_id(), 0
    for value, line_end in _lines(data):
        if "session" in value:
            if value["session"] != job:
                break
            trusted += session if same_boot else session[:num_synced]
            session, num_synced, same_boot = [], 0, value.get("boot") == boot
        elif type(value.get("synced")) is int:
            num_synced = max(0, value["synced"])
        else:
            record = _record(value)
            if record is None:
                break
            session.append(record)
        end = line_end
    trusted += session if same_boot else session[:num_synced]
    return trusted, end


def _lines(data: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Sound lines from the beginning, each with the position after it."""
    position = 0
    while (newline := data.find(b"\n", position)) >= 0:
        check, _, text = data[position:newline].partition(b" ")
        if check != _check(text):
            return
        position = newline + 1
        try:
            value = parse_json(text, "journal")
        except ConfigError:  # with the right checksum: nobody tears a line like that
            return
        yield value, position


def _record(value: dict[str, Any]) -> Record | None:
    """The record, unless it is not one that `Journal.append` writes."""
    item, ranges, notes = value.get("item"), value.get("ranges"), value.get("notes")
    if type(item) is not int or not isinstance(ranges, list):
        return None
    if not all(isinstance(part, list) and [type(field) for field in part] in _RANGE_TYPES for part in ranges):
        return None
    if not all(0 <= start <= stop < 2**63 for _, start, stop, *_ in ranges):
        return None
    parts = tuple(
        WrittenRange(name=name, start=start, stop=stop, sha256=sha, crc32=crc) for name, start, stop, sha, crc in ranges
    )
    return Record(item=item, ranges=parts, notes=notes)
