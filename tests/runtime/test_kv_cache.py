"""The cache: what it keeps, where, and what it costs."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime.tiny_model import random_ids, random_model, text_config
from torch import Tensor

from llama4_quant.architecture import Llama4Config
from llama4_quant.errors import UsageError
from llama4_quant.runtime import KVCache
from llama4_quant.runtime.cache import LayerCache, allocated_columns, cache_bytes, first_visible_column
from llama4_quant.runtime.cache_formats import CacheDtype, LayerFormat

SCOUT = Path(__file__).parents[1] / "data" / "scout.json"
CPU = torch.device("cpu")
CONFIG = text_config().text  # 4 layers: RoPE, RoPE, RoPE, NoPE; chunk 8; 2 heads of 16
PLAIN = LayerFormat.choose(CacheDtype.AUTO, torch.float32, None)


def _layer(reserved: int, window: int | None = None, kind: CacheDtype = CacheDtype.AUTO) -> LayerCache:
    layer_format = LayerFormat.choose(kind, torch.float32, None)
    return LayerCache((2, 2, 16), layer_format, CPU, reserved=reserved, window=window)


def _columns(start: int, stop: int) -> Tensor:
    """Keys whose value is their column, a different one for each row."""
    rows = torch.tensor([[1.0], [-1.0]])
    return (rows * torch.arange(start, stop, dtype=torch.float32)).view(2, 1, -1, 1).expand(2, 2, stop - start, 16)


def _store(layer: LayerCache, start: int, stop: int) -> None:
    keys = _columns(start, stop)
    layer.store(start, layer.encode(keys, -keys))


def _read(layer: LayerCache, start: int, stop: int, max_columns: int = 5, rows: slice = slice(None)) -> Tensor:
    pieces = list(layer.read(start, stop, torch.float32, rows=rows, max_columns=max_columns))
    assert [piece.start for piece in pieces] == [start, *(piece.stop for piece in pieces[:-1])]
    keys = torch.cat([piece.keys for piece in pieces], dim=2)
    assert torch.equal(torch.cat([piece.values for piece in pieces], dim=2), -keys)
    return keys


@pytest.mark.parametrize(
    ("padding", "column", "chunk", "expected"),
    [(0, 0, 8, 0), (0, 7, 8, 0), (0, 8, 8, 8), (3, 10, 8, 3), (3, 11, 8, 11), (3, 1, 8, 3), (3, 100, None, 3)],
)
def test_first_visible_column(padding: int, column: int, chunk: int | None, expected: int) -> None:
    assert first_visible_column(padding, column, chunk) == expected


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 50), st.one_of(st.none(), st.integers(1, 20))
)
@settings(max_examples=150, deadline=None)
def test_what_was_stored_last_is_read_back_in_order(counts: list[int], reserved: int, window: int | None) -> None:
    layer, stop = _layer(reserved, window), 0
    for count in counts:
        _store(layer, stop, stop + count)
        stop += count
        assert layer.first == (0 if window is None else max(0, stop - window))
        assert torch.equal(_read(layer, layer.first, stop), _columns(layer.first, stop))
        middle = (layer.first + stop) // 2
        assert torch.equal(_read(layer, middle, stop, rows=slice(1, 2)), _columns(middle, stop)[1:])


def test_codes_are_decoded_in_pieces_of_a_bounded_size() -> None:
    layer = _layer(7, None, CacheDtype.INT8)
    _store(layer, 0, 300)
    sizes = [piece.keys.shape[2] for piece in layer.read(3, 300, torch.float32, max_columns=50)]
    assert sum(sizes) == 297
    assert max(sizes) == 50
    views = _layer(300)
    _store(views, 0, 300)
    [piece] = views.read(3, 300, torch.float32, max_columns=50)
    assert piece.keys.data_ptr() == next(views.read(3, 4, torch.float32, max_columns=1)).keys.data_ptr()  # no copy


def test_what_is_stored_does_not_move() -> None:
    layer = _layer(10)
    _store(layer, 0, 10)
    [before] = layer.read(0, 10, torch.float32, max_columns=99)
    _store(layer, 10, 5000)
    after = next(layer.read(0, 5000, torch.float32, max_columns=99))
    assert before.keys.data_ptr() == after.keys.data_ptr()


@given(st.integers(0, 20_000), st.integers(0, 3000), st.one_of(st.none(), st.integers(1, 9000)))
@settings(max_examples=200, deadline=None)
def test_room_grows_by_an_eighth(num_columns: int, reserved: int, window: int | None) -> None:
    total = sum(allocated_columns(num_columns, reserved, window))
    needed = num_columns if window is None else min(num_columns, window)
    assert total >= needed
    if window is not None:
        assert total <= window
    if needed <= reserved:
        assert total == (reserved if window is None else min(reserved, window))
    else:  # an eighth of less than is needed, in whole blocks of 256
        assert total < needed + needed / 8 + 256


def test_rope_layers_have_room_for_a_chunk_and_bytes_are_counted() -> None:
    cache = KVCache(CONFIG, 3, dtype=torch.float32, device=CPU, capacity=16)
    bytes_per_column = 3 * 2 * 16 * 4 * 2  # rows, heads, head_dim, fp32, keys and values
    assert cache.num_bytes == (3 * 8 + 16) * bytes_per_column
    new = torch.zeros(3, 2, 1000, 16)
    for layer in cache.layers:
        layer.store(0, layer.encode(new, new))
    room = 16 + 4 * 256
    assert [layer.num_bytes for layer in cache.layers] == [8 * bytes_per_column] * 3 + [room * bytes_per_column]


def test_a_failed_step_can_be_repeated() -> None:
    model, ids = random_model(text_config()), random_ids(1, 12)
    expected = model(ids)
    cache = model.new_cache(1)
    model(ids[:, :10], cache=cache)
    with pytest.raises(IndexError):
        model(torch.tensor([[5, 1000]]), cache=cache)  # no such token
    broken = torch.full((1, 2, 2, 16), torch.nan)
    for layer in cache.layers:  # as if it had failed in the last layer
        layer.store(10, layer.encode(broken, broken))
    torch.testing.assert_close(model(ids[:, 10:], cache=cache), expected[:, 10:])


def test_a_failed_step_that_replaced_what_is_needed_is_found_out() -> None:
    model, ids = random_model(text_config()), random_ids(1, 30)
    cache = model.new_cache(1)
    model(ids[:, :10], cache=cache)
    new = torch.zeros(1, 2, 20, 16)
    cache.layers[0].store(10, cache.layers[0].encode(new, new))  # as if the second layer had failed
    with pytest.raises(UsageError, match="holds columns from 22 on, and column 8 is needed"):
        model(ids[:, 10:11], cache=cache)


@given(
    st.integers(1, 70),
    st.one_of(st.none(), st.integers(1, 30)),
    st.one_of(st.none(), st.integers(1, 80)),
    st.integers(1, 3),
    st.sampled_from(CacheDtype),
)
@settings(max_examples=80, deadline=None)
def test_bytes_are_those_that_were_predicted(
    num_tokens: int, prefill_chunk_size: int | None, capacity: int | None, batch_size: int, kind: CacheDtype
) -> None:
    model = random_model(text_config())
    cache = model.new_cache(batch_size, num_tokens if capacity is None else capacity, kind)
    model.prefill(random_ids(batch_size, num_tokens), cache=cache, chunk_size=prefill_chunk_size)
    predicted = cache_bytes(
        model.config.text, num_tokens, batch_size=batch_size, dtype=torch.float32, kind=kind, capacity=capacity
    )
    assert cache.num_bytes == predicted
    assert cache.length == num_tokens


def test_a_million_tokens_of_scout_take_a_quarter_of_a_cache_that_forgets_nothing() -> None:
    config = Llama4Config.from_dict(json.loads(SCOUT.read_text())).text
    everything = 1_000_000 * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2
    full = 1_000_000 * 12 * 2 * 8 * 128 * 2  # every fourth of 48 layers
    chunked = 8192 * 36 * 2 * 8 * 128 * 2
    assert cache_bytes(config, 1_000_000) == full + chunked
    assert full + chunked < 0.257 * everything
    assert cache_bytes(config, 1_000_000, kind=CacheDtype.FP8, has_scales=True) == (full + chunked) // 2
    assert cache_bytes(config, 1_000_000, kind=CacheDtype.INT8) == (full + chunked) * 130 // 256  # a scale: 2 bytes
