"""The solver against plain float64: formulas of the papers, column by column, with explicit inverses."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama4_quant.calibration import solve as solve_module
from llama4_quant.calibration.gptq import BLOCK, Scales, coordinate_descent, factor, gptq, refit_scales
from llama4_quant.calibration.hessian import ENOUGH_ROWS, Moments, corrected
from llama4_quant.calibration.scales import search_scales, solver_scales, stored_scales
from llama4_quant.calibration.settings import SolverSettings
from llama4_quant.calibration.solve import FEW_ROWS, Solver
from llama4_quant.errors import QuantizationError
from llama4_quant.quantizers.grid import CodeGrid
from llama4_quant.quantizers.lanes import spread_scale
from llama4_quant.quantizers.quantize import dequantize_weight, grid_of, quantize_weight
from llama4_quant.scheme import Strategy, WeightScheme, WeightType, preset

SCHEMES = [
    preset("W4A16", group_size=32).weights,
    preset("W4A16", group_size=64).weights,
    preset("W4A16", group_size=128).weights,
    preset("W4A16", group_size=-1).weights,
    preset("FP8_DYNAMIC").weights,
    preset("FP8_BLOCK").weights,
]
BEST = SolverSettings(correct=True, num_sweeps=3, refit_scales=True)
by_label = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)


def width_of(scheme: WeightScheme, wanted: int) -> int:
    """The nearest number of inputs that the scheme can store."""
    size = 128 if scheme.strategy is Strategy.BLOCK else scheme.group_size or 1
    return -(-wanted // size) * size


def draw(num_outputs: int, num_inputs: int, num_rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [N, K] and activations [R, K] whose inputs differ in size and hang together."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5
    mix = torch.randn(num_inputs, num_inputs, generator=generator) * num_inputs**-0.5
    sizes = torch.exp(torch.randn(num_inputs, generator=generator))
    return weight, torch.randn(num_rows, num_inputs, generator=generator) @ (torch.eye(num_inputs) + mix) * sizes


def codes_of(scheme: WeightScheme) -> np.ndarray:
    """All codes of the format, as numbers."""
    if scheme.type is WeightType.INT4:
        return np.arange(-8.0, 8.0)
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    return np.unique(values[values.isfinite()].numpy())


def damped(gram: np.ndarray, damp_percent: float) -> np.ndarray:
    """H with part of its mean diagonal added, over that mean; a dead input has the mean itself."""
    scaled = gram / gram.diagonal().mean()
    dead = scaled.diagonal() <= 0
    return scaled + np.diag(dead.astype(float)) + damp_percent * np.eye(len(gram))


def reference_gptq(
    weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, codes: np.ndarray, damp_percent: float
) -> tuple[np.ndarray, np.ndarray]:
    """GPTQ (arXiv 2210.17323, eq. 2 and 3) with the inverse of what is left, made anew at each column.

    Returns codes [N, K], and how far each rounding was from falling to the neighbour, in codes.
    """
    hessian = damped(gram, damp_percent)
    order = sorted(range(len(gram)), key=lambda column: (-gram[column, column], column))
    left, found = weight.copy(), np.zeros_like(weight)
    margin = np.full_like(weight, np.inf)
    for place, column in enumerate(order):
        free = order[place:]
        inverse = np.linalg.inv(hessian[np.ix_(free, free)])
        ratio = left[:, column] / scale[:, column]
        distance = np.abs(ratio[:, None] - codes)
        nearest = distance.argmin(axis=1)
        found[:, column] = codes[nearest]
        two = np.sort(distance, axis=1)
        margin[:, column] = (two[:, 1] - two[:, 0]) / np.maximum(1, np.abs(ratio))
        error = left[:, column] - found[:, column] * scale[:, column]
        left[:, free] -= np.outer(error / inverse[0, 0], inverse[0])
    return found, margin


def loss(weight: np.ndarray, stored: np.ndarray | float, gram: np.ndarray) -> np.ndarray:
    """The squared error of each output on rows with this Gram matrix."""
    difference = weight - stored
    return np.einsum("nk,kl,nl->n", difference, gram, difference)


def spread(scale: Tensor, weight: Tensor, scheme: WeightScheme) -> Tensor:
    """A scale for each weight."""
    return spread_scale(scale, (weight.shape[0], weight.shape[1]), scheme).expand_as(weight)


def prepared(scheme: WeightScheme, weight: Tensor, gram: Tensor) -> tuple[Scales, CodeGrid, Tensor]:
    scale = search_scales(weight, scheme, gram.diagonal())
    shape = (weight.shape[0], weight.shape[1])
    return solver_scales(scale, shape, scheme), grid_of(scheme), spread(scale, weight, scheme)


@by_label
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 64), (5, 96), (130, BLOCK + 33)])
@pytest.mark.parametrize("kind", ["full", "dead", "deficient"])
def test_gptq_is_the_papers(scheme: WeightScheme, num_outputs: int, num_inputs: int, kind: str) -> None:
    weight, x = draw(num_outputs, width_of(scheme, num_inputs), 400 if kind != "deficient" else 20)
    if kind == "dead":
        x[:, ::7] = 0
    gram = x.T @ x
    scales, grid, scale_NK = prepared(scheme, weight, gram)
    factored = factor(gram.clone(), 0.01)
    assert factored.damp_percent == 0.01
    codes_KN, cost_N = gptq(weight.T.contiguous(), factored, scales, grid)
    found = codes_KN.T.double().numpy()
    expected, margin = reference_gptq(
        weight.double().numpy(), gram.double().numpy(), scale_NK.double().numpy(), codes_of(scheme), 0.01
    )
    # A code may differ where float32 decides a near tie otherwise, and what follows in that output then differs too.
    # What float32 does to a step is its 2^-24 times the condition of H: up to K / damp_percent, some 10^4.
    for output in np.flatnonzero((found != expected).any(axis=1)):
        order = factored.order.numpy()
        first = order[np.flatnonzero(found[output, order] != expected[output, order])[0]]
        assert margin[output, first] < 1e-3, (output, first, margin[output, first])
    assert (found != expected).any(axis=1).mean() <= 0.25
    stored, best = found * scale_NK.numpy(), expected * scale_NK.numpy()
    exact, hessian = weight.double().numpy(), damped(gram.double().numpy(), 0.01)
    costs, best_total = loss(exact, stored, hessian), loss(exact, best, hessian).sum()
    assert costs.sum() == pytest.approx(best_total, rel=0.02)
    # What gptq says its codes cost is that, to K * 2^-24 of a sum of terms that cancel to a hundredth at worst.
    assert cost_N.numpy() == pytest.approx(costs, rel=1e-3)


def test_inputs_that_are_alike_go_by_position() -> None:
    assert factor(torch.eye(200), 0.01).order.tolist() == list(range(200))


def test_damping_rises_until_the_matrix_can_be_factored() -> None:
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    barely = factor(x.T @ x, 1e-9)
    assert 1e-9 < barely.damp_percent <= 1
    # Of a condition as large as float32 can just see, a tenth of the largest element is what is left of accuracy.
    # A factor in float32 is that of a matrix which differs by K * 2^-24 of the largest element at most.
    product = barely.root.double() @ barely.root.double().T
    assert torch.allclose(product, barely.gram.double(), rtol=0, atol=500 * 2**-24 * float(barely.gram.max()))


def test_what_cannot_be_factored_is_rounded_by_its_diagonal() -> None:
    """A matrix that is no Gram matrix: far from positive definite."""
    gram = torch.full((8, 8), 10.0) - 9 * torch.eye(8)
    factored = factor(gram, 0.01)
    assert factored.damp_percent == 1
    assert torch.equal(factored.gram, torch.diag(factored.gram.diagonal()))
    weight = torch.randn(4, 8)
    scheme = SCHEMES[3]
    scales, grid, scale_NK = prepared(scheme, weight, gram)
    codes = gptq(weight.T.contiguous(), factored, scales, grid)[0].T
    assert torch.equal(codes, grid.nearest_(weight / scale_NK))


@by_label
def test_coordinate_descent_is_the_closed_form_and_never_costs(scheme: WeightScheme) -> None:
    weight, x = draw(37, width_of(scheme, BLOCK + 40), 300)
    gram = x.T @ x
    scales, grid, scale_NK = prepared(scheme, weight, gram)
    factored = factor(gram.clone(), 0.01)
    hessian = damped(gram.double().numpy(), 0.01)
    exact, scale = weight.double().numpy(), scale_NK.double().numpy()
    codes = grid.nearest_(weight / scale_NK)
    before = loss(exact, codes.double().numpy() * scale, hessian)
    for _ in range(4):
        improved = coordinate_descent(weight.T.contiguous(), codes.T.contiguous(), factored, scales, grid).T
        after = loss(exact, improved.double().numpy() * scale, hessian)
        assert (after <= before * (1 + 1e-5)).all()
        expected = visit_each(exact, codes.double().numpy(), hessian, scale, codes_of(scheme), factored.order.tolist())
        assert (improved.double().numpy() != expected).mean() < 0.01  # near ties, and what follows from them
        assert loss(exact, expected * scale, hessian).sum() == pytest.approx(after.sum(), rel=5e-3)
        codes, before = improved, after
    assert before.sum() < 0.7 * loss(exact, grid.nearest_(weight / scale_NK).double().numpy() * scale, hessian).sum()


def visit_each(
    weight: np.ndarray, codes: np.ndarray, hessian: np.ndarray, scale: np.ndarray, grid: np.ndarray, order: list[int]
) -> np.ndarray:
    """Every column's best code with all others as they are, tried one by one."""
    codes = codes.copy()
    for column in order:
        error = weight - codes * scale
        others = error @ hessian[:, column] - error[:, column] * hessian[column, column]
        trial = weight[:, column, None] - grid * scale[:, column, None]
        cost = hessian[column, column] * trial**2 + 2 * others[:, None] * trial
        codes[:, column] = grid[cost.argmin(axis=1)]
    return codes


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.strategy is not Strategy.BLOCK], ids=lambda s: s.label)
def test_refitted_scales_are_the_least_squares_solution(scheme: WeightScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = draw(9, width_of(scheme, 250), 600)
    gram = x.T @ x
    scales, grid, _ = prepared(scheme, weight, gram)
    factored = factor(gram.clone(), 0.01)
    codes, _ = gptq(weight.T.contiguous(), factored, scales, grid)
    found = refit_scales(weight.T.contiguous(), codes, factored, scales).double().numpy()
    root = np.linalg.cholesky(damped(gram.double().numpy(), 0.01)).T  # rows whose Gram matrix this is
    num_groups = found.shape[0]
    for output in range(9):
        parts = np.split(root * codes[:, output].double().numpy(), num_groups, axis=1)
        design = np.stack([part.sum(axis=1) for part in parts], axis=1)
        expected = np.linalg.lstsq(design, root @ weight[output].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[:, output], expected, rtol=1e-3)
    monkeypatch.setattr("llama4_quant.calibration.gptq._SYSTEM_ELEMENTS", num_groups**2 * 2)
    in_parts = refit_scales(weight.T.contiguous(), codes, factored, scales)
    np.testing.assert_allclose(in_parts.numpy(), found, rtol=1e-4)


def test_scales_without_codes_stay() -> None:
    scheme = SCHEMES[0]
    scales = Scales(values=torch.full((2, 3), 0.5), group_size=32)
    codes = torch.zeros(64, 3)
    codes[:32, 1] = 1
    factored = factor(torch.eye(64), 0.01)
    found = refit_scales(torch.full((64, 3), 0.6), codes, factored, scales)
    assert found[0, 1] == pytest.approx(0.6, rel=1e-4)
    found[0, 1] = 0.5
    assert torch.equal(found, scales.values), scheme


@pytest.mark.parametrize("num_rows", [40, 400])
@pytest.mark.parametrize("with_output", [False, True])
def test_the_corrected_weight_solves_the_stacked_problem(num_rows: int, with_output: bool) -> None:
    """min |sqrt(w) (W* x^ - W x - r)|^2 + ridge mean(diag H) |W* - W|^2, as one least-squares problem."""
    num_inputs, num_outputs = 64, 11
    weight, x = draw(num_outputs, num_inputs, num_rows)
    generator = torch.Generator().manual_seed(5)
    quantized = x + 0.1 * torch.randn(x.shape, generator=generator) * x.std(dim=0)
    wanted = 0.1 * torch.randn(num_rows, num_outputs, generator=generator) if with_output else None
    counts = torch.rand(num_rows, generator=generator) + 0.1
    moments = Moments(num_inputs, num_outputs=num_outputs, drift=True, device=torch.device("cpu"))
    for part in (slice(0, 17), slice(17, num_rows)):
        moments.add(quantized[part], x[part], None if wanted is None else wanted[part], counts[part])
    assert moments.num_rows == num_rows
    found = corrected(weight, moments, 0.02).double().numpy()

    root = counts.double().sqrt().numpy()[:, None]
    rows = root * quantized.double().numpy()
    ridge = 0.02 * max(1.0, ENOUGH_ROWS * num_inputs / num_rows) * (rows**2).sum(axis=0).mean()
    target = root * (x.double() @ weight.double().T + (0 if wanted is None else wanted.double())).numpy()
    design = np.concatenate([rows, math.sqrt(ridge) * np.eye(num_inputs)])
    stacked = np.concatenate([target, math.sqrt(ridge) * weight.double().numpy().T])
    expected = np.linalg.lstsq(design, stacked, rcond=None)[0].T
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    assert np.abs(found - weight.numpy()).max() > 2e-3 * np.abs(expected).max()  # it did change


def test_a_weight_without_drift_is_left_alone() -> None:
    weight, x = draw(4, 32, 50)
    alone = Moments(32, device=torch.device("cpu")).add(x)
    assert corrected(weight, alone, 0.02) is weight
    same = Moments(32, num_outputs=4, drift=True, device=torch.device("cpu")).add(x, x, torch.zeros(50, 4))
    assert torch.allclose(corrected(weight, same, 0.02), weight, rtol=0, atol=1e-6)


@by_label
def test_scale_search_is_brute_force(scheme: WeightScheme) -> None:
    weight, x = draw(7 if scheme.strategy is not Strategy.BLOCK else 131, width_of(scheme, 128), 300)
    importance = (x**2).sum(dim=0)
    found = search_scales(weight, scheme, importance).double().numpy()
    grid, codes = grid_of(scheme), codes_of(scheme)
    tiles = [
        (row, column)
        for row in range(found.shape[0])
        for column in range(found.shape[1])
    ]  # fmt: skip
    height = 128 if scheme.strategy is Strategy.BLOCK else 1
    breadth = weight.shape[1] // found.shape[1]
    for row, column in tiles:
        part = weight[row * height : (row + 1) * height, column * breadth : (column + 1) * breadth].double().numpy()
        counts = importance[column * breadth : (column + 1) * breadth].double().numpy()
        base = np.abs(part).max() / grid.absmax_code
        candidates = torch.tensor([base, *(base * f for f in grid.factors[scheme.strategy])]).bfloat16().double()
        costs = [tile_cost(part, scale, counts, codes) for scale in candidates.tolist()]
        assert tile_cost(part, float(found[row, column]), counts, codes) <= min(costs) * (1 + 1e-5)
        assert found[row, column] in candidates.tolist()


def tile_cost(part: np.ndarray, scale: float, counts: np.ndarray, codes: np.ndarray) -> float:
    ratio = np.clip(part / scale, codes[0], codes[-1])
    above = np.clip(np.searchsorted(codes, ratio), 1, len(codes) - 1)
    low, high = codes[above - 1], codes[above]
    nearest = np.where(ratio - low < high - ratio, low, high)
    return float((counts * (part - nearest * scale) ** 2).sum())


@by_label
def test_scales_go_to_the_solver_and_back(scheme: WeightScheme) -> None:
    shape = (200, width_of(scheme, 128))
    scale = torch.rand(scheme.scale_shape(*shape))
    scales = solver_scales(scale, shape, scheme)
    assert torch.equal(stored_scales(scales, scheme), scale)
    everything = scales.columns(torch.arange(shape[1])).T
    assert torch.equal(everything, spread_scale(scale, shape, scheme).expand(shape))


def solved(weight: Tensor, x: Tensor, scheme: WeightScheme, chosen: SolverSettings = BEST) -> tuple[Tensor, Tensor]:
    """Stored weight and scales."""
    moments = Moments(weight.shape[1], drift=chosen.correct, device=torch.device("cpu")).add(x, x)
    unpacked = Solver.of(moments, chosen).solve(weight, scheme).packed.unpack()
    low, high = codes_of(scheme)[[0, -1]]
    assert unpacked.codes.float().min() >= low
    assert unpacked.codes.float().max() <= high
    assert (unpacked.scale > 0).all()
    assert torch.equal(unpacked.scale.bfloat16().float(), unpacked.scale.float())
    return dequantize_weight(unpacked, torch.float32), unpacked.scale


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    num_outputs=st.sampled_from([1, 2, 17, 130]),
    width=st.sampled_from([32, 100, 160, 200]),
    num_rows=st.sampled_from([1, 3, 50, 500]),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    zeros=st.sampled_from(["none", "weight", "inputs", "group", "all inputs but one"]),
    seed=st.integers(0, 2**20),
)
def test_never_worse_than_rounding(
    scheme: WeightScheme, num_outputs: int, width: int, num_rows: int, size: float, zeros: str, seed: int
) -> None:
    """Under the damped Gram matrix that was fitted to, output by output, for all data however odd."""
    weight, x = draw(num_outputs, width_of(scheme, width), num_rows, seed)
    x = x * size
    if zeros == "weight":
        weight.zero_()
    elif zeros == "group":
        weight[:, :32] = 0
    elif zeros == "inputs":
        x[:, ::3] = 0
    elif zeros == "all inputs but one":
        x[:, 1:] = 0
    gram, magnitudes = ((y.double().T @ y.double()).numpy() for y in (x, x.abs()))
    rounded = dequantize_weight(quantize_weight(weight, scheme), torch.float32).double().numpy()
    exact = weight.double().numpy()
    height = 128 if scheme.strategy is Strategy.BLOCK else 1
    blocks = np.arange(0, num_outputs, height)
    for chosen in (SolverSettings(), BEST):
        stored = solved(weight, x, scheme, chosen)[0]
        assert torch.isfinite(stored).all()
        if zeros == "weight":
            assert not stored.any()
        # With few rows damping is most of the matrix that is fitted to, as it should be.
        few = max(1.0, FEW_ROWS * weight.shape[1] / num_rows)
        hessian = damped(gram, chosen.damp_percent * few**2)
        found, baseline = (loss(exact, other, hessian) for other in (stored.double().numpy(), rounded))
        # Sums of R and then twice of K float32 products each lose 2^-24 of the sum of magnitudes at every addition.
        shares = (num_rows + 2 * weight.shape[1]) * 2.0**-24
        bound = damped(magnitudes, chosen.damp_percent * few**2)
        slack = sum(loss(np.abs(exact - other), 0 * exact, bound) for other in (stored.double().numpy(), rounded))
        allowed = baseline + shares * slack
        assert (np.add.reduceat(found, blocks) <= np.add.reduceat(allowed, blocks) + 1e-30).all()


def test_an_output_that_came_out_worse_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its codes and its scales, and no other's; the report counts it, and its error is that of what is stored."""
    weight, x = draw(200, 256, 600)
    for scheme in (SCHEMES[0], SCHEMES[3], SCHEMES[5]):
        rows = slice(128, 200) if scheme.strategy is Strategy.BLOCK else slice(3, 5)
        plain = quantize_weight(weight, scheme)
        solve_rows = Solver._solve_rows

        def spoiled(*arguments: Tensor, bad: slice = rows, solve: Any = solve_rows) -> tuple[Tensor, Tensor, None]:
            codes, scale, _ = solve(*arguments)
            codes[bad] = 7  # of FP8 a byte that is a small number
            return codes, scale, None

        moments = Moments(256, device=torch.device("cpu")).add(x)
        best = Solver.of(moments, SolverSettings()).solve(weight, scheme)
        with monkeypatch.context() as patch:
            patch.setattr(Solver, "_solve_rows", spoiled)
            guarded = Solver.of(moments, SolverSettings()).solve(weight, scheme)
        assert best.num_rounded == 0
        assert guarded.num_rounded == rows.stop - rows.start
        found, expected = guarded.packed.unpack(), best.packed.unpack()
        expected.codes[rows] = plain.codes[rows]
        height = 128 if scheme.strategy is Strategy.BLOCK else 1
        scales = slice(rows.start // height, -(-rows.stop // height))
        expected.scale[scales] = plain.scale[scales]
        assert torch.equal(found.codes.float(), expected.codes.float())
        assert torch.equal(found.scale, expected.scale)
        error = loss(weight.double().numpy(), dequantize_weight(found, torch.float32).double().numpy(), gram_of(x))
        rounding = loss(weight.double().numpy(), dequantize_weight(plain, torch.float32).double().numpy(), gram_of(x))
        total = loss(weight.double().numpy(), 0, gram_of(x)).sum()
        assert guarded.output_error == pytest.approx(error.sum() / total, rel=2**-8)  # as in the test below
        for solved in (guarded, best):
            assert solved.rounding_error == pytest.approx(rounding.sum() / total, rel=2**-8)


def gram_of(x: Tensor) -> np.ndarray:
    return (x.double().T @ x.double()).numpy()


@pytest.mark.parametrize("scheme", [SCHEMES[1], SCHEMES[4], SCHEMES[5]], ids=lambda s: s.label)
def test_rows_in_parts_give_the_same_bytes(scheme: WeightScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = draw(300, 128, 500)
    whole = solved(weight, x, scheme)
    monkeypatch.setattr(solve_module, "ROW_ELEMENTS", 128 * 128)
    parts = solved(weight, x, scheme)
    assert torch.equal(whole[1], parts[1])
    assert torch.equal(whole[0], parts[0])


def test_nan_is_refused() -> None:
    weight, x = draw(4, 64, 50)
    weight[2, 3] = math.nan
    with pytest.raises(QuantizationError, match="hold NaN or Inf"):
        solved(weight, x, SCHEMES[0])


def test_prior_rows_are_not_counted() -> None:
    moments = Moments(8, device=torch.device("cpu"))
    moments.add(torch.ones(5, 8), num_prior=2).add(torch.ones(1, 8))
    assert moments.num_rows == 4
    assert torch.equal(moments.gram, torch.full((8, 8), 6.0))


def test_the_error_reported_is_that_of_the_outputs() -> None:
    weight, x = draw(12, 64, 200)
    moments = Moments(64, device=torch.device("cpu")).add(x)
    result = Solver.of(moments, SolverSettings()).solve(weight, SCHEMES[1])
    stored = dequantize_weight(result.packed.unpack(), torch.float32)
    outputs, changed = x.double() @ weight.double().T, x.double() @ stored.double().T
    expected = float((outputs - changed).square().sum() / outputs.square().sum())
    # Products may be taken of inputs rounded to bfloat16, 2^-9 each: two factors of the sum of squared outputs.
    assert result.output_error == pytest.approx(expected, rel=2**-8)
