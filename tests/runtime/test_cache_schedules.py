"""However a batch comes in, its logits are those of each row alone, in one pass and without a cache.

Schedules are drawn at random: rows of different lengths, the prompt in chunks of some size, then steps of one or more
tokens, a cache that has room from the start or grows, and a step taken back.
"""

import random
from dataclasses import dataclass

import pytest
import torch
from runtime.tiny_model import random_ids, random_model, text_config
from torch import Tensor

from llama4_quant.runtime import Llama4Model
from llama4_quant.runtime.cache import KVCache

# float32 sums in another order: some hundred roundings of 2^-24 of logits below 4, as in test_chunked_prefill.py.
BOUND = {"atol": 4 * 200 * 2**-24, "rtol": 0.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Of one batch; `steps` are the columns that come at a time after the prompt."""

    padding: tuple[int, ...]
    prompt: int
    steps: tuple[int, ...]
    capacity: int
    chunk_size: int

    @classmethod
    def draw(cls, seed: int) -> "Schedule":
        draw = random.Random(seed)
        padding = (0, *(draw.randint(0, 30) for _ in range(draw.randint(0, 3))))
        return cls(
            padding=padding,
            prompt=max(padding) + draw.randint(1, 20),
            steps=tuple(draw.choice((1, 1, 1, 2, 9)) for _ in range(8)),
            capacity=draw.choice((1, 8, 300)),
            chunk_size=draw.choice((1, 3, 7, 16, 100)),
        )


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Llama4Model:
    return random_model(text_config(), attention=request.param)


def _computed(model: Llama4Model, ids: Tensor, schedule: Schedule, cache: KVCache) -> Tensor:
    """Logits of the prompt's last column and of all later ones: [B, 1 + sum(steps), vocabulary]."""
    prompt = ids[:, : schedule.prompt]
    columns = torch.arange(schedule.prompt)
    mask = torch.stack([(columns >= pad).long() for pad in schedule.padding])
    logits = [model.prefill(prompt, cache=cache, attention_mask=mask, chunk_size=schedule.chunk_size)[:, -1:]]
    logits += [model(part, cache=cache) for part in ids[:, schedule.prompt :].split(list(schedule.steps), dim=1)]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("seed", range(24))
@torch.inference_mode()
def test_any_schedule(model: Llama4Model, seed: int) -> None:
    schedule = Schedule.draw(seed)
    ids = random_ids(len(schedule.padding), schedule.prompt + sum(schedule.steps), seed=seed)
    cache = model.new_cache(len(schedule.padding), schedule.capacity)
    found = _computed(model, ids, schedule, cache)
    assert cache.length == ids.shape[1]
    for row, pad in enumerate(schedule.padding):
        alone = model(ids[row : row + 1, pad:])[0]
        torch.testing.assert_close(found[row], alone[schedule.prompt - pad - 1 :], **BOUND)
    if cache.rewind(cache.length - 1):
        again = model(ids[:, -1:], cache=cache)[:, 0]
        torch.testing.assert_close(again, found[:, -1], **BOUND)


def test_schedules_differ_in_what_matters() -> None:
    drawn = [Schedule.draw(seed) for seed in range(24)]
    chunk_size = text_config().text.attention_chunk_size
    assert chunk_size is not None
    assert any(len(set(schedule.padding)) > 2 for schedule in drawn), "rows of several lengths"
    assert any(schedule.prompt > 2 * chunk_size for schedule in drawn), "several attention chunks"
    assert {schedule.capacity for schedule in drawn} == {1, 8, 300}
    assert {schedule.chunk_size for schedule in drawn} == {1, 3, 7, 16, 100}
