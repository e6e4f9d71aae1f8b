"""One row of llama.cpp: `python -m runtime_kit.worker_llamacpp JOB.json RESULT.json`, in an environment with cyllama.

Weights are repacked for the processor where llama.cpp does that (its default). Each setting of flash attention is a
variant. With "exact" in the job, keys and values are in fp32, not fp16, and there is no flash attention, which rounds
too.
"""

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from cyllama.llama import llama_cpp as cpp

from .loop import measure, read_job, write_result

EXACT = {"no flash attention": 0}
FLASH_ATTENTION = EXACT | {"flash attention": 1}
FP32 = 0
"""`GGML_TYPE_F32`."""


class Model(cpp.LlamaModel):  # type: ignore[misc]
    """A model that knows its vocabulary: cyllama 0.2.18 asks it for that to give logits, and it does not."""

    @property
    def n_vocab(self) -> int:
        return int(self.get_vocab().n_vocab)


class LlamaCpp:
    """A context of llama.cpp; another one for each number of rows."""

    def __init__(self, model: Any, *, job: dict[str, Any], flash_attention: int) -> None:
        self._model, self._job, self._flash_attention = model, job, flash_attention
        self._context: Any = None
        self._num_rows = self._length = 0
        self._places: list[int] = []

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        if len(rows) != self._num_rows:
            self._num_rows, self._context = len(rows), self._new_context(len(rows), len(rows) * len(rows[0]))
        self._context.kv_cache_clear()
        self._length = len(rows[0])
        places = [(row, column) for row in range(len(rows)) for column in range(self._length)]
        self._decode([(rows[row][column], column, row, column == self._length - 1) for row, column in places])

    def step(self, tokens: Sequence[int]) -> None:
        self._decode([(token, self._length, row, True) for row, token in enumerate(tokens)])
        self._length += 1

    def logits(self) -> list[list[float]]:
        return [list(self._context.get_logits_ith(place)) for place in self._places]

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        """Token, position, row and whether its logits are wanted."""
        batch = cpp.LlamaBatch(n_tokens=len(entries), embd=0, n_seq_max=1)
        for token, position, row, wanted in entries:
            batch.add(token, position, [row], wanted)
        self._context.decode(batch)
        self._context.synchronize()
        self._places = [place for place, entry in enumerate(entries) if entry[3]]

    def _new_context(self, num_rows: int, num_tokens: int) -> Any:
        params = cpp.LlamaContextParams()
        params.n_ctx, params.n_seq_max = num_rows * self._job["capacity"], num_rows
        params.n_batch = params.n_ubatch = max(num_tokens, 512)
        params.n_threads = params.n_threads_batch = self._job["threads"]
        params.flash_attn_type = self._flash_attention
        if self._job.get("exact"):
            params.type_k = params.type_v = FP32
        return cpp.LlamaContext(self._model, params)


def main() -> None:
    job = read_job()
    cpp.disable_logging()
    cpp.ggml_backend_load_all()
    started = time.perf_counter()
    params = cpp.LlamaModelParams()
    params.n_gpu_layers = 0
    model = Model(job["model"], params)
    load_seconds = time.perf_counter() - started
    variants = {
        name: measure(LlamaCpp(model, job=job, flash_attention=setting), job)
        for name, setting in (EXACT if job.get("exact") else FLASH_ATTENTION).items()
    }
    write_result(variants, load_seconds=load_seconds, notes=[f"cyllama {version('cyllama')}", model.desc])


if __name__ == "__main__":
    main()
