import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from llama4_quant.quantizers.packing import pack_int4, unpack_int4

helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")

shapes = st.one_of(
    st.tuples(st.integers(1, 6), st.integers(1, 100)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40)),
)


@settings(max_examples=200, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_packing_is_the_same_both_ways_for_every_shape(shape: tuple[int, ...], seed: int) -> None:
    codes = torch.randint(-8, 8, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = pack_int4(codes)
    assert torch.equal(packed, helpers.pack_to_int32(codes, 4))
    assert torch.equal(helpers.unpack_from_int32(packed, 4, torch.Size(shape)), codes)
    assert torch.equal(unpack_int4(helpers.pack_to_int32(codes, 4), shape[-1]), codes)


@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=32))
def test_any_words_unpack_to_the_same_codes(words: list[int]) -> None:
    packed = torch.tensor([words], dtype=torch.int32)
    expected = helpers.unpack_from_int32(packed, 4, torch.Size((1, 8 * len(words))))
    assert torch.equal(unpack_int4(packed, 8 * len(words)), expected)
