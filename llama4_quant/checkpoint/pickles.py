"""Where the tensors of a `torch.save` file lie: its table of contents, read without loading or running anything.

Such a file is a zip archive of uncompressed records: `data.pkl` describes the tensors, `data/0`, `data/1`, ... hold
their bytes. The pickle is read by pickled_tensors.py, which follows it without importing or calling what it names;
bytes of tensors are read later, as those of safetensors files are.
"""

import io
import math
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama4_quant.checkpoint.header import DTYPE_NAMES, MAX_NAME_LENGTH, MAX_RANK
from llama4_quant.checkpoint.json_files import shown
from llama4_quant.checkpoint.pickled_tensors import ForeignPickleError, PickledTensor, read_pickle
from llama4_quant.errors import CheckpointError

MAX_PICKLE_BYTES = 4 * 2**20
"""Maverick's has well under one."""
MAX_RECORDS = 50_000
MAX_DIRECTORY_BYTES = 4 * 2**20
"""Of the archive's own table of contents."""

_LOCAL_HEADER_BYTES = 30
_LOCAL_LENGTHS = struct.Struct("<26xHH")
"""A local zip header ends with the lengths of the two fields that stand between it and the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A contiguous tensor in a file: `start` is the absolute byte where it begins."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """A record of the archive: its bytes in the file."""

    start: int
    nbytes: int


def read_contents(fd: int, path: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict that `torch.save` wrote; what else it holds is left out.

    Args:
        fd: descriptor of the file, open for reading.
        path: its path.

    Raises:
        CheckpointError: not such a file, cut short, damaged, or with a pickle that names anything but tensors.
    """
    records = _records(fd, path)
    pickled = next((name for name in records if name.endswith("/data.pkl")), None)
    if pickled is None:
        raise CheckpointError(
            f"{path}: expected a file that torch.save wrote, and it has no data.pkl; download it again"
        )
    root = pickled.removesuffix("data.pkl")
    order = _content(fd, records, f"{root}byteorder", default=b"little")
    if order != b"little":
        raise CheckpointError(f"{path}: expected little-endian tensors, found byte order {shown(order)}")
    loaded = _load(_content(fd, records, pickled), path)
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise CheckpointError(f"{path}: expected a state dict (names and tensors), found {shown(type(loaded))}")
    return {
        name: _stored(name, value, path, records.get(f"{root}data/{value.key}"))
        for name, value in loaded.items()
        if isinstance(value, PickledTensor)
    }


def _load(pickled: bytes, path: Path) -> Any:
    try:
        return read_pickle(pickled)
    except ForeignPickleError as problem:
        raise CheckpointError(
            f"{path}: the pickle in this file is damaged, or holds more than tensors ({problem}), which could run "
            "code; it was not loaded: download it again from a source that you trust"
        ) from problem


def _content(fd: int, records: dict[str, _Record], name: str, default: bytes = b"") -> bytes:
    record = records.get(name)
    return default if record is None else os.pread(fd, record.nbytes, record.start)


class _Bounded(io.BufferedReader):
    """A file of which no more is read at a time than a table of contents may have."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file; ValueError if it is too much."""
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > MAX_DIRECTORY_BYTES:
            raise ValueError(f"a table of contents of {size:,} bytes")
        return super().read(size)


def _records(fd: int, path: Path) -> dict[str, _Record]:
    """The records of the archive, by name."""
    try:
        with _Bounded(io.FileIO(os.dup(fd))) as file, zipfile.ZipFile(file) as archive:
            found = archive.infolist()
    except Exception as problem:  # zipfile raises many kinds of errors for damaged archives
        raise CheckpointError(
            f"{path}: expected a file that torch.save wrote (a zip archive), and it is none or it is damaged or cut "
            f"short ({type(problem).__name__}); download it again"
        ) from problem
    _check_records(found, path)
    records: dict[str, _Record] = {}
    file_size = os.fstat(fd).st_size
    for record in found:
        header = os.pread(fd, _LOCAL_HEADER_BYTES, record.header_offset) if record.header_offset >= 0 else b""
        start = record.header_offset + _LOCAL_HEADER_BYTES
        if len(header) == _LOCAL_HEADER_BYTES:
            start += sum(_LOCAL_LENGTHS.unpack(header))
        if record.filename in records or start + record.file_size > file_size:
            raise CheckpointError(
                f"{path}: record {shown(record.filename)} is there twice, or not within the file; download it again"
            )
        records[record.filename] = _Record(start=start, nbytes=record.file_size)
    return records


def _check_records(records: list[zipfile.ZipInfo], path: Path) -> None:
    if len(records) > MAX_RECORDS:
        raise CheckpointError(f"{path}: expected at most {MAX_RECORDS:,} records, found {len(records):,}")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise CheckpointError(f"{path}: record {shown(record.filename)} is compressed; torch.save never does that")
        if "/data/" not in record.filename and record.file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{path}: record {shown(record.filename)} has {record.file_size:,} bytes, expected at most "
                f"{MAX_PICKLE_BYTES:,}"
            )


def _stored(name: str, tensor: PickledTensor, path: Path, record: _Record | None) -> StoredTensor:
    where = f"{path}: tensor {shown(name)}"
    if not (0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()):
        raise CheckpointError(f"{where}: expected a printable name of at most {MAX_NAME_LENGTH} characters")
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{where}: {tensor.dtype} is not supported; supported: {', '.join(DTYPE_NAMES.values())}")
    if len(tensor.shape) > MAX_RANK or not tensor.is_contiguous:
        raise CheckpointError(
            f"{where}: expected a contiguous tensor, found shape {shown(list(tensor.shape))} with strides "
            f"{shown(list(tensor.strides))}; save a contiguous copy"
        )
    begin = tensor.offset * tensor.dtype.itemsize
    start = begin + (0 if record is None else record.start)
    stored = StoredTensor(name=name, dtype=tensor.dtype, shape=tensor.shape, path=path, start=start)
    if record is None or begin + stored.nbytes > record.nbytes:
        raise CheckpointError(
            f"{where}: expected {stored.nbytes:,} bytes for {tensor.dtype} {list(tensor.shape)}, found a record of "
            f"{0 if record is None else record.nbytes:,}; the file is damaged: download it again"
        )
    return stored
