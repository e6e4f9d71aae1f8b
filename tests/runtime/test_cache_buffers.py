"""Keys and values of one byte: what comes out is as near as the codes allow, and the cache is as small as was said."""

import pytest
import torch
from runtime.tiny_model import random_ids, random_model, text_config

from llama4_quant.errors import UsageError
from llama4_quant.ops.reference import round_fp8
from llama4_quant.runtime.cache import CacheScales, cache_bytes
from llama4_quant.runtime.cache_buffers import CacheDtype, CodedBuffer

CPU = torch.device("cpu")


def filled(kind: CacheDtype, x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """What a buffer gives of columns that were put in two parts, after it has moved."""
    buffer = CodedBuffer((*x.shape[:2], 9, x.shape[3]), x.dtype, CPU, kind=kind, scale=scale)
    buffer.put(0, x[:, :, :3])
    buffer.put(3, x[:, :, 3:])
    buffer.move(slice(2, 7), 20)
    return buffer.get(5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_with_a_scale_for_each_token_and_head(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 3, 7, 16) * torch.logspace(-3, 3, 7).view(1, 1, -1, 1)).to(dtype)
    x[0, 0, 4] = 0
    largest = x[:, :, 2:].float().abs().amax(dim=-1, keepdim=True)
    unit = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-20  # of the result
    int8 = filled(CacheDtype.INT8, x)
    assert bool(((int8.float() - x[:, :, 2:].float()).abs() <= largest * (0.5 / 127 + unit) * 1.001).all())
    fp8 = filled(CacheDtype.FP8, x)
    # Half a step of three mantissa bits; under 2^-6 of 448 / largest steps are even, 2^-10 of them.
    bound = x[:, :, 2:].float().abs() * (2.0**-4 + unit) + largest / 448 * 2.0**-10
    assert bool(((fp8.float() - x[:, :, 2:].float()).abs() <= bound * 1.001).all())
    assert not fp8[0, 0, 2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_the_checkpoint_gives_what_rounding_with_it_gives(dtype: torch.dtype) -> None:
    x = (torch.randn(1, 2, 7, 16) * 3).to(dtype)
    x[0, 0, 3, 0] = 1e6  # saturates
    assert torch.equal(filled(CacheDtype.FP8, x, scale=0.013), round_fp8(x, 0.013)[:, :, 2:])


def test_a_model_with_scales_computes_the_same_with_stored_codes() -> None:
    model, ids = random_model(text_config(), dtype=torch.bfloat16), random_ids(2, 21)
    for layer in range(4):
        model.use_cache_scales(layer, CacheScales(key=0.02, value=0.013))
    found = []
    for dtype in ("auto", "fp8"):
        cache = model.new_cache(2, dtype=dtype)
        found.append(torch.cat([model(part, cache=cache) for part in ids.split([10, 1, 10], dim=1)], dim=1))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_logits_stay_near_and_bytes_are_as_predicted(dtype: str) -> None:
    model, ids = random_model(text_config(head_dim=64), dtype=torch.bfloat16), random_ids(2, 40)
    exact = model.prefill(ids, cache=model.new_cache(2), chunk_size=8).float()
    cache = model.new_cache(2, 40, dtype)
    found = model.prefill(ids, cache=cache, chunk_size=8).float()
    # Not a bound of arithmetic: an error of the codes' size, not of the logits'.
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.2
    kind = CacheDtype.parse(dtype)
    assert cache.num_bytes == cache_bytes(model.config.text, 40, batch_size=2, kind=kind, prefill_chunk_size=8)
    assert cache.num_bytes < 0.55 * cache_bytes(model.config.text, 40, batch_size=2, prefill_chunk_size=8)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="'int4' is unknown; use one of auto, fp8, int8"):
        random_model(text_config()).new_cache(1, dtype="int4")
