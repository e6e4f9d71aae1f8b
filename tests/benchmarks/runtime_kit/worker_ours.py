"""One row of our runtime: `python -m runtime_kit.worker_ours JOB.json RESULT.json`."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llama4_quant import load
from llama4_quant.runtime.experts import MixtureOfExperts
from llama4_quant.runtime.model import Llama4Model

from .loop import measure, read_job, write_result


class Ours:
    """Our model and its cache."""

    def __init__(self, model: Llama4Model, capacity: int) -> None:
        self._model, self._capacity = model, capacity
        self._cache = model.new_cache(1, capacity)
        self._logits = torch.empty(0)

    @torch.inference_mode()
    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        self._cache = self._model.new_cache(len(rows), self._capacity)
        self._logits = self._model(torch.tensor(rows), cache=self._cache, logits="last")

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> None:
        self._logits = self._model(torch.tensor(tokens)[:, None], cache=self._cache, logits="last")

    def logits(self) -> list[list[float]]:
        return [row.tolist() for row in self._logits[:, -1].float()]


@contextmanager
def watched_experts(model: nn.Module, found: list[int]) -> Iterator[None]:
    """Append to `found` how many experts each call of each mixture chooses."""

    def watch(module: nn.Module, _arguments: Any, logits: Tensor) -> None:
        found.append(int(logits.flatten(0, -2).topk(num_chosen, dim=-1).indices.unique().numel()))

    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    num_chosen = mixtures[0].experts_per_token
    hooks = [mixture.router.register_forward_hook(watch) for mixture in mixtures]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def experts_hit(model: Llama4Model, engine: Ours, job: dict[str, Any]) -> dict[str, float]:
    """Distinct experts that a layer's decode step reads, on average, by batch size."""
    hit = {}
    for prompts in ([job["prompt"]], job["batch"]):
        engine.prefill(prompts)
        counts: list[int] = []
        with watched_experts(model, counts):
            for column in range(min(job["steps"], 16)):
                engine.step([row[column] for row in job["decode"][: len(prompts)]])
        hit[str(len(prompts))] = sum(counts) / len(counts)
    prompt: list[int] = []
    with watched_experts(model, prompt):
        engine.prefill([job["prompt"]])
    return hit | {"prompt": sum(prompt) / len(prompt)}


def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    started = time.perf_counter()
    model = load(job["model"], **job["load"])
    load_seconds = time.perf_counter() - started
    engine = Ours(model, job["capacity"])
    found = measure(engine, job)
    kernels = [str(kernel) for kernel in model.kernels()]
    hit = experts_hit(model, engine, job)
    write_result({"": found}, load_seconds=load_seconds, experts_hit=hit, notes=kernels)


if __name__ == "__main__":
    main()
