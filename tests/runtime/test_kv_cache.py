"""The cache: growth, what it forgets, and what it costs."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime.tiny_model import random_ids, random_model, text_config

from llama4_quant.architecture import Llama4Config
from llama4_quant.runtime import KVCache
from llama4_quant.runtime.cache import Capacity, LayerCache, cache_bytes, first_visible_column

SCOUT = Path(__file__).parents[1] / "data" / "scout.json"

CPU = torch.device("cpu")
CONFIG = text_config().text  # 4 layers: RoPE, RoPE, RoPE, NoPE; chunk 8; 2 heads of 16


def _cache(batch: int, capacity: int = 4) -> KVCache:
    return KVCache(CONFIG, batch, dtype=torch.float32, device=CPU, capacity=capacity)


def _fill(cache: KVCache, count: int, padding: tuple[int, ...]) -> None:
    """Keys whose value is their column."""
    columns = torch.arange(cache.length, cache.length + count, dtype=torch.float32)
    keys = columns.view(1, 1, -1, 1).expand(cache.batch_size, 2, count, 16)
    for layer in cache.layers:
        layer.append(keys, -keys, cache.length)
    cache.advance(count, padding)


@pytest.mark.parametrize(
    ("padding", "column", "chunk", "expected"),
    [(0, 0, 8, 0), (0, 7, 8, 0), (0, 8, 8, 8), (3, 10, 8, 3), (3, 11, 8, 11), (3, 1, 8, 3), (3, 100, None, 3)],
)
def test_first_visible_column(padding: int, column: int, chunk: int | None, expected: int) -> None:
    assert first_visible_column(padding, column, chunk) == expected


@pytest.mark.parametrize("padding", [(0, 0), (3, 0), (2, 5)])
def test_keeps_what_the_next_token_sees(padding: tuple[int, int]) -> None:
    cache = _cache(2)
    for count in (5, 1, 1, 1, 1, 13, 1, 2, 40, 1, 1, 1, 1, 1, 1, 1, 1, 1):
        _fill(cache, count, padding)
        past = cache.length
        new = torch.full((2, 2, 1, 16), float(past))
        for index, layer in enumerate(cache.layers):
            keys, values = layer.append(new, -new, past)
            chunk = 8 if index < 3 else None
            needed = min(first_visible_column(pad, past, chunk) for pad in padding)
            assert layer.first <= needed
            expected = torch.arange(layer.first, past + 1, dtype=torch.float32)
            assert torch.equal(keys, expected.view(1, 1, -1, 1).expand_as(keys))
            assert torch.equal(values, -keys)
            if chunk is not None:  # nothing older than what some row still sees
                assert layer.first == needed


def test_rope_layers_shrink_to_a_chunk_and_bytes_are_counted() -> None:
    cache = _cache(3, capacity=16)
    bytes_per_column = 3 * 2 * 16 * 4 * 2  # rows, heads, head_dim, fp32, keys and values
    assert cache.num_bytes == (3 * 8 + 16) * bytes_per_column
    _fill(cache, 1000, (0, 0, 0))
    assert [layer.num_bytes for layer in cache.layers] == [8 * bytes_per_column] * 3 + [1000 * bytes_per_column]
    _fill(cache, 1, (0, 0, 0))
    assert cache.layers[3].num_bytes == 2000 * bytes_per_column


def test_capacity_never_reallocates_when_it_is_enough() -> None:
    layer = LayerCache((1, 1, 4), Capacity(None, 10), torch.float32, CPU)
    keys, _ = layer.append(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), 0)
    more, _ = layer.append(torch.ones(1, 1, 6, 4), torch.ones(1, 1, 6, 4), 4)
    assert keys.data_ptr() == more.data_ptr()


def test_a_failed_step_can_be_repeated() -> None:
    model, ids = random_model(text_config()), random_ids(1, 12)
    expected = model(ids)
    cache = model.new_cache(1)
    model(ids[:, :10], cache=cache)
    with pytest.raises(IndexError):
        model(torch.tensor([[5, 1000]]), cache=cache)  # no such token
    for layer in cache.layers:  # as if it had failed in the last layer
        layer.append(torch.full((1, 2, 2, 16), torch.nan), torch.full((1, 2, 2, 16), torch.nan), 10)
    torch.testing.assert_close(model(ids[:, 10:], cache=cache), expected[:, 10:])


@given(
    st.integers(1, 70),
    st.one_of(st.none(), st.integers(1, 30)),
    st.one_of(st.none(), st.integers(1, 80)),
    st.integers(1, 3),
)
@settings(max_examples=80, deadline=None)
def test_bytes_are_those_that_were_predicted(
    num_tokens: int, prefill_chunk_size: int | None, capacity: int | None, batch_size: int
) -> None:
    """The most that is allocated at any time, seen when all layers have stored a chunk and none has forgotten."""
    model = random_model(text_config())
    cache = model.new_cache(batch_size, capacity or num_tokens)
    seen = [cache.num_bytes]
    advance = cache.advance

    def watched(num_columns: int, padding: tuple[int, ...]) -> None:
        seen.append(cache.num_bytes)
        advance(num_columns, padding)

    cache.advance = watched  # type: ignore[method-assign]
    model.prefill(random_ids(batch_size, num_tokens), cache=cache, chunk_size=prefill_chunk_size)
    predicted = cache_bytes(
        model.config.text,
        num_tokens,
        batch_size=batch_size,
        dtype=torch.float32,
        prefill_chunk_size=prefill_chunk_size,
        capacity=capacity,
    )
    assert max(seen) == predicted
    assert cache.length == num_tokens


def test_a_million_tokens_of_scout_take_a_quarter_of_a_cache_that_forgets_nothing() -> None:
    config = Llama4Config.from_dict(json.loads(SCOUT.read_text())).text
    predicted = cache_bytes(config, 1_000_000, prefill_chunk_size=2048)
    naive = 1_000_000 * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2
    full = 1_000_000 * 12 * 2 * 8 * 128 * 2  # every fourth of 48 layers
    chunked = 8192 * 36 * 2 * 8 * 128 * 2
    assert predicted == full + chunked
    assert predicted < 0.257 * naive
