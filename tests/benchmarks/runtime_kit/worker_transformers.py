"""One row of transformers: `python -m runtime_kit.worker_transformers JOB.json RESULT.json`.

BF16, or what compressed-tensors makes of a quantized checkpoint. Attention is sdpa; of experts transformers has one
implementation for Llama 4 (every token through every expert), fused in BF16 and one by one when quantized.
"""

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from .loop import measure, read_job, write_result


class Transformers:
    """A transformers model and its cache."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._logits = torch.empty(0)

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        self._cache = DynamicCache(config=self._model.config)
        self._forward(torch.tensor(rows))

    def step(self, tokens: Sequence[int]) -> None:
        self._forward(torch.tensor(tokens)[:, None])

    def logits(self) -> list[list[float]]:
        return [row.tolist() for row in self._logits[:, -1].float()]

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor) -> None:
        self._logits = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits


def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    load_seconds = time.perf_counter() - started
    found = measure(Transformers(model), job)
    notes = [f"transformers {version('transformers')}, sdpa"]
    if hasattr(model, "hf_quantizer"):
        notes.append(f"compressed-tensors {version('compressed-tensors')}")
    write_result({"": found}, load_seconds=load_seconds, notes=notes)


if __name__ == "__main__":
    main()
