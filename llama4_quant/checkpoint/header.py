"""The safetensors header: eight bytes of length, JSON that says where every tensor lies, then the data.

    u64 little-endian N | N bytes {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...} | data

Offsets count from the end of the header, and the tensors must tile the data exactly: no hole, no overlap, nothing
after. Format: https://github.com/huggingface/safetensors#format. Everything in a header is checked before it is used.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama4_quant.checkpoint.json_files import parse_json, shown
from llama4_quant.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
MAX_RANK = 8
MAX_NAME_LENGTH = 512
DATA_ALIGNMENT = 8

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
"""Spelling in the file -> torch dtype."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

METADATA_KEY = "__metadata__"
"""The one key of a header that is not a tensor."""
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where one stored tensor lies.

    Attributes:
        name: its name in the checkpoint.
        dtype: as safetensors spells it: `BF16`, `F32`, `F8_E4M3`, `I32`, ...
        shape: its dimensions; () for a scalar.
        path: the file.
        start: first byte, counted from the start of the file.
        nbytes: number of bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return DTYPES[self.dtype]


def read_header(fd: int, path: Path) -> tuple[TensorEntry, ...]:
    """Read and check the header of an open safetensors file.

    Args:
        fd: descriptor of the file, open for reading.
        path: its path, for messages and for the entries.

    Returns:
        The tensors in the order of their bytes.

    Raises:
        CheckpointError: the file is cut short or too long, or the header is not one that safetensors allows.
    """
    file_size = os.fstat(fd).st_size
    prefix = os.pread(fd, 8, 0)
    if prefix == b"version ":
        raise CheckpointError(
            f"{path}: a Git LFS pointer, not the weights themselves; run `git lfs pull` in that folder"
        )
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: expected a safetensors file, found only {file_size} bytes; download it again")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: expected a header of 2 to {MAX_HEADER_BYTES:,} bytes, found a length of {length:,}; this is not "
            "a safetensors file, or it is damaged: download it again"
        )
    data_start = 8 + length
    if data_start > file_size:
        raise CheckpointError(f"{path}: {_short(data_start, file_size)}")
    records = parse_json(os.pread(fd, length, 8), f"{path}: safetensors header", CheckpointError)
    _check_metadata(records.pop(METADATA_KEY, {}), path)
    entries = sorted((_entry(name, record, path, data_start) for name, record in records.items()), key=_position)
    _check_tiling(entries, path, data_start, file_size)
    return tuple(entries)


def encode_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...], int]]) -> bytes:
    """The bytes that stand before the data, length included, padded with spaces so that the data is 8-byte aligned.

    Args:
        tensors: (name, dtype, shape, nbytes) in the order of their bytes.
    """
    records: dict[str, Any] = {METADATA_KEY: {"format": "pt"}}  # transformers refuses files without it
    start = 0
    for name, dtype, shape, nbytes in tensors:
        offsets = [start, start + nbytes]
        records[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        start += nbytes
    text = json.dumps(records, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _position(entry: TensorEntry) -> tuple[int, int]:
    return entry.start, entry.nbytes


def _short(expected: int, found: int) -> str:
    missing = expected - found
    return f"the file is {missing:,} bytes short (expected {expected:,}, found {found:,}); download it again"


def _check_metadata(metadata: object, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: expected __metadata__ to map strings to strings, found {shown(metadata)}")


def _entry(name: str, record: object, path: Path, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {shown(name)}"
    if not (0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()):
        raise CheckpointError(f"{where}: expected a printable name of at most {MAX_NAME_LENGTH} characters")
    if not isinstance(record, dict) or set(record) != _FIELDS:
        raise CheckpointError(f"{where}: expected the fields dtype, shape and data_offsets, found {shown(record)}")
    dtype = record["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {shown(dtype)} is not supported; supported: {', '.join(DTYPES)}")
    shape = _integers(record["shape"], f"{where}: shape")
    if len(shape) > MAX_RANK or math.prod(size for size in shape if size) >= 2**63:
        raise CheckpointError(
            f"{where}: expected at most {MAX_RANK} dimensions and 2^63 elements, found {shown(list(shape))}"
        )
    offsets = _integers(record["data_offsets"], f"{where}: data_offsets")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where}: expected data_offsets that span {nbytes:,} bytes ({dtype} {shown(list(shape))}), found "
            f"{shown(list(offsets))}; the file is damaged: download it again"
        )
    return TensorEntry(name=name, dtype=dtype, shape=shape, path=path, start=data_start + offsets[0], nbytes=nbytes)


def _integers(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**63 for item in value):
        raise CheckpointError(f"{where}: expected a list of integers from 0 to 2^63 - 1, found {shown(value)}")
    return tuple(value)


def _check_tiling(entries: list[TensorEntry], path: Path, data_start: int, file_size: int) -> None:
    """Raise unless the tensors cover the bytes from `data_start` to the end of the file exactly once."""
    end = data_start
    for entry in entries:
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {shown(entry.name)} {what} (expected byte {end:,}, found {entry.start:,}); the file "
                "is damaged: download it again"
            )
        end += entry.nbytes
    if file_size < end:
        raise CheckpointError(f"{path}: {_short(end, file_size)}")
    if file_size > end:
        raise CheckpointError(
            f"{path}: the file is {file_size - end:,} bytes too long (expected {end:,}, found {file_size:,}); the "
            "download was corrupted: download it again"
        )
