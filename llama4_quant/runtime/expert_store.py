"""Routed experts that stay in their checkpoint while a model runs, for models larger than memory.

A token takes one expert of a layer, so of all experts a few are at work at a time. Two ways to have them at hand:

- **mapped**: weights are the file's own pages. What is used stays in the kernel's page cache as long as there is room;
  nothing is copied, and the memory counts as cache, not as the process's.
- **cached** (expert_cache.py): the most used experts, within a number of bytes that is given, in the process's own
  memory.

Both are told what a layer wants, and what comes next: while one expert works, others are read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from llama4_quant.architecture import LinearSpec
from llama4_quant.checkpoint.layout import parse_size
from llama4_quant.checkpoint.meta import MetaReader
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.tensor_files import TensorFiles
from llama4_quant.errors import UsageError
from llama4_quant.runtime.expert_cache import READ_AHEAD, CachedExperts
from llama4_quant.runtime.expert_tensors import (
    Expert,
    ExpertPart,
    ExpertWeights,
    fused_parts,
    map_parts,
    stored_parts,
    will_need,
    with_rows,
)
from llama4_quant.stored import StoredWeight
from llama4_quant.work import machine_memory


class ExpertStore(Protocol):
    """Gives the weights of experts, by layer and number."""

    def begin(self, layer: int, rows: Sequence[int]) -> list[Expert]:
        """Say what a layer is going to ask for.

        Args:
            layer: its number.
            rows: of work, for each of its experts.

        Returns:
            Those that have rows, in the order to ask for them.
        """
        ...

    def get(self, expert: Expert) -> ExpertWeights:
        """The weights; valid until the next call.

        Raises:
            CheckpointError: the file has changed, or the disk fails.
        """
        ...

    def prefetch(self, experts: Sequence[Expert]) -> None:
        """Begin to read the first few of what is needed next; does not wait."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


class MappedExperts:
    """Experts as pages of the file."""

    def __init__(self, parts: Mapping[Expert, Sequence[ExpertPart]], files: TensorFiles) -> None:
        self._parts, self._files = parts, files
        self._weights: dict[Expert, ExpertWeights] = {}

    def begin(self, layer: int, rows: Sequence[int]) -> list[Expert]:
        """See `ExpertStore`."""
        return with_rows(layer, rows)

    def get(self, expert: Expert) -> ExpertWeights:
        """See `ExpertStore`."""
        if expert not in self._weights:
            self._weights[expert] = map_parts(self._parts[expert], self._files)
        return self._weights[expert]

    def prefetch(self, experts: Sequence[Expert]) -> None:
        """See `ExpertStore`."""
        for expert in experts[:READ_AHEAD]:
            will_need(self._parts[expert], self._files)

    def close(self) -> None:
        """See `ExpertStore`."""
        self._weights.clear()
        self._files.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Offload:
    """How routed experts stay in the file.

    Attributes:
        cache_bytes: memory for the most used ones; None leaves it to the kernel's page cache.
    """

    cache_bytes: int | None

    @classmethod
    def parse(cls, offload: str | None, expert_cache: int | str | None, scheme: object) -> "Offload | None":
        """What a user chose, as of `load`; None for experts in memory.

        Raises:
            UsageError: unknown, or settings that contradict each other.
        """
        if offload is None:
            if expert_cache is not None:
                raise UsageError("--expert-cache is memory for offloaded experts; add --offload experts, or drop it")
            return None
        if offload != "experts":
            raise UsageError(f"offload {offload!r} is unknown; what can be left in the file is 'experts'")
        if scheme is not None:
            raise UsageError(
                "--offload runs experts from the file as they are stored there, so they cannot be quantized while "
                "loading; convert the checkpoint first (llama4-quant convert), and give the result without --scheme"
            )
        return cls(cache_bytes=None if expert_cache is None else parse_size(expert_cache))

    def of_quantized(
        self, reader: CheckpointReader, weights: Iterable[StoredWeight], dtype: torch.dtype, device: torch.device
    ) -> ExpertStore:
        """The store for a quantized checkpoint."""
        return self._store(reader, stored_parts(weights, reader.tensors, dtype), self.cache_bytes, device)

    def of_source(
        self, reader: CheckpointReader, linears: Iterable[LinearSpec], dtype: torch.dtype, device: torch.device
    ) -> ExpertStore:
        """The store for a BF16 checkpoint in Hugging Face layout.

        Raises:
            UsageError: it is in Meta's layout.
        """
        if isinstance(reader, MetaReader):
            raise UsageError(
                f"{reader.path}: experts of a checkpoint in Meta's layout lie in pieces and cannot be run from the "
                "file; convert it first (llama4-quant convert --format bf16, or quantized)"
            )
        cache_bytes = machine_memory() // 4 if self.cache_bytes is None else self.cache_bytes
        return self._store(reader, fused_parts(linears, reader.tensors, dtype), cache_bytes, device)

    @staticmethod
    def _store(
        reader: CheckpointReader,
        parts: Mapping[Expert, Sequence[ExpertPart]],
        cache_bytes: int | None,
        device: torch.device,
    ) -> ExpertStore:
        files = TensorFiles.of(reader, {part.entry.name for of_expert in parts.values() for part in of_expert})
        if cache_bytes is None:
            return MappedExperts(parts, files)
        try:
            return CachedExperts(parts, files, cache_bytes, pin_memory=device.type == "cuda")
        except UsageError:
            files.close()
            raise
