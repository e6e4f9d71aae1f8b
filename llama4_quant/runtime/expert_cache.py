"""A cache of routed experts in memory of a given size, which keeps the most used ones (popularity.py)."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.checkpoint.tensor_files import TensorFiles
from llama4_quant.errors import UsageError
from llama4_quant.runtime.expert_tensors import (
    Expert,
    ExpertPart,
    ExpertWeights,
    can_be_mapped,
    map_parts,
    num_bytes,
    read_parts,
    will_need,
    with_rows,
)
from llama4_quant.runtime.popularity import Popularity

READ_AHEAD = 2
"""Experts that are on their way while one works."""


@dataclass(kw_only=True, slots=True)
class StoreCounts:
    """What a store has done.

    Attributes:
        num_used: times that an expert was asked for.
        num_hits: of these, how often it was in memory before it was announced.
        num_bytes_copied: read into the cache.
        num_bytes_mapped: used as pages of the file, from the page cache or the disk.
    """

    num_used: int = 0
    num_hits: int = 0
    num_bytes_copied: int = 0
    num_bytes_mapped: int = 0


@dataclass(kw_only=True, slots=True)
class _Slot:
    """Memory for one expert, and what is or will be in it.

    Attributes:
        is_new: it was read for a use that is still to come.
    """

    memory: Tensor
    weights: Future[ExpertWeights]
    is_new: bool = True


class CachedExperts:
    """Experts in memory of a given size.

    What is not in it and not popular enough to get in is used as pages of the file, where it is stored as kernels take
    it: copying it would take longer than to work with it. Such pages are the kernel's, which takes them back when it
    needs room. Otherwise everything passes through the cache's memory.

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
            pin_memory: for a GPU, which fetches weights from such memory, and not from pages of a file.

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
        self._popularity = Popularity()
        self._wanted: set[Expert] = set()
        self._in_use: Expert | None = None
        self._announced: set[Expert] = set()  # read ahead as pages of the file
        self._maps = not pin_memory and all(map(can_be_mapped, parts.values()))
        self._pin_memory = pin_memory
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="experts")

    def begin(self, layer: int, rows: Sequence[int]) -> list[Expert]:
        """See `ExpertStore`: first what is here, so that nothing of it goes before it was used."""
        self._popularity.count(layer, rows)
        wanted = with_rows(layer, rows)
        self._wanted = set(wanted)
        self._announced &= self._wanted
        return sorted(wanted, key=self._is_missing)

    def get(self, expert: Expert) -> ExpertWeights:
        """See `ExpertStore`."""
        self.counts.num_used += 1
        self._in_use = expert
        self._wanted.discard(expert)
        slot = self._slots.get(expert) or self._start(expert)
        if slot is None:
            self._announce(expert)  # a fault reads little at a time, and waits for it
            self._announced.discard(expert)
            self.counts.num_bytes_mapped += self._file_bytes(expert)
            return map_parts(self._parts[expert], self._files)
        self.counts.num_hits += not slot.is_new
        slot.is_new = False
        self._slots.move_to_end(expert)
        try:
            return slot.weights.result()
        except BaseException:
            del self._slots[expert]  # so that another try reads it again
            raise

    def prefetch(self, experts: Sequence[Expert]) -> None:
        """See `ExpertStore`; not in the place of the expert that was asked for last, or of one of these."""
        self._wanted.update(experts)
        missing = filter(self._is_missing, experts)
        for expert, _ in zip(missing, range(READ_AHEAD), strict=False):
            if expert in self._slots or expert in self._announced:
                continue
            if self._start(expert) is None and self._maps:
                self._announce(expert)

    def close(self) -> None:
        """See `ExpertStore`."""
        self._reader.shutdown(cancel_futures=True)
        self._slots.clear()
        self._files.close()

    def _is_missing(self, expert: Expert) -> bool:
        """It is not in memory, or was read for a use that is still to come."""
        slot = self._slots.get(expert)
        return slot is None or slot.is_new

    def _start(self, expert: Expert) -> _Slot | None:
        """Begin to read an expert into memory; None if there is none for it."""
        memory = self._memory(expert)
        if memory is None:
            return None
        self.counts.num_bytes_copied += self._file_bytes(expert)
        weights = self._reader.submit(read_parts, self._parts[expert], self._files, memory)
        slot = self._slots[expert] = _Slot(memory=memory, weights=weights)
        return slot

    def _announce(self, expert: Expert) -> None:
        """Have the kernel read the pages of an expert, once."""
        if expert not in self._announced:
            self._announced.add(expert)
            will_need(self._parts[expert], self._files)

    def _file_bytes(self, expert: Expert) -> int:
        return sum(part.num_bytes for part in self._parts[expert])

    def _memory(self, expert: Expert) -> Tensor | None:
        """A slot of its own while there are any, then the least popular expert's, the last used of equals."""
        if len(self._slots) < self.num_slots:
            return torch.empty(self._slot_bytes, dtype=torch.uint8, pin_memory=self._pin_memory)
        kept = self._wanted | {self._in_use}
        victim = min(
            (other for other in reversed(self._slots) if other not in kept), key=self._popularity.share, default=None
        )
        if self._maps:
            if victim is None or not self._popularity.is_ahead(expert, victim):
                return None
        elif victim is None:
            if self._in_use != expert:
                return None  # what is only announced waits
            victim = next(iter(self._slots))
        evicted = self._slots.pop(victim)
        if not evicted.weights.cancel():
            with suppress(Exception):  # it is not wanted any more
                evicted.weights.result()
        return evicted.memory
