"""Keys and values of one byte: what comes out is as near as the codes allow, and the cache is as small as was said."""

import pytest
import torch
from runtime.tiny_model import random_ids, random_model, text_config
from torch import Tensor

from llama4_quant.errors import UsageError
from llama4_quant.ops.reference import round_fp8
from llama4_quant.runtime.cache import cache_bytes
from llama4_quant.runtime.cache_formats import CacheDtype, CacheFormat, CacheScales, LayerFormat

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16]


def _around(layer_format: CacheFormat, x: Tensor) -> Tensor:
    return layer_format.decode(layer_format.encode(x), x.dtype)


def _values(dtype: torch.dtype) -> Tensor:
    x = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(0))
    x = (x * torch.logspace(-3, 3, 7).view(1, 1, -1, 1)).to(dtype)
    x[0, 0, 4] = 0
    return x


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_within_half_a_step(dtype: torch.dtype) -> None:
    x = _values(dtype)
    step = CacheFormat(dtype=torch.int8).encode(x).scales
    assert step is not None
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    # The step is largest / 127 rounded to bf16, by 2^-8 of it at most. Rounded down, the largest is 127.5 steps, and
    # clamped to 127 no further off than a half. Then the product is rounded to the dtype: half a unit of the largest.
    assert bool(((step.float() - largest / 127).abs() <= largest / 127 * 2**-8).all())
    bound = step.float() / 2 + largest * torch.finfo(dtype).eps
    assert bool(((_around(CacheFormat(dtype=torch.int8), x).float() - x.float()).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_is_within_half_a_step(dtype: torch.dtype) -> None:
    x = _values(dtype)
    found = _around(CacheFormat(dtype=FP8), x)
    x32, largest = x.float().abs(), x.float().abs().amax(dim=-1, keepdim=True)
    # Half a step of three mantissa bits is 2^-4 of a number; below 2^-6 of the scale steps are even, half of one 2^-10
    # of it (the scale is largest / 448, up by at most 2^-8). The largest may be up to 2^-8 beyond the last code.
    bound = x32 * (2**-4 + 2 * torch.finfo(dtype).eps) + largest / 448 * 2**-10 * (1 + 2**-8) + largest * 2**-8
    assert bool(((found.float() - x.float()).abs() <= bound).all())
    assert not found[0, 0, 4].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fp8_code_is_decoded_exactly(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    codes = codes[~codes.float().isnan()].view(1, 1, 1, -1)
    scale = 2.0**-3
    layer_format = CacheFormat(dtype=FP8, scale=scale)
    numbers = codes.to(dtype) * scale
    assert torch.equal(_around(layer_format, numbers), numbers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_of_the_checkpoint_gives_what_rounding_with_it_gives(dtype: torch.dtype) -> None:
    x = (torch.randn(1, 2, 7, 16, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    x[0, 0, 3, 0] = 1e6  # saturates
    assert torch.equal(_around(CacheFormat(dtype=FP8, scale=0.013), x), round_fp8(x, 0.013))


def test_a_token_of_next_to_nothing_is_zero_or_kept_and_never_nan() -> None:
    x = torch.tensor([1e-38, 1e-41, 0.0]).view(1, 1, 3, 1).expand(1, 1, 3, 16)
    for dtype in (torch.int8, FP8):
        found = _around(CacheFormat(dtype=dtype), x)
        assert torch.isfinite(found).all()
        assert float(found.abs().max()) <= 1.1e-38


def test_what_is_stored_in_the_models_dtype_is_neither_copied_nor_changed() -> None:
    x = torch.randn(1, 2, 3, 16)
    plain = LayerFormat.choose(CacheDtype.AUTO, torch.float32, None).key
    stored = plain.encode(x)
    assert stored.codes.data_ptr() == x.data_ptr() == plain.decode(stored, torch.float32).data_ptr()
    as_bf16 = LayerFormat.choose(CacheDtype.BF16, torch.float32, CacheScales(key=1.0, value=1.0)).value
    assert torch.equal(_around(as_bf16, x), x.bfloat16().float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_with_scales_has_codes_in_its_cache_and_computes_what_it_does_without(dtype: torch.dtype) -> None:
    model, ids = random_model(text_config(), dtype=dtype), random_ids(2, 21)
    for layer in range(4):
        model.use_cache_scales(layer, CacheScales(key=0.02, value=0.013))
    expected = model(ids)
    cache = model.new_cache(2, 21)
    assert torch.equal(model(ids, cache=cache), expected)  # the same numbers in the same order
    num_codes = 2 * (3 * 8 + 21) * 2 * 16 * 2  # rows, columns, heads, dimension, keys and values
    assert (
        cache.num_bytes == num_codes == cache_bytes(model.config.text, 21, batch_size=2, dtype=dtype, has_scales=True)
    )
    without = model.new_cache(2, 21, "bf16")
    assert without.num_bytes == 2 * num_codes
    assert not torch.equal(model(ids, cache=without), expected)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_chunks_and_single_tokens_see_the_same_codes(kind: str) -> None:
    model, ids = random_model(text_config()), random_ids(2, 40)
    cache = model.new_cache(2, dtype=kind)
    expected = model(ids, cache=cache)
    pieces = model.new_cache(2, dtype=kind)
    found = torch.cat([model(part, cache=pieces) for part in ids.split([13, 1, 1, 9, 16], dim=1)], dim=1)
    # The last bit of float32 can turn a number at the edge between two codes, which is then off by a step, 2^-3 of it
    # at most; few are, and attention averages them. Without a cache of codes the difference is as large everywhere.
    exact = model(ids)
    assert float((found - expected).norm()) < 0.2 * float((exact - expected).norm())
    assert float((exact - expected).norm()) < 0.2 * float(exact.norm())


@pytest.mark.parametrize("kind", ["fp8", "int8", "bf16"])
def test_bytes_are_as_predicted(kind: str) -> None:
    model = random_model(text_config(head_dim=64))
    cache = model.new_cache(2, 40, kind)
    model.prefill(random_ids(2, 40), cache=cache, chunk_size=8)
    predicted = cache_bytes(model.config.text, 40, batch_size=2, dtype=torch.float32, kind=CacheDtype(kind))
    assert cache.num_bytes == predicted
    per_head = {"fp8": 64 + 2, "int8": 64 + 2, "bf16": 128}[kind]
    assert predicted == 2 * 2 * 2 * (3 * 8 + 40) * per_head


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="'int4' is unknown; use one of auto, bf16, fp8, int8"):
        random_model(text_config()).new_cache(1, dtype="int4")
