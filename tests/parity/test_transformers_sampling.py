"""What can be chosen, and how probable it is, against transformers' own logits processors."""

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama4_quant.runtime.penalties import TokenHistory
from llama4_quant.runtime.sampling import GenerationSettings, probabilities

ROWS, VOCABULARY, PROMPT = 16, 500, 40
PROCESSORS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
"""In the order in which transformers' `generate` applies them."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "chosen",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 2.5, "top_k": 40},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "repetition_penalty": 0.8, "top_p": 0.5},
        {"temperature": 1.5, "top_k": 50, "top_p": 0.8, "min_p": 0.08, "repetition_penalty": 1.2},
    ],
    ids="-".join,
)
def test_same_tokens_same_probabilities(chosen: dict[str, Any], seed: int) -> None:
    """Sets are equal; probabilities within 1e-5 of each other.

    Logits are at most about 15 / 0.6 = 25, so one rounding is 25 * 2^-24 = 1.5e-6, and there are three before the
    exponential (penalty, temperature, shift) and three after it of 6e-8: below 1e-5 of the probability.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, VOCABULARY, generator=generator) * 4
    ids = torch.randint(0, VOCABULARY, (ROWS, PROMPT), generator=generator)
    processors = LogitsProcessorList([make(chosen[name]) for name, make in PROCESSORS.items() if name in chosen])
    expected = processors(ids, logits.clone()).softmax(dim=-1)

    settings = GenerationSettings(**chosen)
    history = TokenHistory(ids[:, :-5], None, settings, VOCABULARY)
    for column in range(PROMPT - 5, PROMPT):
        history.add(ids[:, column])
    found = probabilities(history.penalize(logits), settings)

    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    limits = {"top_k", "top_p", "min_p"} & chosen.keys()
    assert bool(limits) == bool((expected == 0).any())
