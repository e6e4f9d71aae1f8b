"""What an evaluation found, with standard errors, as data, as JSON and as a table.

Tokens of one window share a text and a context, so their losses are correlated; windows are (nearly) independent.
Every standard error is therefore that of the mean over window means: s / sqrt(W) with the sample deviation s of W
windows (all windows score the same number of tokens). One window has no standard error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over windows and its standard error; None when there is one window."""

    value: float
    standard_error: float | None

    @classmethod
    def of(cls, window_means: Sequence[float]) -> "Estimate":
        """From the mean of each window."""
        values = torch.tensor(window_means, dtype=torch.float64)
        error = None if len(values) < 2 else float(values.std(correction=1)) / math.sqrt(len(values))
        return cls(value=float(values.mean()), standard_error=error)

    def text(self, digits: int) -> str:
        """For tables: `12.345 ± 0.067`, or the value alone."""
        error = "" if self.standard_error is None else f" ± {self.standard_error:.{digits}f}"
        return f"{self.value:.{digits}f}{error}"

    def exp(self) -> "Estimate":
        """The exponential, by the delta method: the standard error is multiplied by the derivative, e^value."""
        value = math.exp(self.value) if self.value < 700 else math.inf
        return Estimate(
            value=value, standard_error=None if self.standard_error is None else value * self.standard_error
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A model beside its reference, on the same tokens.

    Attributes:
        reference: the name of the reference.
        reference_perplexity: its perplexity.
        loss_increase: mean of loss - reference loss, nats per token; paired, so its error is that of the difference.
        divergence: mean KL(reference || model), nats per token.
        agreement: share of tokens whose most probable token is the reference's.
    """

    reference: str
    reference_perplexity: Estimate
    loss_increase: Estimate
    divergence: Estimate
    agreement: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """An evaluation of one model.

    Attributes:
        model: its name.
        num_windows, seq_length: what was run.
        num_tokens: tokens scored: num_windows * (seq_length - 1).
        loss: mean negative log-likelihood, nats per token.
        perplexity: exp(loss).
        comparison: None without a reference.
        seconds: wall time.
    """

    model: str
    num_windows: int
    seq_length: int
    num_tokens: int
    loss: Estimate
    perplexity: Estimate
    comparison: Comparison | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Nested objects of numbers and names; a missing standard error is null, and so is a number not finite."""
        return {name: _finite(value) for name, value in asdict(self).items()}


def render(result: EvaluationResult) -> Table:
    """The result as a table for people: value and standard error side by side."""
    table = Table(title=f"{result.model}: {result.num_tokens:,} tokens in {result.num_windows} windows")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    for name, estimate, digits in _lines(result):
        error = "n/a" if estimate.standard_error is None else f"{estimate.standard_error:.{digits}f}"
        table.add_row(name, f"{estimate.value:.{digits}f}", error)
    return table


def _lines(result: EvaluationResult) -> list[tuple[str, Estimate, int]]:
    lines = [("perplexity", result.perplexity, 4), ("loss (nats/token)", result.loss, 5)]
    if (comparison := result.comparison) is not None:
        lines += [
            (f"perplexity of {comparison.reference}", comparison.reference_perplexity, 4),
            ("loss increase (nats/token)", comparison.loss_increase, 5),
            ("KL to reference (nats/token)", comparison.divergence, 6),
            ("top-1 agreement", comparison.agreement, 5),
        ]
    return lines


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
