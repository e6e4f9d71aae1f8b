"""The sample's logits over many attention chunks, computed in pieces, against transformers: fp32, eager and sdpa."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llama4_quant.runtime.loader import load
from llama4_quant.runtime.tokenizer import Tokenizer
from llama4_quant.sample import HELD_OUT_TEXT, SAMPLE_DIR

# fp32 on both sides, sums in other orders: the project's bound, 1e-4 of the logits' standard deviation.
TOLERANCE = 1e-4
LENGTH = 400  # the sample's attention chunks have 64 tokens


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    text = Path(HELD_OUT_TEXT).read_text(encoding="utf-8")
    return torch.tensor([Tokenizer.from_folder(SAMPLE_DIR).encode(text[:8000], bos=True)[:LENGTH]])


@pytest.fixture(scope="module")
def expected(ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(SAMPLE_DIR, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.inference_mode()
def test_logits_across_chunks(ids: torch.Tensor, expected: torch.Tensor, attention: str) -> None:
    model = load(SAMPLE_DIR, dtype="float32", attention=attention)
    assert ids.shape[1] > 6 * model.config.text.attention_chunk_size
    deviation = float(expected.std())
    cache, pieces = model.new_cache(1), (50, 64, 1, 13, 100, 172)
    assert sum(pieces) == LENGTH
    found = torch.cat([model(part, cache=cache) for part in ids.split(list(pieces), dim=1)], dim=1)
    assert float((found - expected).abs().max()) < TOLERANCE * deviation
    for chunk_size in (7, 64, 100, None):
        last = model.prefill(ids, cache=model.new_cache(1), chunk_size=chunk_size)
        assert float((last[:, -1] - expected[:, -1]).abs().max()) < TOLERANCE * deviation
