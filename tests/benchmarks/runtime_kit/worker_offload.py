"""One row with experts in the file: `python -m runtime_kit.worker_offload JOB.json RESULT.json`.

If the job says "evict", experts lie on the disk, not in the page cache: before a layer's experts work, those of the
layer before, which have worked, are unmapped and asked out of it.
"""

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llama4_quant import load
from llama4_quant.checkpoint.reader import CheckpointReader, TensorEntry
from llama4_quant.runtime.expert_cache import CachedExperts
from llama4_quant.runtime.model import Llama4Model
from llama4_quant.runtime.offload import OffloadedExperts

from .loop import measure, read_job, write_result
from .worker_ours import Ours


class Counted(Ours):
    """Notes what the store of experts does in every call.

    Attributes:
        calls: by number of rows, of prompts ("prefill") or steps: tokens, experts used, hits, bytes read.
    """

    def __init__(self, model: Llama4Model, capacity: int) -> None:
        super().__init__(model, capacity)
        self.calls: dict[str, list[tuple[int, int, int, int]]] = {}
        self._store = model.expert_store

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        with self._counted("prefill" if len(rows) == 1 else "", sum(map(len, rows))):
            super().prefill(rows)

    def step(self, tokens: Sequence[int]) -> None:
        with self._counted(str(len(tokens)), len(tokens)):
            super().step(tokens)

    def totals(self) -> dict[str, list[int]]:
        """Sums of all calls but the first of each kind, which fills the cache."""
        return {kind: [sum(column) for column in zip(*calls[1:], strict=True)] for kind, calls in self.calls.items()}

    @contextmanager
    def _counted(self, kind: str, num_tokens: int) -> Iterator[None]:
        before = self._counts()
        yield
        used, hits, read = (now - then for now, then in zip(self._counts(), before, strict=True))
        self.calls.setdefault(kind, []).append((num_tokens, used, hits, read))

    def _counts(self) -> tuple[int, int, int]:
        if not isinstance(self._store, CachedExperts):
            return 0, 0, 0
        counts = self._store.counts
        return counts.num_used, counts.num_hits, counts.num_bytes_copied + counts.num_bytes_mapped


def keep_on_disk(model: Llama4Model, path: Path) -> None:
    """Before a layer's experts work, drop those of the layer before, which have worked."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, OffloadedExperts)]
    with CheckpointReader.open(path) as reader:
        entries = list(reader.tensors.values())
    files = {entry.path: os.open(entry.path, os.O_RDONLY) for entry in entries}
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def evict(done: Sequence[TensorEntry]) -> None:
        for address, size, offset, file in mapped_files():
            for entry in done:
                first = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
                if str(entry.path) == file and offset <= first < offset + size:  # or the kernel would keep the pages
                    advise(address + first - offset, entry.start + entry.nbytes - first, mmap.MADV_DONTNEED)
        for entry in done:
            os.posix_fadvise(files[entry.path], entry.start, entry.nbytes, os.POSIX_FADV_DONTNEED)

    for number, (_, module) in enumerate(layers):
        name = f"{layers[number - 1][0]}."
        done = [entry for entry in entries if name in entry.name]
        module.register_forward_pre_hook(lambda *_, done=done: evict(done))


def mapped_files() -> Iterator[tuple[int, int, int, str]]:
    """Address, size, offset in the file, and path of every mapping of a file into this process."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        addresses, _, offset, *_, name = line.split(maxsplit=5)
        if name.endswith(".safetensors"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield start, end - start, int(offset, 16), name


def main() -> None:
    job: dict[str, Any] = read_job()
    torch.set_num_threads(job["threads"])
    model = load(job["model"], **job["load"])
    if job["evict"]:
        keep_on_disk(model, Path(job["model"]))
    engine = Counted(model, job["capacity"])
    found = measure(engine, job)
    kernels = [str(kernel) for kernel in model.kernels()]
    write_result({"": found}, notes=kernels, counts=engine.totals())


if __name__ == "__main__":
    main()
