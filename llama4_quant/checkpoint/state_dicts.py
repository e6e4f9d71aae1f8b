"""Files as `torch.save` writes them, laid out in advance: what is in which file follows from names, dtypes and shapes.

An output tensor `consolidated.00.pth/layers.0.attention.wq.weight` is the entry `layers.0.attention.wq.weight` of the
state dict in `consolidated.00.pth`. Such a file is a zip archive (archive.py) of

    consolidated.00/data.pkl     a pickled dict of tensors; each names the record that holds its bytes
    consolidated.00/byteorder    "little"
    consolidated.00/data/0 ...   the bytes of the tensors
    consolidated.00/version      "3"

The pickle is made from placeholders, so nothing of a tensor is in memory, and holds only what torch's restricted
unpickler knows: `torch.load(..., weights_only=True, mmap=True)` reads it. Source: torch 2.13, `serialization.py`
(`_save`), `_tensor.py` (`_reduce_ex_internal`).
"""

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from llama4_quant.checkpoint.archive import Archive, lay_out
from llama4_quant.checkpoint.layout import Layout, OutputTensor, Placement, ShardLayout, check_outputs
from llama4_quant.checkpoint.paths import PARAMS_NAME

_PROTOCOL = 2
_TYPED = {torch.bfloat16: torch.BFloat16Storage, torch.float16: torch.HalfStorage, torch.float32: torch.FloatStorage}
"""Dtypes that have a storage class of their own, as all had once; the others are pickled with their dtype."""


def tensor_name(filename: str, key: str) -> str:
    """Name of the output tensor that is the entry `key` of the state dict in `filename`."""
    return f"{filename}/{key}"


def layout_state_dicts(tensors: Iterable[OutputTensor]) -> Layout:
    """Place tensors in the files that their names say, in the order given.

    Raises:
        OutputError: no tensors, or the same name twice.
    """
    files: dict[str, list[OutputTensor]] = {}
    for tensor in check_outputs(tensors):
        files.setdefault(tensor.name.partition("/")[0], []).append(tensor)
    placements: dict[str, Placement] = {}
    shards = []
    for number, (filename, members) in enumerate(files.items()):
        archive = _archive(filename, members)
        by_name = {tensor.name: tensor for tensor in members}
        for record in archive.records:
            if record.content is None:
                name = archive.tensors[record.name]
                placements[name] = Placement(tensor=by_name[name], shard=number, start=record.start)
        shards.append(ShardLayout(filename=filename, nbytes=archive.nbytes, archive=archive))
    total_size = sum(placement.tensor.nbytes for placement in placements.values())
    return Layout(
        placements=MappingProxyType(placements),
        shards=tuple(shards),
        total_size=total_size,
        last_file=PARAMS_NAME,
        has_index=False,
    )


def _archive(filename: str, tensors: list[OutputTensor]) -> Archive:
    folder = filename.rpartition(".")[0]
    records = {f"{folder}/data/{number}": tensor for number, tensor in enumerate(tensors)}
    entries = {tensor.name.partition("/")[2]: _Tensor(str(number), tensor) for number, tensor in enumerate(tensors)}
    contents: dict[str, bytes | int] = {f"{folder}/data.pkl": _pickled(entries), f"{folder}/byteorder": b"little"}
    contents |= {name: tensor.nbytes for name, tensor in records.items()}
    contents[f"{folder}/version"] = b"3\n"
    return lay_out(contents, {name: tensor.name for name, tensor in records.items()})


@dataclass(frozen=True, slots=True)
class _Storage:
    """Stands for the bytes of a tensor; pickled as a reference to a record."""

    record: str
    tensor: OutputTensor


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Stands for a contiguous tensor that has a record to itself."""

    record: str
    tensor: OutputTensor


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if not isinstance(obj, _Storage):
            return None
        tensor = obj.tensor
        if tensor.dtype in _TYPED:
            return ("storage", _TYPED[tensor.dtype], obj.record, "cpu", math.prod(tensor.shape))
        return ("storage", torch.UntypedStorage, obj.record, "cpu", tensor.nbytes)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        tensor = obj.tensor
        strides = tuple(math.prod(tensor.shape[dim + 1 :]) for dim in range(len(tensor.shape)))
        hooks: OrderedDict[str, Any] = OrderedDict()
        arguments = (_Storage(obj.record, tensor), 0, tensor.shape, strides, False, hooks)
        if tensor.dtype in _TYPED:
            return _REBUILD, arguments
        return _REBUILD_WITH_DTYPE, (*arguments, tensor.dtype)


# torch gives these names to whoever reads the file; they are looked up here, and never called.
_REBUILD: Callable[..., Any] = getattr(torch._utils, "_rebuild_tensor_v2")  # noqa: B009, SLF001
_REBUILD_WITH_DTYPE: Callable[..., Any] = getattr(torch._utils, "_rebuild_tensor_v3")  # noqa: B009, SLF001


def _pickled(entries: Mapping[str, _Tensor]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, _PROTOCOL).dump(entries)
    return buffer.getvalue()
