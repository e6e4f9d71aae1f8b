import itertools
import math

import pytest
import torch

from llama4_quant.quantizers import fp8, int4
from llama4_quant.scheme import Strategy


def every_bf16() -> torch.Tensor:
    """All finite bf16 numbers, as float32."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return values[torch.isfinite(values)]


def between_fp8_numbers() -> torch.Tensor:
    """Every e4m3fn number, every midpoint of two neighbours, and the float32 numbers next to each."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = codes[torch.isfinite(codes)].unique()
    points = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([463.9, 464.0, 465.0, 1e30])])
    points = torch.cat([points, -points])
    infinity = torch.tensor(math.inf)
    return torch.cat([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])


@pytest.mark.parametrize("values", [every_bf16(), between_fp8_numbers()], ids=["every bf16", "midpoints"])
def test_fp8_rounding_equals_the_cast(values: torch.Tensor) -> None:
    saturated = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(fp8.nearest_(values.clone()), saturated.float())
    assert torch.equal(fp8.encode(values.clone()).view(torch.uint8), saturated.view(torch.uint8))


def test_fp8_keeps_the_sign_of_zero() -> None:
    encoded = fp8.encode(torch.tensor([0.0, -0.0, -1e-9]))
    assert encoded.view(torch.uint8).tolist() == [0x00, 0x80, 0x80]


def test_int4_rounds_ties_to_even_and_clamps() -> None:
    ratio = torch.tensor([-1e30, -8.6, -8.5, -7.5, -0.5, -0.0, 0.5, 1.5, 2.5, 7.4, 7.5, 1e30])
    codes = [-8, -8, -8, -8, 0, 0, 0, 2, 2, 7, 7, 7]
    assert int4.encode(ratio.clone()).tolist() == codes
    assert int4.nearest_(ratio.clone()).tolist() == codes


@pytest.mark.parametrize(("grid", "strategy"), [(int4.GRID, Strategy.GROUP), (int4.GRID, Strategy.CHANNEL)])
def test_int4_factors_are_distinct_and_leave_absmax_to_the_search(grid: int4.CodeGrid, strategy: Strategy) -> None:
    factors = grid.factors[strategy]
    assert len(set(factors)) == len(factors) <= 23
    assert 1.0 not in factors


def test_fp8_factors_cover_one_binade() -> None:
    factors = (1.0, *fp8.GRID.factors[Strategy.CHANNEL], 2.0)
    steps = [high / low for low, high in itertools.pairwise(factors)]
    assert steps == pytest.approx([2 ** (1 / 16)] * 16, rel=1e-12)
    assert fp8.GRID.factors[Strategy.BLOCK] == fp8.GRID.factors[Strategy.CHANNEL]
