"""What verifying a checkpoint finds: problems, and how far every quantized weight is from the source."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llama4_quant.quantizers.error import WeightError
from llama4_quant.scheme import WeightScheme

RELATIVE_TOLERANCE = 2**-19
"""Error sums of the compiled quantizers are float32 products: within 2^-19 of the float64 ones here (backend.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something that is wrong, and where: a file or a weight."""

    where: str
    what: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightDistance:
    """How far a quantized weight is from the source; `relative_error` is |w - dequantized| / |w|."""

    name: str
    stored_as: str
    relative_error: float
    sqnr_db: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The result: no problems means that the checkpoint is whole."""

    output: str
    source: str | None
    num_files: int
    num_bytes: int
    num_weights: int
    problems: tuple[Problem, ...]
    distances: tuple[WeightDistance, ...]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        return {**asdict(self), "is_whole": self.is_whole}


def distance(name: str, scheme: WeightScheme, error: WeightError) -> WeightDistance:
    """The distance of a weight whose errors have been summed up."""
    return WeightDistance(
        name=name,
        stored_as=scheme.label,
        relative_error=error.relative_error,
        sqnr_db=error.sqnr_db if error.squared_error else None,
    )


def broken_promise(found: WeightDistance, promised: Mapping[str, float]) -> Problem | None:
    """A problem, if the report gives another relative error for this weight; `promised` has those of the report."""
    said = promised.get(found.name)
    if math.isclose(found.relative_error, -1.0 if said is None else said, rel_tol=RELATIVE_TOLERANCE):
        return None
    return Problem(where=found.name, what=f"relative error {found.relative_error:.6g}, but the report says {said}")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN or Inf in a tensor of floats, FP8 codes included."""
    if tensor.dtype is torch.float8_e4m3fn:  # no Inf; NaN is 0x7f and 0xff
        return not bool(torch.eq(tensor.view(torch.uint8).bitwise_and(0x7F), 0x7F).any())
    return bool(torch.isfinite(tensor).all())
