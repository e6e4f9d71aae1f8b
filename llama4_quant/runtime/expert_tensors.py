"""Where the weights of one routed expert lie in a checkpoint, and how they become what a kernel takes.

Two layouts. A checkpoint with one weight per expert has each as its kernel takes it, and may be mapped. A BF16
checkpoint in Hugging Face layout has `gate_up_proj` [E, H, 2I] and `down_proj` [E, I, H]: an expert's part is one run
of bytes, but transposed, so it has to be turned over.

Shape letters: E experts, H hidden, I intermediate, K in, N out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from llama4_quant.architecture import LinearSpec, Role
from llama4_quant.checkpoint.reader import TensorEntry
from llama4_quant.checkpoint.tensor_files import TensorFiles
from llama4_quant.ops import Use
from llama4_quant.stored import StoredWeight

Expert: TypeAlias = tuple[int, int]
"""Layer and number."""
ExpertWeights: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""By projection (`gate_proj`, `up_proj`, `down_proj`), the tensors that store it, by suffix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertPart:
    """One stored tensor of one expert.

    Attributes:
        projection: whose.
        suffix: `weight`, `weight_packed` or `weight_scale`.
        entry: the tensor of the file; of a fused one, the expert's part of it, [K, columns].
        columns: which columns of a fused one are this projection's; None where the entry is stored as it is used.
        dtype: what the kernel takes.
    """

    projection: str
    suffix: str
    entry: TensorEntry
    columns: slice | None
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        """As the kernel takes it."""
        if self.columns is None:
            return self.entry.shape
        return (self.columns.stop - self.columns.start, self.entry.shape[0])


def stored_parts(
    weights: Iterable[StoredWeight], entries: Mapping[str, TensorEntry], dtype: torch.dtype
) -> dict[Expert, tuple[ExpertPart, ...]]:
    """The routed experts of a quantized checkpoint, which has them one by one; `dtype` is the compute dtype."""
    found: dict[Expert, list[ExpertPart]] = {}
    for weight in weights:
        if weight.linear is None or weight.role is not Role.ROUTED_EXPERT:
            continue
        for name in weight.tensors:
            suffix = name.rpartition(".")[2]
            if suffix != "weight_shape":
                part = ExpertPart(
                    projection=_projection(weight.linear),
                    suffix=suffix,
                    entry=entries[name],
                    columns=None,
                    dtype=_kernel_dtype(weight, suffix, dtype),
                )
                found.setdefault(_expert(weight.linear), []).append(part)
    return {expert: tuple(parts) for expert, parts in found.items()}


def fused_parts(
    linears: Iterable[LinearSpec], entries: Mapping[str, TensorEntry], dtype: torch.dtype
) -> dict[Expert, tuple[ExpertPart, ...]]:
    """The routed experts of a BF16 checkpoint in Hugging Face layout."""
    found: dict[Expert, list[ExpertPart]] = {}
    for linear in linears:
        if linear.role is not Role.ROUTED_EXPERT:
            continue
        assert linear.expert is not None
        part = ExpertPart(
            projection=_projection(linear),
            suffix="weight",
            entry=_part_of(entries[linear.source], linear.expert),
            columns=slice(linear.out_start, linear.out_start + linear.out_features),
            dtype=dtype,
        )
        found.setdefault(_expert(linear), []).append(part)
    return {expert: tuple(parts) for expert, parts in found.items()}


def can_be_mapped(parts: Iterable[ExpertPart]) -> bool:
    """Whether `map_parts` gives views of the file; scales, which are small, may have to be converted."""
    return all(
        part.columns is None and (part.dtype == part.entry.torch_dtype or part.suffix == "weight_scale")
        for part in parts
    )


def with_rows(layer: int, rows: Sequence[int]) -> list[Expert]:
    """The experts of a layer that have rows, of how many each of them has."""
    return [(layer, expert) for expert, count in enumerate(rows) if count]


def will_need(parts: Iterable[ExpertPart], files: TensorFiles) -> None:
    """Have the kernel read the pages of an expert; does not wait."""
    for part in parts:
        files.will_need(part.entry)


def map_parts(parts: Iterable[ExpertPart], files: TensorFiles) -> ExpertWeights:
    """The weights of an expert as views of the file, where they are stored as the kernel takes them."""
    weights: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        assert part.columns is None
        weights.setdefault(part.projection, {})[part.suffix] = files.view(part.entry).to(part.dtype)
    return weights


def read_parts(parts: Iterable[ExpertPart], files: TensorFiles, memory: Tensor) -> ExpertWeights:
    """Read the weights of an expert into `memory`, uint8 of at least `num_bytes(parts)`."""
    weights: dict[str, dict[str, Tensor]] = {}
    known: dict[TensorEntry, Tensor] = {}
    start = 0
    for part in parts:
        room = memory[start : start + part.num_bytes].view(part.dtype).view(part.shape)
        start += _aligned(part.num_bytes)
        if part.columns is None and part.dtype == part.entry.torch_dtype:
            files.read(part.entry, room)
        else:
            if part.entry not in known:
                known[part.entry] = files.read(part.entry, torch.empty(part.entry.shape, dtype=part.entry.torch_dtype))
            stored = known[part.entry]
            room.copy_(stored if part.columns is None else stored[:, part.columns].T)
        weights.setdefault(part.projection, {})[part.suffix] = room
    return weights


def num_bytes(parts: Iterable[ExpertPart]) -> int:
    """What `read_parts` needs."""
    return sum(_aligned(part.num_bytes) for part in parts)


def _aligned(size: int) -> int:
    """Every tensor starts at a cache line."""
    return -(-size // 64) * 64


def _part_of(entry: TensorEntry, expert: int) -> TensorEntry:
    """One expert's run of bytes of a fused tensor [E, K, columns]."""
    size = entry.nbytes // entry.shape[0]
    return replace(entry, shape=entry.shape[1:], start=entry.start + expert * size, nbytes=size)


def _expert(linear: LinearSpec) -> Expert:
    assert linear.layer is not None
    assert linear.expert is not None
    return linear.layer, linear.expert


def _projection(linear: LinearSpec) -> str:
    return linear.name.rpartition(".")[2]


def _kernel_dtype(weight: StoredWeight, suffix: str, dtype: torch.dtype) -> torch.dtype:
    """As a weight in memory has it."""
    out_features, in_features = weight.shape
    use = Use(
        name=weight.name,
        scheme=weight.scheme,
        out_features=out_features,
        in_features=in_features,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    return use.stored_tensors()[suffix][1]
