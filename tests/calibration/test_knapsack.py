"""Choosing one option for each unit in a budget, against trying all combinations."""

import itertools
import random

import pytest

from llama4_quant.calibration import knapsack
from llama4_quant.calibration.knapsack import Option, choose


def random_units(seed: int, count: int = 5) -> list[list[Option]]:
    rng = random.Random(seed)
    return [
        [Option(num_bytes=64 * rng.randrange(1, 40), loss=rng.random()) for _ in range(rng.randrange(1, 5))]
        for _ in range(count)
    ]


def size(units: list[list[Option]], places: tuple[int, ...]) -> int:
    return sum(options[place].num_bytes for options, place in zip(units, places, strict=True))


def loss(units: list[list[Option]], places: tuple[int, ...]) -> float:
    return sum(options[place].loss for options, place in zip(units, places, strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_as_good_as_trying_everything(seed: int) -> None:
    units = random_units(seed)
    budget = random.Random(seed).randrange(64 * 20, 64 * 150)
    fitting = [
        places
        for places in itertools.product(*(range(len(options)) for options in units))
        if size(units, places) <= budget
    ]
    found = choose(units, budget)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert size(units, found) <= budget
    # Sums of the same numbers in another order.
    assert loss(units, found) <= min(loss(units, places) for places in fitting) + 1e-12


@pytest.mark.parametrize("seed", range(10))
def test_a_coarse_table_keeps_the_budget(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    units = random_units(seed, count=40)
    smallest = sum(min(option.num_bytes for option in options) for options in units)
    budget = smallest + 64 * 200
    exact = choose(units, budget)
    monkeypatch.setattr(knapsack, "MAX_STEPS", 150)
    coarse = choose(units, budget)
    assert exact is not None
    assert coarse is not None
    assert size(units, coarse) <= budget
    assert loss(units, exact) <= loss(units, coarse) + 1e-12


def test_everything_fits() -> None:
    units = [[Option(num_bytes=4, loss=1.0), Option(num_bytes=16, loss=0.0)]] * 3
    assert choose(units, 10**12) == (1, 1, 1)


def test_exactly_the_budget() -> None:
    units = [[Option(num_bytes=4, loss=1.0), Option(num_bytes=16, loss=0.0)]] * 3
    assert choose(units, 4 + 16 + 16) == (0, 1, 1) or choose(units, 36) in {(1, 0, 1), (1, 1, 0)}
    assert choose(units, 12) == (0, 0, 0)
    assert choose(units, 11) is None


def test_of_equal_losses_the_first_is_taken() -> None:
    units = [[Option(num_bytes=4, loss=1.0), Option(num_bytes=8, loss=1.0)]] * 4
    assert choose(units, 100) == (0, 0, 0, 0)


def test_one_way_only() -> None:
    assert choose([[Option(num_bytes=7, loss=0.5)]], 7) == (0,)
