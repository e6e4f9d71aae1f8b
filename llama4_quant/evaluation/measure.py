"""Run a model, and a reference beside it, over windows of tokens.

Both run on the same windows in the same process, so only the logits of one batch of windows exist at a time, or of a
piece of them where windows are long, and nothing is stored between runs. It knows nothing of files or of how a model is
stored: a model is anything that turns tokens into logits.

Shape letters: B windows of a batch, L positions, V vocabulary, W windows.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama4_quant.errors import Llama4QuantError, UsageError
from llama4_quant.evaluation.divergence import token_agreements, token_divergences
from llama4_quant.evaluation.perplexity import token_losses
from llama4_quant.evaluation.report import Comparison, Estimate, EvaluationResult

LogitsModel = Callable[[Tensor], Tensor | Iterable[Tensor]]
"""Takes [B, L] int64, gives logits [B, L, V]: a Llama4Model, a transformers model behind a lambda, ...; or pieces of
them, [B, some positions, V], in order, which are asked for one at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedModel:
    """A model and what to call it in a report."""

    name: str
    logits: LogitsModel


@dataclass(frozen=True, kw_only=True, slots=True)
class _Paired:
    """Means over the scored tokens of one window, against the reference."""

    reference_loss: float
    loss_increase: float
    divergence: float
    agreement: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _WindowScore:
    """Means over the scored tokens of one window."""

    loss: float
    paired: _Paired | None


def evaluate(
    model: NamedModel,
    windows_WL: Tensor,
    *,
    reference: NamedModel | None = None,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> EvaluationResult:
    """Measure perplexity, and against a reference KL divergence and top-1 agreement.

    Every position of a window but the last predicts the token after it: L - 1 scored tokens per window.

    Args:
        model: what is measured.
        windows_WL: [W, L] int64, from `token_windows`.
        reference: the model that it should be like, usually the unquantized one.
        batch_size: windows per forward pass; memory grows with it, results do not depend on it beyond rounding.
        device: where the models take their tokens.
        progress: called with the number of windows just done.

    Raises:
        UsageError: no windows, a batch size below 1, or vocabularies of different sizes.
        Llama4QuantError: a model gives NaN.
    """
    if windows_WL.ndim != 2 or windows_WL.shape[0] < 1 or windows_WL.shape[1] < 2:
        raise UsageError(f"windows have shape {list(windows_WL.shape)}, expected [windows, at least 2 positions]")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, expected at least 1")
    start = time.perf_counter()
    scores: list[_WindowScore] = []
    for batch_BL in torch.split(windows_WL, batch_size):
        scores += _score_batch(model, reference, batch_BL.to(device), first_window=len(scores))
        if progress is not None:
            progress(len(batch_BL))
    loss = Estimate.of([score.loss for score in scores])
    pairs = [score.paired for score in scores if score.paired is not None]
    return EvaluationResult(
        model=model.name,
        num_windows=windows_WL.shape[0],
        seq_length=windows_WL.shape[1],
        num_tokens=windows_WL[:, 1:].numel(),
        loss=loss,
        perplexity=loss.exp(),
        comparison=None if reference is None else _compare(reference.name, pairs),
        seconds=time.perf_counter() - start,
    )


@torch.inference_mode()
def _score_batch(
    model: NamedModel, reference: NamedModel | None, batch_BL: Tensor, first_window: int
) -> list[_WindowScore]:
    windows = [_TokenScores() for _ in batch_BL]
    num_scored = batch_BL.shape[1] - 1  # the last position predicts nothing
    start = 0
    for logits_BTV, reference_BTV in _pieces(model, reference, batch_BL):
        stop = min(start + logits_BTV.shape[1], num_scored)
        for index, tokens in enumerate(windows):
            row = None if reference_BTV is None else reference_BTV[index, : stop - start]
            targets_T = batch_BL[index, start + 1 : stop + 1].to(logits_BTV.device)
            tokens.add(logits_BTV[index, : stop - start], row, targets_T)
        start = stop
    if start != num_scored:
        raise UsageError(f"{model.name} gives logits of {start} positions, expected {batch_BL.shape[1]}")
    scores = [tokens.means() for tokens in windows]
    for index, score in enumerate(scores):
        _check(model.name, first_window + index, score.loss)
        if reference is not None and score.paired is not None:
            _check(reference.name, first_window + index, score.paired.reference_loss)
    return scores


def _pieces(
    model: NamedModel, reference: NamedModel | None, batch_BL: Tensor
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Logits of both for the same positions, [B, T, V] each."""
    found = _as_pieces(model.logits(batch_BL))
    if reference is None:
        yield from ((piece, None) for piece in found)
        return
    wanted = _as_pieces(reference.logits(batch_BL))
    a, b = next(found, None), next(wanted, None)
    while a is not None and b is not None:
        size = min(a.shape[1], b.shape[1])
        if (a.shape[0], a.shape[2]) != (b.shape[0], b.shape[2]):
            raise UsageError(
                f"the model gives logits {list(a.shape)} and the reference {list(b.shape)}; "
                "they must have the same vocabulary"
            )
        yield a[:, :size], b[:, :size].to(a.device)
        a = a[:, size:] if size < a.shape[1] else next(found, None)
        b = b[:, size:] if size < b.shape[1] else next(wanted, None)


def _as_pieces(logits: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    return iter((logits,) if isinstance(logits, Tensor) else logits)


def _check(name: str, window: int, loss: float) -> None:
    if math.isnan(loss):
        raise Llama4QuantError(f"{name}: the logits of window {window} hold NaN; check the checkpoint, or try float32")


@dataclass(kw_only=True, slots=True)
class _TokenScores:
    """Of the tokens of one window, float64 or bool, as pieces come."""

    losses: list[Tensor] = field(default_factory=list)
    reference_losses: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)
    agreements: list[Tensor] = field(default_factory=list)

    def add(self, logits_TV: Tensor, reference_TV: Tensor | None, targets_T: Tensor) -> None:
        """Score T more tokens; none is no token."""
        if not len(targets_T):
            return
        self.losses.append(token_losses(logits_TV, targets_T))
        if reference_TV is not None:
            self.reference_losses.append(token_losses(reference_TV, targets_T))
            self.divergences.append(token_divergences(logits_TV, reference_TV))
            self.agreements.append(token_agreements(logits_TV, reference_TV))

    def means(self) -> _WindowScore:
        """Over the window."""
        losses_T = torch.cat(self.losses)
        if not self.reference_losses:
            return _WindowScore(loss=_mean(losses_T), paired=None)
        reference_losses_T = torch.cat(self.reference_losses)
        paired = _Paired(
            reference_loss=_mean(reference_losses_T),
            loss_increase=_mean(losses_T - reference_losses_T),
            divergence=_mean(torch.cat(self.divergences)),
            agreement=_mean(torch.cat(self.agreements)),
        )
        return _WindowScore(loss=_mean(losses_T), paired=paired)


def _mean(values_T: Tensor) -> float:
    return float(values_T.to(torch.float64).mean())


def _compare(reference: str, pairs: list[_Paired]) -> Comparison:
    return Comparison(
        reference=reference,
        reference_perplexity=Estimate.of([pair.reference_loss for pair in pairs]).exp(),
        loss_increase=Estimate.of([pair.loss_increase for pair in pairs]),
        divergence=Estimate.of([pair.divergence for pair in pairs]),
        agreement=Estimate.of([pair.agreement for pair in pairs]),
    )
