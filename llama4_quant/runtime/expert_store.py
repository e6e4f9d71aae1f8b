"""Routed experts that stay in their checkpoint while a model runs, for models larger than memory.

A token takes one expert of a layer, so of all experts a few are at work at a time. Two ways to have them at hand:

- **mapped**: weights are the file's own pages. What is used stays in the kernel's page cache as long as there is room;
  nothing is copied, and the memory counts as cache, not as the process's.
- **cached**: the most recently used experts, within a number of bytes that is given, in the process's own memory.

Both can be told what comes next: while one expert works, the next one is read.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llama4_quant.architecture import LinearSpec
from llama4_quant.checkpoint.layout import parse_size
from llama4_quant.checkpoint.meta import MetaReader
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.tensor_files import TensorFiles
from llama4_quant.errors import UsageError
from llama4_quant.runtime.expert_tensors import (
    Expert,
    ExpertPart,
    ExpertWeights,
    fused_parts,
    map_parts,
    num_bytes,
    read_parts,
    stored_parts,
)
from llama4_quant.stored import StoredWeight
from llama4_quant.work import machine_memory


@dataclass(kw_only=True, slots=True)
class StoreCounts:
    """What a store has done.

    Attributes:
        num_used: times that an expert was asked for.
        num_at_hand: of these, how often it was in memory, or being read since `prefetch`.
        num_bytes_read: from the file.
    """

    num_used: int = 0
    num_at_hand: int = 0
    num_bytes_read: int = 0


class ExpertStore(Protocol):
    """Gives the weights of experts, by layer and number."""

    def get(self, expert: Expert) -> ExpertWeights:
        """The weights; valid until the next call.

        Raises:
            CheckpointError: the file has changed, or the disk fails.
        """
        ...

    def prefetch(self, experts: Sequence[Expert]) -> None:
        """Begin to read what is needed next, in this order; does not wait."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


class MappedExperts:
    """Experts as pages of the file."""

    def __init__(self, parts: Mapping[Expert, Sequence[ExpertPart]], files: TensorFiles) -> None:
        self._parts, self._files = parts, files
        self._weights: dict[Expert, ExpertWeights] = {}

    def get(self, expert: Expert) -> ExpertWeights:
        """See `ExpertStore`."""
        if expert not in self._weights:
            self._weights[expert] = map_parts(self._parts[expert], self._files)
        return self._weights[expert]

    def prefetch(self, experts: Sequence[Expert]) -> None:
        """See `ExpertStore`."""
        for expert in experts:
            for part in self._parts[expert]:
                self._files.will_need(part.entry)

    def close(self) -> None:
        """See `ExpertStore`."""
        self._weights.clear()
        self._files.close()


@dataclass(kw_only=True, slots=True)
class _Slot:
    """Memory for one expert, and what is or will be in it."""

    memory: Tensor
    weights: Future[ExpertWeights]


class CachedExperts:
    """The most recently used experts, in memory of a given size.

    Attributes:
        num_slots: experts that it holds.
        counts: what has been done.
    """

    def __init__(
        self,
        parts: Mapping[Expert, Sequence[ExpertPart]],
        files: TensorFiles,
        max_bytes: int,
        *,
        pin_memory: bool = False,
    ) -> None:
        """Nothing is read or allocated before it is needed.

        Args:
            parts: of every expert.
            files: where they are.
            max_bytes: memory for experts; at least for one.
            pin_memory: so that a GPU can fetch weights by itself.

        Raises:
            UsageError: not enough for one expert.
        """
        self._parts, self._files = parts, files
        self._slot_bytes = max(map(num_bytes, parts.values()), default=0)
        if max_bytes < self._slot_bytes:
            raise UsageError(
                f"an expert takes {self._slot_bytes:,} bytes, and the cache for experts may have {max_bytes:,}; "
                "raise --expert-cache to hold one, or a few"
            )
        self.num_slots = min(len(parts), max_bytes // max(1, self._slot_bytes))
        self.counts = StoreCounts()
        self._slots: OrderedDict[Expert, _Slot] = OrderedDict()  # least recently used first
        self._in_use: Expert | None = None
        self._pin_memory = pin_memory
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="experts")

    def get(self, expert: Expert) -> ExpertWeights:
        """See `ExpertStore`."""
        self.counts.num_used += 1
        slot = self._slots.get(expert)
        if slot is None:
            slot = self._start(expert)
        else:
            self.counts.num_at_hand += 1
        self._slots.move_to_end(expert)
        self._in_use = expert
        try:
            return slot.weights.result()
        except BaseException:
            del self._slots[expert]  # so that another try reads it again
            raise

    def prefetch(self, experts: Sequence[Expert]) -> None:
        """See `ExpertStore`; as many as there is room for beside the expert that was asked for last."""
        for expert in experts[: self.num_slots - 1]:
            if expert not in self._slots:
                self._start(expert)

    def close(self) -> None:
        """See `ExpertStore`."""
        self._reader.shutdown(cancel_futures=True)
        self._slots.clear()
        self._files.close()

    def _start(self, expert: Expert) -> _Slot:
        """Begin to read an expert, in the place of the least recently used one."""
        memory = self._memory()
        self.counts.num_bytes_read += sum(part.num_bytes for part in self._parts[expert])
        weights = self._reader.submit(read_parts, self._parts[expert], self._files, memory)
        slot = self._slots[expert] = _Slot(memory=memory, weights=weights)
        return slot

    def _memory(self) -> Tensor:
        if len(self._slots) < self.num_slots:
            return torch.empty(self._slot_bytes, dtype=torch.uint8, pin_memory=self._pin_memory)
        victim = next(expert for expert in self._slots if expert != self._in_use or self.num_slots == 1)
        oldest = self._slots.pop(victim)
        if not oldest.weights.cancel():
            with suppress(Exception):  # it is not wanted any more
                oldest.weights.result()
        return oldest.memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Offload:
    """How routed experts stay in the file.

    Attributes:
        cache_bytes: memory for the most recently used ones; None leaves it to the kernel's page cache.
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
