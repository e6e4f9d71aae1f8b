"""Print the tables of int4.py and fp8.py: what the MSE search's factors give away against a dense search.

python tests/quantizers/study_factors.py
"""

import torch
from torch import Tensor

from llama4_quant.quantizers import fp8, int4
from llama4_quant.quantizers.grid import CodeGrid
from llama4_quant.quantizers.search import choose_scales
from llama4_quant.scheme import Strategy

DISTRIBUTIONS = {
    "normal": torch.distributions.Normal(0.0, 1.0),
    "laplace": torch.distributions.Laplace(0.0, 1.0),
    "student-t 5": torch.distributions.StudentT(5.0),
    "student-t 3": torch.distributions.StudentT(3.0),
}
ONE_BINADE = {count: tuple(2 ** (step / count) for step in range(1, count)) for count in (4, 8)}


def total_error(weight_SL: Tensor, grid: CodeGrid, factors: tuple[float, ...]) -> float:
    scale_L = choose_scales(weight_SL, weight_SL.abs().amax(0), grid, factors)
    return float((weight_SL - grid.nearest_(weight_SL / scale_L) * scale_L).square().double().sum())


def excess(size: int, num_lanes: int, grid: CodeGrid, dense: tuple[float, ...], trials: list[tuple[float, ...]]) -> str:
    cells = []
    for name, distribution in DISTRIBUTIONS.items():
        torch.manual_seed(0)
        weight_SL = distribution.sample((size, num_lanes)).to(torch.bfloat16).float()
        least = total_error(weight_SL, grid, dense)
        shown = " ".join(f"{100 * (total_error(weight_SL, grid, factors) / least - 1):6.2f}%" for factors in trials)
        cells.append(f"{name}: {shown}")
    return f"{size:6d}  " + "   ".join(cells)


def geometric(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(low * (high / low) ** (step / (count - 1)) for step in range(count))


def main() -> None:
    torch.set_num_threads(1)
    print("int4: absmax, GRID.factors; against 400 factors in 0.1..1.3")
    for size, num_lanes in ((32, 8192), (64, 4096), (128, 2048), (5120, 64), (8192, 64)):
        strategy = Strategy.GROUP if size <= 128 else Strategy.CHANNEL
        print(excess(size, num_lanes, int4.GRID, geometric(0.1, 1.3, 400), [(), int4.GRID.factors[strategy]]))
    print("fp8: absmax, 4, 8, GRID.factors; against 400 factors in 0.25..4")
    for size, num_lanes in ((5120, 64), (8192, 64), (16384, 32)):
        trials = [(), ONE_BINADE[4], ONE_BINADE[8], fp8.GRID.factors[Strategy.CHANNEL]]
        print(excess(size, num_lanes, fp8.GRID, geometric(0.25, 4, 400), trials))


if __name__ == "__main__":
    main()
