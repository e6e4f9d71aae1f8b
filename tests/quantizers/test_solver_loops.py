"""The compiled loops of calibration give the bytes of the plain ones."""

import pytest
import torch

from llama4_quant.calibration.gptq import BLOCK, Scales, coordinate_descent, factor, gptq
from llama4_quant.calibration.scales import search_scales, solver_scales
from llama4_quant.quantizers import solver
from llama4_quant.quantizers.backend import choose_backend
from llama4_quant.quantizers.native import Library
from llama4_quant.quantizers.quantize import grid_of
from llama4_quant.scheme import WeightScheme, preset

SCHEMES = [
    preset("W4A16", group_size=32).weights,
    preset("W4A16", group_size=128).weights,
    preset("W4A16", group_size=-1).weights,
    preset("FP8_DYNAMIC").weights,
]
by_label = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)


@pytest.fixture(scope="module")
def library() -> Library:
    found = choose_backend("auto").library
    if found is None:
        pytest.skip("no compiler")
    return found


def draw(num_outputs: int, num_inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_outputs)
    x = (
        torch.randn(3 * num_inputs, num_inputs, generator=generator)
        * torch.randn(num_inputs, generator=generator).exp()
    )
    return torch.randn(num_outputs, num_inputs, generator=generator).pow(3), x.T @ x


@by_label
@pytest.mark.parametrize("num_outputs", [1, 67, 200])
def test_scales_codes_and_costs_are_the_same(
    library: Library, scheme: WeightScheme, num_outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two blocks and a part of one, one to several tiles of outputs, on one thread and on several."""
    weight, gram = draw(num_outputs, 2 * BLOCK + 128)
    scale = search_scales(weight, scheme, gram.diagonal())
    assert torch.equal(scale, search_scales(weight, scheme, gram.diagonal(), library))
    scales: Scales = solver_scales(scale, (num_outputs, weight.shape[1]), scheme)
    factored, grid, weight_KN = factor(gram, 0.01), grid_of(scheme), weight.T.contiguous()
    codes, cost_N = gptq(weight_KN, factored, scales, grid)
    better = coordinate_descent(weight_KN, codes, factored, scales, grid)
    for shared in (1 << 40, 1):
        monkeypatch.setattr(solver, "_SHARED", shared)
        compiled, compiled_cost_N = gptq(weight_KN, factored, scales, grid, library)
        assert torch.equal(codes, compiled)
        assert torch.equal(cost_N, compiled_cost_N)
        assert torch.equal(better, coordinate_descent(weight_KN, codes, factored, scales, grid, library))
    assert not torch.equal(better, codes)
