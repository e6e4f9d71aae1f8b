"""What a user chooses about calibration, and what an algorithm's name stands for."""

from dataclasses import dataclass, field
from enum import StrEnum

from llama4_quant.errors import UsageError


class Algorithm(StrEnum):
    """How codes are chosen."""

    RTN = "rtn"
    """Round to nearest: needs no data."""
    GPTQ = "gptq"
    """Codes that keep each layer's output, with the inputs that the quantized model gives it."""
    BEST = "best"
    """The original model runs beside the quantized one, and every weight also makes up for what went wrong before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverSettings:
    """How one weight is solved.

    Attributes:
        damp_percent: added to the diagonal of the Gram matrix, as a part of its mean.
        correct: run the original model beside the quantized one, and correct weights for the drift of their inputs.
        ridge_percent: of the correction; see `corrected`.
        num_sweeps: of coordinate descent after GPTQ.
        refit_scales: solve for the scales between sweeps.
    """

    damp_percent: float = 0.01
    correct: bool = False
    ridge_percent: float = 0.02
    num_sweeps: int = 0
    refit_scales: bool = False


_SOLVERS = {
    Algorithm.GPTQ: SolverSettings(),
    Algorithm.BEST: SolverSettings(correct=True, num_sweeps=3, refit_scales=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSettings:
    """How weights are calibrated, and with what.

    Attributes:
        algorithm: GPTQ or BEST.
        data: files, folders or Hub data sets; none: the built-in text.
        num_samples: sequences.
        max_seq_length: tokens of a sequence, at most.
        seed: of the order in which text is drawn.
        min_tokens_per_expert: draw further sequences until every expert has seen as many, where the data suffices.
        device: where the arithmetic is done.
    """

    algorithm: Algorithm = Algorithm.BEST
    data: tuple[str, ...] = ()
    num_samples: int = 256
    max_seq_length: int = 2048
    seed: int = 0
    min_tokens_per_expert: int = 0
    device: str = "cpu"
    solver: SolverSettings = field(default_factory=SolverSettings)

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_seq_length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected at least 1")


def parse_algorithm(name: str) -> Algorithm:
    """Look up an algorithm by name.

    Raises:
        UsageError: unknown; lists the known ones.
    """
    if name not in set(Algorithm):
        raise UsageError(f"unknown algorithm {name!r}; known algorithms: {', '.join(Algorithm)}")
    return Algorithm(name)


def solver_settings(algorithm: Algorithm) -> SolverSettings:
    """What `algorithm` stands for."""
    return _SOLVERS[algorithm]
