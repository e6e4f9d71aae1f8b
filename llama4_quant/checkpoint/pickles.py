"""Where the tensors of a `torch.save` file lie: its table of contents, read without loading or running anything.

Such a file is a zip archive of uncompressed records: `data.pkl` describes the tensors, `data/0`, `data/1`, ... hold
their bytes. A pickle can name any function and call it, so it is read by torch's restricted unpickler alone
(`weights_only=True`), which knows tensors and plain containers; and with `map_location="meta"`, which makes tensors
that have a place in the file but no memory. Their bytes are read later, as those of safetensors files are.
"""

import io
import math
import os
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from llama4_quant.checkpoint.header import DTYPE_NAMES, MAX_RANK
from llama4_quant.checkpoint.json_files import shown
from llama4_quant.errors import CheckpointError

MAX_PICKLE_BYTES = 16 * 2**20
"""Maverick's has well under one."""
MAX_RECORDS = 200_000

_LOCAL_HEADER_BYTES = 30
_LOCAL_LENGTHS = struct.Struct("<26xHH")
"""A local zip header ends with the lengths of the two fields that stand between it and the data."""
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


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


def read_contents(fd: int, path: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict that `torch.save` wrote; what else it holds is left out.

    Args:
        fd: descriptor of the file, open for reading.
        path: its path.

    Raises:
        CheckpointError: not such a file, cut short, damaged, or with a pickle that names anything but tensors.
    """
    sizes = _record_sizes(fd, path)
    loaded = _load(path)
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise CheckpointError(f"{path}: expected a state dict (names and tensors), found {shown(type(loaded))}")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    return {name: _stored(name, tensor, path, sizes) for name, tensor in tensors.items()}


def _load(path: Path) -> object:
    try:
        # Meta's checkpoints have BytesIO objects for `_extra_state`, often empty: pickled as a call of `bytes` without
        # arguments. Making them does nothing but hold bytes of the file; `bytes(n)` would take any amount of memory.
        with torch.serialization.safe_globals([io.BytesIO, (_no_bytes, "builtins.bytes")]):
            return torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception as problem:  # the unpickler fails in any way that the pickle makes it fail
        named = _GLOBAL.search(str(problem))
        what = f"it names {shown(named[1])}" if named else f"{type(problem).__name__} while reading it"
        raise CheckpointError(
            f"{path}: the pickle in this file is damaged, or holds more than tensors ({what}), which could run code; "
            "it was not loaded: download it again from a source that you trust"
        ) from problem


def _no_bytes() -> bytes:
    return b""


def _record_sizes(fd: int, path: Path) -> dict[int, int]:
    """Bytes of each record of the archive, by the absolute byte where its data begins."""
    try:
        with os.fdopen(os.dup(fd), "rb") as file, zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            _check_records(records, path)
            orders = [archive.read(record) for record in records if record.filename.endswith("/byteorder")]
    except CheckpointError:
        raise
    except Exception as problem:  # zipfile raises many kinds of errors for damaged archives
        raise CheckpointError(
            f"{path}: expected a file that torch.save wrote (a zip archive), and it is none or it is damaged or cut "
            f"short ({type(problem).__name__}); download it again"
        ) from problem
    if any(order != b"little" for order in orders):
        raise CheckpointError(f"{path}: expected little-endian tensors, found byte order {shown(orders)}")
    sizes = {}
    for record in records:
        header = os.pread(fd, _LOCAL_HEADER_BYTES, record.header_offset)
        if len(header) == _LOCAL_HEADER_BYTES:
            start = record.header_offset + _LOCAL_HEADER_BYTES + sum(_LOCAL_LENGTHS.unpack(header))
            sizes[start] = record.file_size
    return sizes


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


def _stored(name: str, tensor: torch.Tensor, path: Path, sizes: dict[int, int]) -> StoredTensor:
    where = f"{path}: tensor {shown(name)}"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{where}: expected a plain dense tensor, found {tensor.layout}, {tensor.dtype}")
    if tensor.dim() > MAX_RANK or not tensor.is_contiguous():
        raise CheckpointError(
            f"{where}: expected a contiguous tensor, found shape {list(tensor.shape)} with strides "
            f"{list(tensor.stride())}; save a contiguous copy"
        )
    storage = tensor.untyped_storage()
    # Set by torch.load for tensors without memory: where the record of the storage begins.
    offset: int | None = getattr(storage, "_checkpoint_offset", None)
    begin = int(tensor.storage_offset()) * tensor.element_size()
    stored = StoredTensor(
        name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), path=path, start=(offset or 0) + begin
    )
    if offset is None or begin + stored.nbytes > sizes.get(offset, 0):
        raise CheckpointError(
            f"{where}: expected {stored.nbytes:,} bytes for {tensor.dtype} {list(tensor.shape)}, found a record of "
            f"{sizes.get(offset or 0, 0):,}; the file is damaged: download it again"
        )
    return stored
