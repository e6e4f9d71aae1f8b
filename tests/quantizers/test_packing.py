import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from llama4_quant.errors import QuantizationError
from llama4_quant.quantizers.packing import pack_int4, packed_features, unpack_int4

shapes = st.lists(st.integers(0, 5), max_size=3).flatmap(lambda lead: st.integers(1, 70).map(lambda k: (*lead, k)))


def random_codes(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(-8, 8, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@given(shape=shapes, seed=st.integers(0, 2**31))
def test_unpacking_gives_back_the_codes_for_every_shape(shape: tuple[int, ...], seed: int) -> None:
    codes = random_codes(shape, seed)
    packed = pack_int4(codes)
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 8))
    assert packed.dtype is torch.int32
    assert torch.equal(unpack_int4(packed, shape[-1]), codes)


@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_every_word_is_the_packing_of_its_codes(words: list[int]) -> None:
    packed = torch.tensor([words], dtype=torch.int32)
    assert torch.equal(pack_int4(unpack_int4(packed, 8 * len(words))), packed)


def test_a_word_holds_code_plus_8_low_nibble_first() -> None:
    packed = pack_int4(torch.tensor([[-8, -7, -6, -5, -4, -3, -2, 7]], dtype=torch.int8))
    assert packed.tolist() == [[0xF6543210 - 2**32]]


def test_bits_beyond_the_last_code_are_zero() -> None:
    assert pack_int4(torch.tensor([[0, 1, 2]], dtype=torch.int8)).tolist() == [[0xA98]]


def test_strided_input_packs_like_its_copy() -> None:
    codes = random_codes((40, 24)).T
    assert torch.equal(pack_int4(codes), pack_int4(codes.contiguous()))
    packed = pack_int4(random_codes((16, 24))).T.contiguous().T
    assert torch.equal(unpack_int4(packed, 24), unpack_int4(packed.contiguous(), 24))


def test_rows_beyond_one_chunk_are_packed_too() -> None:
    codes = random_codes((700, 1001))  # 2.7 chunks
    assert torch.equal(unpack_int4(pack_int4(codes), 1001), codes)


@pytest.mark.parametrize("wrong", [-9, 8, 127])
def test_a_code_that_does_not_fit_is_refused(wrong: int) -> None:
    codes = torch.zeros(2, 16, dtype=torch.int8)
    codes[1, 3] = wrong
    with pytest.raises(QuantizationError, match=str(wrong)):
        pack_int4(codes)


def test_other_dtypes_and_row_lengths_are_refused() -> None:
    with pytest.raises(QuantizationError, match="int8"):
        pack_int4(torch.zeros(2, 16, dtype=torch.int32))
    with pytest.raises(QuantizationError, match="int32"):
        unpack_int4(torch.zeros(2, 2, dtype=torch.int64), 16)
    with pytest.raises(QuantizationError, match=r"17 inputs: expected int32 \[\.\.\., 3\], found int32 \[2, 2\]"):
        unpack_int4(torch.zeros(2, 2, dtype=torch.int32), 17)


def test_packed_features_rounds_up() -> None:
    assert [packed_features(k) for k in (1, 8, 9, 16)] == [1, 1, 2, 2]
