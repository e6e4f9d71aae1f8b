"""The compiled kernels against the plain path, byte for byte."""

import math
import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from quantizers.quantizer_cases import SCHEMES, heavy_tailed, scheme_names, weights
from torch import Tensor

from llama4_quant.errors import QuantizationError, SchemeError
from llama4_quant.quantizers.backend import Backend, BackendName, choose_backend
from llama4_quant.quantizers.packed import PackedWeight, code_bytes, quantize_plain
from llama4_quant.scheme import WeightScheme

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP16_MAX = 65504.0


@pytest.fixture(scope="module")
def compiled() -> Backend:
    backend = choose_backend(BackendName.AUTO)
    if backend.name is BackendName.PLAIN:
        pytest.skip(f"no compiled kernels: {backend.detail}")
    return backend


def layouts(weight: Tensor) -> dict[str, Tensor]:
    """The same weight in every memory layout that the kernels treat differently."""
    num_rows, num_columns = weight.shape
    wide = torch.full((num_rows + 3, num_columns + 5), math.nan, dtype=weight.dtype)
    sparse = torch.full((2 * num_rows, 3 * num_columns), math.nan, dtype=weight.dtype)
    deep = torch.full((num_columns + 2, num_rows + 7), math.nan, dtype=weight.dtype)
    found = {
        "contiguous": weight.contiguous(),
        "rows apart": wide[1 : 1 + num_rows, 2 : 2 + num_columns],
        "transposed": weight.T.contiguous().T,
        "slice of transposed": deep[1 : 1 + num_columns, 3 : 3 + num_rows].T,
        "both strided": sparse[::2, ::3],
    }
    for name in ("rows apart", "slice of transposed", "both strided"):
        found[name].copy_(weight)
    return found


def assert_same(found: PackedWeight, expected: PackedWeight) -> None:
    assert found.shape == expected.shape
    assert found.codes.dtype is expected.codes.dtype
    assert found.scale.dtype is expected.scale.dtype
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert (found.error.scale_min, found.error.scale_max) == (expected.error.scale_min, expected.error.scale_max)
    # The kernels add 16 squares in float32 before they go on in float64: 16 additions, the rounding of the difference
    # (counted twice, as it is squared) and of the square make at most 19 * 2^-24 < 2^-19 of a sum of positive terms.
    assert found.error.squared_weight == pytest.approx(expected.error.squared_weight, rel=2.0**-19)
    if math.isfinite(expected.error.squared_error):  # inf where code * scale exceeds float32, see quantize_weight
        assert found.error.squared_error == pytest.approx(expected.error.squared_error, rel=2.0**-19)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=scheme_names, dtype=st.sampled_from(DTYPES))
def test_bytes_equal_the_plain_path(compiled: Backend, data: st.DataObject, name: str, dtype: torch.dtype) -> None:
    weight = data.draw(weights(SCHEMES[name], torch.float32)).clamp(-FP16_MAX, FP16_MAX).to(dtype)
    expected = quantize_plain(weight, SCHEMES[name])
    for view in layouts(weight).values():
        assert_same(compiled.quantize(view, SCHEMES[name]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_weights_of_several_panels(compiled: Backend, name: str, dtype: torch.dtype) -> None:
    """More rows and columns than a panel has, and neither a multiple of one."""
    weight = heavy_tailed((131, 1152), 7, dtype)
    expected = quantize_plain(weight, SCHEMES[name])
    for view in layouts(weight).values():
        assert_same(compiled.quantize(view, SCHEMES[name]), expected)


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_every_finite_bf16_number(compiled: Backend, name: str) -> None:
    """Ties, -0, subnormals, and scales at both ends of their range; one row for each exponent, then shuffled."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[torch.isfinite(numbers.float())].view(-1, 128)
    assert_same(compiled.quantize(numbers, SCHEMES[name]), quantize_plain(numbers, SCHEMES[name]))
    order = torch.randperm(numbers.numel(), generator=torch.Generator().manual_seed(1))
    mixed = numbers.reshape(-1)[order].view(-1, 128)
    assert_same(compiled.quantize(mixed, SCHEMES[name]), quantize_plain(mixed, SCHEMES[name]))


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_ratios_on_midpoints_between_codes(compiled: Backend, name: str) -> None:
    """Multiples of half a step, where a product with the reciprocal may fall on either side."""
    steps = torch.arange(-30, 30).repeat(64)[: 15 * 256].view(15, 256) / 4
    scales = (torch.arange(15)[:, None] * 0.07 + 0.9).to(torch.bfloat16).float()
    for dtype in DTYPES:
        weight = (steps * scales).to(dtype)
        weight[:, ::32] = (7.5 * scales).to(dtype)
        assert_same(compiled.quantize(weight, SCHEMES[name]), quantize_plain(weight, SCHEMES[name]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", [name for name in sorted(SCHEMES) if name.endswith("absmax")])
def test_what_is_not_finite_is_refused_in_the_same_words(
    compiled: Backend, name: str, dtype: torch.dtype, value: float
) -> None:
    for transposed in (False, True):
        weight = heavy_tailed((140, 256), 3, dtype)
        weight[137, 200] = value
        weight[138, 3] = math.nan
        view = weight.T.contiguous().T if transposed else weight
        with pytest.raises(QuantizationError) as expected:
            quantize_plain(view, SCHEMES[name])
        with pytest.raises(QuantizationError) as found:
            compiled.quantize(view, SCHEMES[name])
        assert str(found.value) == str(expected.value)
        assert "row 137, column 200" in str(found.value)


def test_other_shapes_and_dtypes_are_refused(compiled: Backend) -> None:
    scheme = SCHEMES["W4A16-128-mse"]
    with pytest.raises(QuantizationError, match=r"shape \[out, in\]"):
        compiled.quantize(torch.zeros(3), scheme)
    with pytest.raises(QuantizationError, match="float64"):
        compiled.quantize(torch.zeros(2, 128, dtype=torch.float64), scheme)
    with pytest.raises(SchemeError, match="not divisible"):
        compiled.quantize(torch.zeros(2, 100), scheme)


@pytest.mark.parametrize("name", ["W4A16-128-mse", "FP8_DYNAMIC-None-absmax", "FP8_BLOCK-None-mse"])
def test_many_threads_give_what_one_gives(compiled: Backend, name: str) -> None:
    scheme = SCHEMES[name]
    cases = [heavy_tailed((256, 640), seed).T.contiguous().T for seed in range(8)]
    alone = [compiled.quantize(weight, scheme) for weight in cases]
    together = _in_threads(compiled, cases, scheme)
    for found, expected in zip(together, alone, strict=True):
        assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(found.scale, expected.scale)
        assert found.error == expected.error


def _in_threads(backend: Backend, cases: list[Tensor], scheme: WeightScheme) -> list[PackedWeight]:
    results: dict[int, PackedWeight] = {}

    def work(index: int) -> None:
        results[index] = backend.quantize(cases[index], scheme)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[index] for index in range(len(cases))]


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_error_sums_do_not_depend_on_how_rows_are_split(compiled: Backend, name: str) -> None:
    """Exactly, but for the last addition over parts."""
    weight = heavy_tailed((256, 384), 4)
    whole = compiled.quantize(weight, SCHEMES[name]).error
    first, second = (compiled.quantize(rows, SCHEMES[name]).error for rows in weight.split(128))
    merged = first.merge(second)
    assert merged.squared_error == pytest.approx(whole.squared_error, rel=2.0**-51)
    assert merged.squared_weight == pytest.approx(whole.squared_weight, rel=2.0**-51)


def test_unpacking_gives_the_plain_codes(compiled: Backend) -> None:
    weight = heavy_tailed((9, 21), 5)
    scheme = SCHEMES["W4A16--1-mse"]
    assert torch.equal(compiled.quantize(weight, scheme).unpack().codes, quantize_plain(weight, scheme).unpack().codes)


@pytest.mark.parametrize("name", ["W4A16-128-absmax", "W4A16--1-absmax", "FP8_DYNAMIC-None-absmax"])
def test_codes_are_written_to_memory_that_is_given(compiled: Backend, name: str) -> None:
    scheme = SCHEMES[name]
    small, large = heavy_tailed((5, 128), 1), heavy_tailed((40, 384), 2)
    out = torch.empty(code_bytes((40, 384), scheme), dtype=torch.uint8)
    for weight in (large, small):
        found = compiled.quantize(weight, scheme, out)
        assert found.codes.data_ptr() == out.data_ptr()
        assert_same(found, quantize_plain(weight, scheme))
    with pytest.raises(AssertionError):
        compiled.quantize(large, scheme, out[:-1])
