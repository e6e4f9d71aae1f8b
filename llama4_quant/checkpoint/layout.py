"""Where every byte of an output will lie, known before the first one is computed.

Tensors are dealt to shards in the order given, never split; within a shard they are sorted by item size, largest
first, so that each is aligned to its own item size although safetensors allows no gaps. The result depends on names,
dtypes, shapes and `max_shard_size` alone, so work items can write in any order and from any process.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import torch

from llama4_quant.checkpoint.archive import Archive
from llama4_quant.checkpoint.header import DATA_ALIGNMENT, DTYPE_NAMES, METADATA_KEY, encode_header
from llama4_quant.checkpoint.paths import CONFIG_NAME
from llama4_quant.errors import OutputError, UsageError

SHARD_NAME = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors|consolidated\.\d\d+\.pth|fp8_scales_\d+\.pt")
"""Names of weight files that this package, transformers or Meta gives."""

_MAX_SHARD_HEADER = 10_000_000
"""Far below what readers refuse; reached by some 80 thousand tensors in one shard."""
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputTensor:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of dimension 0 (of the whole tensor, for a scalar)."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where one tensor goes: number of the shard (from 0) and absolute byte offset in that file."""

    tensor: OutputTensor
    shard: int
    start: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardLayout:
    """One output file: tensors at fixed places, and around them bytes that say what they are (the frame).

    Attributes:
        nbytes: size of the file.
        header: the frame of a safetensors file: length and header.
        archive: the frame of a torch.save file, which depends on checksums of the tensors.
    """

    filename: str
    nbytes: int
    header: bytes = b""
    archive: Archive | None = None

    def frame(self, crc32s: Mapping[str, int]) -> tuple[tuple[int, bytes], ...]:
        """Everything but the tensors: (start, bytes), in order, the first at 0.

        Args:
            crc32s: CRC-32 of every tensor in an archive, by its name; a safetensors file needs none.
        """
        return ((0, self.header),) if self.archive is None else self.archive.frame(crc32s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """All of an output.

    Attributes:
        placements: by tensor name, in the order of files and bytes.
        shards: the files.
        total_size: bytes of all tensors, headers not counted (what the index calls total_size).
        last_file: the file without which loaders see no checkpoint; it is written last.
        has_index: whether an index says which tensor is in which file.
    """

    placements: Mapping[str, Placement]
    shards: tuple[ShardLayout, ...]
    total_size: int
    last_file: str = CONFIG_NAME
    has_index: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(shard.nbytes for shard in self.shards)


def layout_shards(tensors: Iterable[OutputTensor], max_shard_size: int) -> Layout:
    """Place tensors in shards of at most `max_shard_size` bytes; a larger tensor gets a shard of its own.

    Raises:
        OutputError: no tensors, the same name twice, or a dtype that safetensors cannot store.
        UsageError: `max_shard_size` is not positive.
    """
    if max_shard_size <= 0:
        raise UsageError(f"max_shard_size must be positive, found {max_shard_size}; the usual value is 5GB")
    groups = _deal(check_outputs(tensors), max_shard_size)
    placements: dict[str, Placement] = {}
    shards = []
    for number, group in enumerate(groups):
        header = encode_header((tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in group)
        start = len(header)
        for tensor in group:
            placements[tensor.name] = Placement(tensor=tensor, shard=number, start=start)
            start += tensor.nbytes
        filename = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        shards.append(ShardLayout(filename=filename, header=header, nbytes=start))
    total_size = sum(placement.tensor.nbytes for placement in placements.values())
    return Layout(placements=MappingProxyType(placements), shards=tuple(shards), total_size=total_size)


def index_json(layout: Layout) -> dict[str, Any]:
    """Content of model.safetensors.index.json."""
    files = {name: layout.shards[placement.shard].filename for name, placement in layout.placements.items()}
    return {"metadata": {"total_size": layout.total_size}, "weight_map": dict(sorted(files.items()))}


def parse_size(text: str | int) -> int:
    """Bytes from `5GB` (10^9), `2GiB` (2^30), `500MB`, `1.5 GiB` or a plain number.

    Raises:
        UsageError: not such a size, or less than one byte.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f"{str(text)!r} is not a size; write it as 5GB, 2GiB, 500MB or a number of bytes")
    size = int(Fraction(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise UsageError(f"{str(text)!r}: expected a size of at least one byte")
    return size


def check_outputs(tensors: Iterable[OutputTensor]) -> list[OutputTensor]:
    """The tensors, once names and dtypes are known to be good.

    Raises:
        OutputError: no tensors, the same name twice, or a dtype that cannot be stored.
    """
    checked: dict[str, OutputTensor] = {}
    for tensor in tensors:
        if tensor.name in checked:
            raise OutputError(f"{tensor.name}: two output tensors have this name")
        if not tensor.name.isprintable() or tensor.name in {"", METADATA_KEY}:
            raise OutputError(f"{tensor.name!r} cannot be the name of a tensor")
        if tensor.dtype not in DTYPE_NAMES:
            raise OutputError(
                f"{tensor.name}: {tensor.dtype} cannot be stored; use one of {', '.join(DTYPE_NAMES.values())}"
            )
        checked[tensor.name] = tensor
    if not checked:
        raise OutputError("there are no tensors to write")
    return list(checked.values())


def _deal(tensors: Sequence[OutputTensor], max_shard_size: int) -> list[list[OutputTensor]]:
    """Greedy, in order. Headers count with an upper bound, so a shard of several tensors never exceeds the limit."""
    empty = len(encode_header(()))
    frame = empty + DATA_ALIGNMENT  # the header without tensors, and padding
    digits = 2 * len(str(max_shard_size))  # by which offsets in a shard can be longer than those of a tensor alone
    groups: list[list[OutputTensor]] = [[]]
    header, data = frame, 0
    for tensor in tensors:
        alone = encode_header([(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes)])
        record = len(alone) - empty + DATA_ALIGNMENT + digits
        full = header + record + data + tensor.nbytes > max_shard_size or header + record > _MAX_SHARD_HEADER
        if full and groups[-1]:
            groups.append([])
            header, data = frame, 0
        groups[-1].append(tensor)
        header, data = header + record, data + tensor.nbytes
    return [sorted(group, key=lambda tensor: -tensor.dtype.itemsize) for group in groups]
