"""What a user chooses about calibration, and what an algorithm's name stands for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from llama4_quant.calibration.corpus import DEFAULT_MAX_SEQ_LENGTH, DEFAULT_NUM_SAMPLES, CalibrationSettings
from llama4_quant.errors import UsageError
from llama4_quant.scheme import KVCacheScheme

MIN_TARGET_BITS, MAX_TARGET_BITS = 4, 16


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
        equalize: move powers of two between weights first (equalize.py).
    """

    damp_percent: float = 0.01
    correct: bool = False
    ridge_percent: float = 0.02
    num_sweeps: int = 0
    refit_scales: bool = False
    equalize: bool = True


_SOLVERS = {
    Algorithm.GPTQ: SolverSettings(),
    Algorithm.BEST: SolverSettings(correct=True, num_sweeps=3, refit_scales=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """How weights are calibrated, and on what. Made by `make_calibration`.

    Attributes:
        algorithm: GPTQ or BEST.
        corpus: where tokens come from, and how many.
        min_tokens_per_expert: draw further samples until every expert has as many rows, where the data suffices.
        device: where the arithmetic is done.
        solver: what the algorithm stands for.
        kv_cache_scheme: also find scales of such a KV cache.
        target_bits: choose schemes weight by weight so that they take at most so many bits; None: all the same.
    """

    algorithm: Algorithm
    corpus: CalibrationSettings
    min_tokens_per_expert: int
    device: str
    solver: SolverSettings
    kv_cache_scheme: KVCacheScheme | None = None
    target_bits: float | None = None


def make_calibration(
    algorithm: str = Algorithm.BEST,
    *,
    data: Sequence[str] = (),
    num_samples: int = DEFAULT_NUM_SAMPLES,
    max_seq_length: int = DEFAULT_MAX_SEQ_LENGTH,
    seed: int = 0,
    text_column: str = "text",
    min_tokens_per_expert: int = 0,
    damp_percent: float | None = None,
    device: str = "cpu",
    kv_cache_scheme: str | None = None,
    target_bits: float | None = None,
) -> Calibration | None:
    """Settings for `convert(..., calibration=...)`.

    Args:
        algorithm: "best", "gptq", or "rtn" (None comes back: rounding to nearest needs no data).
        data: files, folders and `hub:` data sets (docs/calibration.md); none: the built-in text.
        num_samples: sequences.
        max_seq_length: tokens of a sequence.
        seed: decides the order in which text is drawn.
        text_column: where JSON, Parquet and Hub records have plain text.
        min_tokens_per_expert: draw further samples until every expert has seen as many tokens, where the data suffices.
        damp_percent: added to the Hessians' diagonals, as a part of their mean; default: the algorithm's.
        device: where the arithmetic is done: "cpu", "cuda", ...
        kv_cache_scheme: "fp8": also find scales of an FP8 KV cache, for the keys and the values of each layer.
        target_bits: mixed precision: choose among int4 (channel, g128, g64, g32), FP8 and BF16 for each weight, so that
            they take at most so many bits per weight, scales included.

    Raises:
        SchemeError: unknown KV-cache scheme.
        UsageError: unknown algorithm, or a number that makes no sense.
    """
    known, cache = parse_algorithm(algorithm), KVCacheScheme.parse(kv_cache_scheme)
    if known is Algorithm.RTN:
        if data or min_tokens_per_expert:
            raise UsageError("rtn rounds to nearest and uses no calibration data; choose gptq or best")
        if cache is not None:
            raise UsageError(
                f"--kv-cache-scheme {cache}: its scales come from calibration data, and rtn uses none; choose "
                "--algorithm gptq or best, or give --calibration"
            )
        if target_bits is not None:
            raise UsageError("--target-bits measures on data what each weight needs; choose --algorithm gptq or best")
        return None
    solver = _SOLVERS[known]
    if damp_percent is not None:
        if not 0 < damp_percent <= 1:
            raise UsageError(f"damp_percent is {damp_percent}, expected more than 0 and at most 1 (0.01 is usual)")
        solver = replace(solver, damp_percent=damp_percent)
    if min_tokens_per_expert < 0:
        raise UsageError(f"min_tokens_per_expert is {min_tokens_per_expert}, expected 0 or more")
    if target_bits is not None and not MIN_TARGET_BITS <= target_bits < MAX_TARGET_BITS:
        raise UsageError(
            f"target_bits is {target_bits}, expected at least {MIN_TARGET_BITS} (int4) and less than {MAX_TARGET_BITS} "
            "(BF16)"
        )
    corpus = CalibrationSettings(
        data=tuple(data), num_samples=num_samples, max_seq_length=max_seq_length, seed=seed, text_column=text_column
    )
    return Calibration(
        algorithm=known,
        corpus=corpus,
        min_tokens_per_expert=min_tokens_per_expert,
        device=device,
        solver=solver,
        kv_cache_scheme=cache,
        target_bits=target_bits,
    )


def parse_algorithm(name: str) -> Algorithm:
    """Look up an algorithm by name.

    Raises:
        UsageError: unknown; lists the known ones.
    """
    if name not in set(Algorithm):
        raise UsageError(f"unknown algorithm {name!r}; known algorithms: {', '.join(Algorithm)}")
    return Algorithm(name)
