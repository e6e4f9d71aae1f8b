"""The compiled kernels against float64, in all variants that this machine can run."""

import platform
from pathlib import Path

import pytest
import torch
from ops.native_variants import CASES, VARIANTS, Case, activations, exact_fp8_activations, random, variant
from torch import Tensor

from llama4_quant.ops import native, reference

ROWS = (1, 2, 3, 5, 16, 17, 33, 70)
# Outputs and inputs that are no multiple of a vector, tile, block, panel or word; 640 and 1152 take several panels.
SHAPES = ((5, 96), (37, 128), (130, 160), (19, 320), (150, 640), (33, 768), (17, 1152))


@pytest.fixture(params=VARIANTS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a variant that then runs; bf16 with many rows too, where torch's product is used otherwise."""
    library = variant(request.param)
    monkeypatch.setattr(native, "_library", lambda: library)
    for limit in ("DENSE_ROWS", "DENSE_ROWS_IN_TILES"):
        monkeypatch.setattr(native, limit, 10**9)
    return library.instructions


def shapes(case: Case) -> list[tuple[int, int]]:
    found = [shape for shape in SHAPES if not case.group_size or shape[1] % case.group_size == 0]
    if not case.group_size:
        found += [(5, 20), (130, 1028)]
    if case.operator in {"int8", "dense"}:
        found.append((1, 5))
    return found


def assert_near(
    actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, fixed_size: int | None = None
) -> None:
    """`x` and `weight` in float64 are what is multiplied.

    Sums: K products and some scales in float32, each rounding at most 2^-24 of the sum of magnitudes. Fixed point: see
    `fixed_point_error`. Then one rounding to bf16.
    """
    expected = x @ weight.T + (0 if bias is None else bias.double())
    magnitude = x.abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
    before_rounding = (x.shape[-1] + 10) * 2.0**-24 * magnitude
    if fixed_size is not None:
        before_rounding += fixed_point_error(x, fixed_size) @ weight.abs().T
    bound = before_rounding + 2.0**-8 * (expected.abs() + before_rounding)
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"error of {(error / bound).max()} of the bound at {int((error / bound).argmax())}"


def fixed_point_error(x: Tensor, size: int) -> Tensor:
    """What is lost of each input: the largest of `size` inputs is 32600 steps, and others are off by half a step."""
    parts = [part.abs().amax(dim=-1, keepdim=True).expand_as(part) for part in x.split(size, dim=-1)]
    return torch.cat(parts, dim=-1) * 0.5 / 32600


@pytest.mark.parametrize("name", CASES)
def test_products(name: str, instructions: str) -> None:
    case = CASES[name]
    for num_outputs, num_inputs in shapes(case):
        weight, bias = case.weight(num_outputs, num_inputs), random(num_outputs, seed=7)
        for num_rows in ROWS:
            x = activations(num_rows, num_inputs)
            operands = case.operands(x, weight, rounded=case.is_in_tiles(num_rows, instructions))
            fixed_size = case.fixed_size if case.is_fixed(num_rows, instructions) else None
            assert_near(case.linear(x, weight, bias), *operands, bias, fixed_size=fixed_size)
            assert_near(case.linear(x, weight), *operands, fixed_size=fixed_size)


@pytest.mark.parametrize("name", CASES)
def test_near_the_reference(name: str, instructions: str) -> None:
    """Two operands and the result may be rounded to bf16 there and not here: by at most 2^-8 each."""
    case = CASES[name]
    weight, x = case.weight(40, 768), random(9, 768, seed=1)
    expected = getattr(reference, f"linear_{case.operator}")(x, *weight).double()
    exact_x, exact_weight = case.operands(x, weight, rounded=False)
    bound = 2 * 2.0**-8 * (exact_x.abs() @ exact_weight.abs().T) * 1.01 + 2 * 2.0**-8 * expected.abs()
    for num_rows in (1, 9):
        assert ((case.linear(x[:num_rows], weight).double() - expected[:num_rows]).abs() <= bound[:num_rows]).all()


@pytest.mark.parametrize("rows_per_expert", [[2, 0, 3, 20], [0, 0, 0, 6], [1, 1, 1, 1], [40, 0, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("name", CASES)
def test_grouped_equals_one_linear_per_expert(name: str, rows_per_expert: list[int], instructions: str) -> None:
    case = CASES[name]
    stack = [case.weight(37, 768, seed) for seed in range(4)]
    x = random(sum(rows_per_expert), 768, seed=9)
    stacked = tuple(torch.stack(parts) for parts in zip(*stack, strict=True))
    actual = case.grouped(x, torch.tensor(rows_per_expert), stacked)
    parts = x.split(rows_per_expert)
    assert torch.equal(actual, torch.cat([case.linear(part, w) for part, w in zip(parts, stack, strict=True)]))


def test_experts_without_rows_are_not_touched(instructions: str) -> None:
    weight = torch.full((3, 40, 64), torch.nan, dtype=torch.bfloat16)
    weight[1] = random(40, 64)
    for num_rows in (1, 20):
        x = random(num_rows, 64, seed=1)
        y = native.grouped_dense(x, torch.tensor([0, num_rows, 0]), weight)
        assert torch.equal(y, native.linear_dense(x, weight[1]))
        assert y.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_threads_do_not_change_a_bit(name: str, instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "THREADED_PRODUCTS", 0)
    case = CASES[name]
    weight = case.weight(150, 768)
    before = torch.get_num_threads()
    for num_rows in (1, 2, 40):
        x = random(num_rows, 768, seed=1)
        results = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(case.linear(x, weight))
        torch.set_num_threads(before)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", CASES)
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str, instructions: str) -> None:
    """Among few rows, and among many; from one to the other the order of the sums changes."""
    case = CASES[name]
    weight, x = case.weight(50, 768), random(600, 768, seed=1)
    assert torch.equal(case.linear(x[:2], weight)[1:], case.linear(x[1:2], weight))
    many = case.linear(x, weight)
    for first, last in ((0, 33), (5, 11), (90, 600), (511, 530)):
        assert torch.equal(many[first:last], case.linear(x[first:last], weight))


@pytest.mark.parametrize("num_rows", [1, 20])
def test_every_fp8_code(num_rows: int, instructions: str) -> None:
    """Row n has code n: normal, subnormal, both zeros and NaN; the others of the row are zero."""
    codes = torch.zeros(256, 128, dtype=torch.uint8)
    codes[:, 3] = torch.arange(256)
    weight = codes.view(torch.float8_e4m3fn)
    x = torch.zeros(num_rows, 128, dtype=torch.bfloat16)
    x[:, 3] = 448.0  # its scale is 1
    for scale in (torch.ones(256, 1), torch.ones(2, 1)):  # by row, in blocks
        y = native.linear_fp8(x, weight, scale)
        expected = (weight[:, 3].float() * 448).to(torch.bfloat16).expand(num_rows, -1)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert y.isnan().sum() == 2 * num_rows


@pytest.mark.parametrize("num_rows", [1, 2, 512])
def test_activations_get_the_codes_of_the_reference(num_rows: int, instructions: str) -> None:
    """With an identity as the weight, y is x rounded to FP8: for every finite bf16 number, and rows of every size."""
    every = torch.arange(0, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    identity = torch.eye(128).to(torch.float8_e4m3fn)
    scattered = every.view(128, -1).T.contiguous()  # numbers of all sizes in a row
    sizes = torch.logspace(-30, 30, 301).to(torch.bfloat16).unsqueeze(-1)
    rows = torch.cat([every.view(-1, 128), -every.view(-1, 128), scattered, random(301, 128) * sizes])
    expected = reference.round_activations_fp8(rows)
    step = 37 if num_rows < 16 else num_rows
    for first in range(0, len(rows), step):
        y = native.linear_fp8(rows[first : first + num_rows], identity, torch.ones(128, 1))
        wanted = expected[first : first + num_rows]
        # Vectors of AVX-512 round to bf16 with subnormal results made zero.
        assert torch.equal(torch.where(y == 0, y, wanted), y)
        assert torch.equal(torch.where(wanted.abs() < 2.0**-126, y, wanted), y)


def test_exact_activations_are_those_of_the_reference() -> None:
    x = random(6, 256)
    rounded = exact_fp8_activations(x, 128).to(torch.bfloat16)
    assert torch.equal(rounded, reference.round_activations_fp8(x, group_size=128))


@pytest.mark.parametrize("name", CASES)
def test_zeros_and_what_is_not_finite(name: str, instructions: str) -> None:
    """Zeros give zeros; NaN and infinity in x make their row NaN or infinite, and no other."""
    case = CASES[name]
    weight = case.weight(40, 768)
    for num_rows in (2, 20):
        x = torch.zeros(num_rows, 768, dtype=torch.bfloat16)
        assert torch.equal(case.linear(x, weight), torch.zeros(num_rows, 40, dtype=torch.bfloat16))
        for bad in (torch.nan, torch.inf):
            x = random(num_rows, 768, seed=2)
            clean = case.linear(x, weight)
            x[0, 17] = bad
            y = case.linear(x, weight)
            assert not y[0].isfinite().any()
            assert torch.equal(y[1:], clean[1:])


def test_variants_are_what_they_say() -> None:
    if platform.machine() != "x86_64":
        pytest.skip("not such a machine")
    assert "portable" in variant("x86-64-v3").instructions
    assert "AMX" not in variant("native no-amx-tile no-amx-bf16").instructions
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    is_fast = {"avx512bw", "avx512_vnni", "avx512_bf16", "avx512vbmi"} <= flags
    assert variant("native").instructions.startswith("AVX-512") == is_fast
    assert variant("native").instructions.endswith("AMX") == (is_fast and "amx_bf16" in flags)
