"""A zip archive laid out in advance, as `torch.save` makes them: records stored uncompressed, their data aligned.

Where every byte of the archive lies follows from names and sizes of its records alone. What depends on their content
is the checksums in the headers; so data are written first, in any order, and the rest (the frame) when these are known.

    local header | padding | data | local header | padding | data | ... | central directory | end

Format: PKWARE's APPNOTE 6.3, with zip64 fields where a size or an offset does not fit 32 bits.
"""

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

ALIGNMENT = 64
"""Of the data of every record; torch's own."""

_LIMIT = 0xFFFFFFFF
_MAX_COUNT = 0xFFFF
_PLAIN, _ZIP64 = 20, 45
"""Version of the format that a reader needs."""
_DATE = 0x0021
"""1980-01-01, so that archives of equal content are equal."""
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One file in the archive.

    Attributes:
        name: its name there; ASCII.
        nbytes: its size.
        offset: where its local header begins.
        start: where its data begin.
        content: its data, if they are known in advance; otherwise they are written as the tensor of this name.
    """

    name: str
    nbytes: int
    offset: int
    start: int
    content: bytes | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """All of an archive; `nbytes` is its size.

    Attributes:
        tensors: name of the output tensor by name of the record that holds it.
    """

    records: tuple[Record, ...]
    tensors: Mapping[str, str]
    nbytes: int

    def frame(self, crc32s: Mapping[str, int]) -> tuple[tuple[int, bytes], ...]:
        """Everything but the tensors' data: (start, bytes), in order, the first at 0.

        Args:
            crc32s: CRC-32 of every tensor, by its name.
        """
        checks = {record.name: self._crc32(record, crc32s) for record in self.records}
        parts: list[tuple[int, bytes]] = []
        for record in self.records:
            parts.append((record.offset, _local(record, checks[record.name])))
            if record.content is not None:
                parts.append((record.start, record.content))
        end = _end_of_records(self.records)
        parts.append((end, _directory(self.records, checks, end)))
        return tuple(_joined(parts))

    def _crc32(self, record: Record, crc32s: Mapping[str, int]) -> int:
        return crc32s[self.tensors[record.name]] if record.content is None else zlib.crc32(record.content)


def lay_out(contents: Mapping[str, bytes | int], tensors: Mapping[str, str]) -> Archive:
    """Place records one after another.

    Args:
        contents: by name of the record, its data or the number of bytes that a tensor takes; none is empty.
        tensors: name of the output tensor by name of the record.
    """
    records: list[Record] = []
    offset = 0
    for name, content in contents.items():
        nbytes = content if isinstance(content, int) else len(content)
        assert nbytes
        start = offset + len(_local_header(name, nbytes, offset, 0))
        known = None if isinstance(content, int) else content
        records.append(Record(name=name, nbytes=nbytes, offset=offset, start=start, content=known))
        offset = start + nbytes
    placed = tuple(records)
    directory = _directory(placed, dict.fromkeys(contents, 0), offset)
    return Archive(records=placed, tensors=tensors, nbytes=offset + len(directory))


def _end_of_records(records: tuple[Record, ...]) -> int:
    return records[-1].start + records[-1].nbytes


def _local(record: Record, crc32: int) -> bytes:
    return _local_header(record.name, record.nbytes, record.offset, crc32)


def _local_header(name: str, nbytes: int, offset: int, crc32: int) -> bytes:
    """Ends where the data begin: a field that readers skip fills the rest, as torch's `FB` field does."""
    size, extra, version = _size_fields(nbytes)
    fixed = _LOCAL.size + len(name) + len(extra) + 4
    padding = -(offset + fixed) % ALIGNMENT
    extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    header = _LOCAL.pack(b"PK\3\4", version, 0, 0, 0, _DATE, crc32, size, size, len(name), len(extra))
    return header + name.encode("ascii") + extra


def _size_fields(nbytes: int) -> tuple[int, bytes, int]:
    """The 32-bit size, the zip64 field that goes with it, and the version that a reader needs."""
    if nbytes < _LIMIT:
        return nbytes, b"", _PLAIN
    return _LIMIT, struct.pack("<2H2Q", 1, 16, nbytes, nbytes), _ZIP64


def _directory(records: tuple[Record, ...], crc32s: Mapping[str, int], start: int) -> bytes:
    entries = b"".join(_entry(record, crc32s[record.name]) for record in records)
    count, size = len(records), len(entries)
    tail = b""
    if count >= _MAX_COUNT or start >= _LIMIT or size >= _LIMIT:
        tail = _END64.pack(b"PK\6\6", _END64.size - 12, _ZIP64, _ZIP64, 0, 0, count, count, size, start)
        tail += _LOCATOR.pack(b"PK\6\7", 0, start + size, 1)
    shown = min(count, _MAX_COUNT)
    end = _END.pack(b"PK\5\6", 0, 0, shown, shown, min(size, _LIMIT), min(start, _LIMIT), 0)
    return entries + tail + end


def _entry(record: Record, crc32: int) -> bytes:
    large = [record.nbytes] * 2 if record.nbytes >= _LIMIT else []
    large += [record.offset] if record.offset >= _LIMIT else []
    extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    size, offset = min(record.nbytes, _LIMIT), min(record.offset, _LIMIT)
    version = _ZIP64 if large else _PLAIN
    name = record.name.encode("ascii")
    head = _CENTRAL.pack(
        b"PK\1\2", version, version, 0, 0, 0, _DATE, crc32, size, size, len(name), len(extra), 0, 0, 0, 0, offset
    )
    return head + name + extra


def _joined(parts: list[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Parts that touch, as one."""
    start, data = parts[0][0], bytearray()
    for position, piece in parts:
        if position != start + len(data):
            yield start, bytes(data)
            start, data = position, bytearray()
        data += piece
    yield start, bytes(data)
