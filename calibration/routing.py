"""Which rows each expert is fitted to: those routed to it, and, where these are few, some of the layer's other rows.

A row of an expert is a token times its score, exactly as at inference. T tokens make T*k rows in all, never E*T.

An expert with few rows for its width would have a singular Hessian, and be fitted to accidents of those rows. Its rows
are joined by `prior` rows, evenly spaced tokens of the layer with the score that this expert would give them; together
they count as much as PRIOR_STRENGTH * H rows, so they fade as the expert's own rows become many. An expert without any
row of its own is rounded to nearest: there is nothing to measure a choice by.

What is held is T*k numbers, and the scores of all experts for the prior tokens only.

Shape letters: E experts, H hidden, P prior tokens, R rows, T tokens, k experts per token.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

ENOUGH_ROWS = 8
"""Rows per input from which an expert gets no prior."""
PRIOR_STRENGTH = 0.1
MAX_PRIOR_ROWS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertRows:
    """The rows of one expert.

    Attributes:
        fitted: tokens whose rows the expert is fitted to, [R]: its own first, then the prior, each ascending.
        num_own: how many are its own.
        quantized_scores, original_scores: what multiplies the rows of `fitted` in each model, [R].
        weights: what the rows count, [R].
        original_tokens, original_own: tokens routed to the expert in the original model, and their scores.
    """

    fitted: Tensor
    num_own: int
    quantized_scores: Tensor
    original_scores: Tensor
    weights: Tensor
    original_tokens: Tensor
    original_own: Tensor

    @property
    def quantized_tokens(self) -> Tensor:
        """Tokens routed to the expert in the quantized model."""
        return self.fitted[: self.num_own]

    @property
    def quantized_own(self) -> Tensor:
        """Their scores."""
        return self.quantized_scores[: self.num_own]

    @property
    def total_prior(self) -> int:
        """Prior rows among `fitted`."""
        return len(self.fitted) - self.num_own

    def num_prior(self, part: slice) -> int:
        """Prior rows in a part of `fitted`."""
        first, stop = int(part.start), int(part.stop)
        return max(0, stop - max(first, self.num_own))


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Where the tokens of a layer go in both models. Made by `route`.

    Attributes:
        width: H, of the experts' inputs.
        num_experts: E.
        quantized_experts: experts that the quantized model chooses, [T, k].
        quantized_scores, original_scores: what each model's score for these is, [T, k].
        other_experts, other_scores: the original model's choice and its scores, [T, k]; the same tensors as above
            where only one model runs.
        prior_tokens: tokens that are shown to experts with few rows, [P].
        quantized_prior, original_prior: scores of all experts for those, [P, E].
    """

    width: int
    num_experts: int
    quantized_experts: Tensor
    quantized_scores: Tensor
    original_scores: Tensor
    other_experts: Tensor
    other_scores: Tensor
    prior_tokens: Tensor
    quantized_prior: Tensor
    original_prior: Tensor

    @property
    def rows_per_expert(self) -> tuple[int, ...]:
        """Rows routed to each expert in the quantized model."""
        counts: list[int] = torch.bincount(self.quantized_experts.flatten(), minlength=self.num_experts).tolist()
        return tuple(counts)

    @property
    def rerouted(self) -> float | None:
        """The part of tokens that go to other experts than in the original model; None where only one model runs."""
        if self.other_experts is self.quantized_experts:
            return None
        same_T = (self.quantized_experts.sort(dim=-1).values == self.other_experts.sort(dim=-1).values).all(dim=-1)
        return float((~same_T).double().mean())

    def of(self, expert: int) -> ExpertRows:
        """The rows of one expert."""
        own, own_slots = _places(self.quantized_experts, expert)
        other, other_slots = _places(self.other_experts, expert)
        num_prior = self._num_prior(len(own))
        prior = self.prior_tokens[:num_prior]
        weights_R = torch.ones(len(own) + num_prior, device=own.device)
        weights_R[len(own) :] = PRIOR_STRENGTH * self.width / max(1, num_prior)
        return ExpertRows(
            fitted=torch.cat([own, prior]),
            num_own=len(own),
            quantized_scores=torch.cat(
                [self.quantized_scores[own, own_slots], self.quantized_prior[:num_prior, expert]]
            ),
            original_scores=torch.cat([self.original_scores[own, own_slots], self.original_prior[:num_prior, expert]]),
            weights=weights_R,
            original_tokens=other,
            original_own=self.other_scores[other, other_slots],
        )

    def _num_prior(self, num_own: int) -> int:
        return 0 if num_own == 0 or num_own >= ENOUGH_ROWS * self.width else len(self.prior_tokens)


def route(logits: Iterable[tuple[Tensor, Tensor]], num_tokens: int, *, experts_per_token: int, width: int) -> Routing:
    """Choose experts from the router's logits, a chunk of tokens at a time.

    Args:
        logits: [R, E] of the quantized and of the original model, for all tokens in order; the same tensor twice where
            only one model runs.
        num_tokens: T.
        experts_per_token: k.
        width: H.
    """
    num_prior = min(num_tokens, MAX_PRIOR_ROWS, 2 * width)
    parts: list[tuple[Tensor, ...]] = []
    prior, start, num_experts, alone = [], 0, 0, False
    for quantized_RE, original_RE in logits:
        alone, (num_rows, num_experts) = quantized_RE is original_RE, quantized_RE.shape
        numbers = torch.arange(num_prior, device=quantized_RE.device) * num_tokens // max(1, num_prior)
        inside = numbers[(numbers >= start) & (numbers < start + num_rows)] - start
        prior.append((inside + start, quantized_RE[inside].sigmoid(), original_RE[inside].sigmoid()))
        parts.append(_chosen(quantized_RE, original_RE, experts_per_token))
        start += num_rows
    experts_Tk, scores_Tk, original_Tk, other_experts_Tk, other_scores_Tk = map(torch.cat, zip(*parts, strict=True))
    prior_P, quantized_PE, original_PE = map(torch.cat, zip(*prior, strict=True))
    return Routing(
        width=width,
        num_experts=num_experts,
        quantized_experts=experts_Tk,
        quantized_scores=scores_Tk,
        original_scores=original_Tk,
        other_experts=experts_Tk if alone else other_experts_Tk,
        other_scores=scores_Tk if alone else other_scores_Tk,
        prior_tokens=prior_P,
        quantized_prior=quantized_PE,
        original_prior=original_PE,
    )


def _chosen(quantized_RE: Tensor, original_RE: Tensor, experts_per_token: int) -> tuple[Tensor, ...]:
    logits_Rk, experts_Rk = quantized_RE.topk(experts_per_token, dim=-1)
    other_logits_Rk, other_experts_Rk = original_RE.topk(experts_per_token, dim=-1)
    scores = (logits_Rk, original_RE.gather(1, experts_Rk), other_logits_Rk)
    quantized_Rk, original_Rk, other_Rk = (values.sigmoid() for values in scores)
    return experts_Rk, quantized_Rk, original_Rk, other_experts_Rk, other_Rk


def _places(experts_Tk: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Tokens that chose an expert, ascending, and which of their choices it is."""
    tokens, slots = torch.nonzero(experts_Tk == expert, as_tuple=True)
    return tokens, slots
