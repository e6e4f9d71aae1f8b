"""One candidate for each unit, with the least predicted loss in a budget of bytes.

Sizes are whole bytes, and what candidates of Llama 4's weights differ by has a large common divisor, so that a table
over budgets finds the optimum: `best[b]` is the least loss of the units so far in `b` divisors over the smallest size.
Where the table would be longer than MAX_STEPS it is coarsened, and sizes are rounded up, so that the budget holds all
the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_STEPS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to store a unit: bytes, and the loss that goes with them."""

    num_bytes: int
    loss: float


def choose(units: Sequence[Sequence[Option]], budget: int) -> tuple[int, ...] | None:
    """The index of the chosen option of each unit; None if even the smallest options exceed `budget` bytes.

    Of equal losses the first option in the list is taken, so that the result is a function of its arguments alone.
    """
    smallest = [min(option.num_bytes for option in options) for options in units]
    spare = budget - sum(smallest)
    if spare < 0:
        return None
    extras = [[option.num_bytes - base for option in options] for options, base in zip(units, smallest, strict=True)]
    divisor = math.gcd(*(extra for row in extras for extra in row)) or 1
    # More than the largest options take is never spent.
    spare = min(spare, sum(max(row) for row in extras))
    step = divisor * max(1, -(-spare // (divisor * MAX_STEPS)))
    num_steps = spare // step
    best = torch.zeros(num_steps + 1, dtype=torch.float64)
    taken: list[torch.Tensor] = []
    for options, row in zip(units, extras, strict=True):
        losses = torch.full((len(options), num_steps + 1), torch.inf, dtype=torch.float64)
        for place, (option, extra) in enumerate(zip(options, row, strict=True)):
            shift = -(-extra // step)
            if shift <= num_steps:
                losses[place, shift:] = best[: num_steps + 1 - shift] + option.loss
        best = losses.min(dim=0).values
        # The first of equal losses: `min` does not promise which index it gives.
        taken.append((losses == best).to(torch.uint8).argmax(dim=0))
    chosen, left = [], num_steps
    for table, row in zip(reversed(taken), reversed(extras), strict=True):
        place = int(table[left])
        chosen.append(place)
        left -= -(-row[place] // step)
    return tuple(reversed(chosen))
