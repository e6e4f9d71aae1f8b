"""A prompt computed in chunks gives what it gives at once: text, batches, images, behind what is cached."""

import pytest
import torch
from runtime.tiny_model import IMAGE_TOKEN, image_config, random_ids, random_model, text_config

from llama4_quant.errors import UsageError
from llama4_quant.runtime import Llama4Model
from llama4_quant.runtime.generate import generate
from llama4_quant.runtime.sampling import GenerationSettings

CHUNKS = (1, 3, 5, 8, 16, 37, 100)
# Hidden states of four layers in float32, whose sums are taken in another order: some hundred roundings of 2^-24 of
# logits below 4.
BOUND = {"atol": 4 * 200 * 2**-24, "rtol": 0.0}


@pytest.fixture(scope="module")
def model() -> Llama4Model:
    return random_model(text_config())


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_chunks_change_nothing(kind: str) -> None:
    model, ids = random_model(text_config(), attention=kind), random_ids(2, 37)
    expected = model(ids, logits="last")
    for chunk_size in CHUNKS:
        cache = model.new_cache(2)
        found = model.prefill(ids, cache=cache, chunk_size=chunk_size)
        torch.testing.assert_close(found, expected, **BOUND)
        assert cache.length == 37
        following = random_ids(2, 1, seed=5)
        whole = model(torch.cat([ids, following], dim=1), logits="last")
        torch.testing.assert_close(model(following, cache=cache, logits="last"), whole, **BOUND)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_rows_of_different_lengths(model: Llama4Model, chunk_size: int) -> None:
    ids, lengths = random_ids(3, 37), (37, 20, 4)
    mask = torch.stack([(torch.arange(37) >= 37 - length).long() for length in lengths])
    found = model.prefill(ids, cache=model.new_cache(3), attention_mask=mask, chunk_size=chunk_size)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, 37 - length :], logits="last")
        torch.testing.assert_close(found[row : row + 1], alone, **BOUND)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_behind_what_is_cached(model: Llama4Model, chunk_size: int) -> None:
    ids = random_ids(1, 37)
    cache = model.new_cache(1)
    model(ids[:, :11], cache=cache)
    found = model.prefill(ids[:, 11:], cache=cache, chunk_size=chunk_size)
    torch.testing.assert_close(found, model(ids, logits="last"), **BOUND)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_images_may_lie_across_chunks(chunk_size: int) -> None:
    model = random_model(image_config())
    vision = model.config.vision
    assert vision is not None
    ids = random_ids(2, 30)
    ids[0, 3 : 3 + vision.tokens_per_tile] = IMAGE_TOKEN
    ids[0, 12 : 12 + vision.tokens_per_tile] = IMAGE_TOKEN
    ids[1, 7 : 7 + vision.tokens_per_tile] = IMAGE_TOKEN
    pixels = torch.randn(3, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(0))
    expected = model(ids, pixel_values=pixels, logits="last")
    found = model.prefill(ids, pixel_values=pixels, cache=model.new_cache(2), chunk_size=chunk_size)
    torch.testing.assert_close(found, expected, **BOUND)


def test_generation_does_not_depend_on_chunks(model: Llama4Model) -> None:
    ids = random_ids(2, 37)
    found = [
        generate(
            model, ids, settings=GenerationSettings(max_new_tokens=12, eos_token_ids=(), prefill_chunk_size=size)
        ).new_token_ids
        for size in (None, 4, 2048)
    ]
    assert found[0] == found[1] == found[2]


def test_mistakes_are_told_before_the_first_chunk(model: Llama4Model) -> None:
    ids, cache = random_ids(2, 20), model.new_cache(2)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 12] = 0
    with pytest.raises(UsageError, match="pad on the left"):
        model.prefill(ids, cache=cache, attention_mask=mask, chunk_size=4)
    with pytest.raises(UsageError, match="prefill_chunk_size is 0"):
        model.prefill(ids, cache=cache, chunk_size=0)
    assert cache.length == 0
