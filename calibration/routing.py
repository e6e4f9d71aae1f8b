"""Which rows each expert is fitted to: those routed to it, and, where these are few, some of the layer's other rows.

A row of an expert is a token times its score, exactly as at inference. T tokens make T*k rows in all, never E*T.

An expert with few rows for its width would have a singular Hessian, and be fitted to accidents of those rows. Its rows
are joined by `prior` rows, evenly spaced tokens of the layer with the score that this expert would give them; together
they count as much as PRIOR_STRENGTH * H rows, so they fade as the expert's own rows become many. An expert without any
row of its own is rounded to nearest: there is nothing to measure a choice by.

Shape letters: E experts, H hidden, R rows, T tokens, k experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ENOUGH_ROWS = 8
"""Rows per input from which an expert gets no prior."""
PRIOR_STRENGTH = 0.1
MAX_PRIOR_ROWS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """What decides about prior rows: the width H of the experts' inputs."""

    width: int

    def num_prior_rows(self, num_own: int, num_tokens: int) -> int:
        """How many prior rows an expert with `num_own` rows gets."""
        if num_own == 0 or num_own >= ENOUGH_ROWS * self.width:
            return 0
        return min(num_tokens, MAX_PRIOR_ROWS, 2 * self.width)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertRows:
    """The rows of one expert.

    Attributes:
        fitted: tokens whose rows the expert is fitted to, [R]: its own first, then the prior.
        num_own: how many are its own.
        quantized_scores, original_scores: what multiplies the rows of `fitted` in each model, [R].
        weights: what the rows count, [R].
        quantized_tokens, quantized_own: tokens routed to the expert in the quantized model, and their scores.
        original_tokens, original_own: the same in the original model.
    """

    fitted: Tensor
    num_own: int
    quantized_scores: Tensor
    original_scores: Tensor
    weights: Tensor
    quantized_tokens: Tensor
    quantized_own: Tensor
    original_tokens: Tensor
    original_own: Tensor

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
    """Scores [T, E] and chosen experts [T, k] of a layer, in both models."""

    quantized_scores: Tensor
    quantized_experts: Tensor
    original_scores: Tensor
    original_experts: Tensor
    has_original: bool

    @classmethod
    def of_logits(cls, quantized_TE: Tensor, original_TE: Tensor, experts_per_token: int) -> "Routing":
        """Choose experts; the two logits are the same tensor where only one model runs."""
        return cls(
            quantized_scores=quantized_TE.sigmoid(),
            quantized_experts=quantized_TE.topk(experts_per_token, dim=-1).indices,
            original_scores=original_TE.sigmoid(),
            original_experts=original_TE.topk(experts_per_token, dim=-1).indices,
            has_original=quantized_TE is not original_TE,
        )

    @property
    def rows_per_expert(self) -> tuple[int, ...]:
        """Rows routed to each expert in the quantized model."""
        num_experts = self.quantized_scores.shape[1]
        counts: list[int] = torch.bincount(self.quantized_experts.flatten(), minlength=num_experts).tolist()
        return tuple(counts)

    @property
    def rerouted(self) -> float | None:
        """The part of tokens that go to other experts than in the original model."""
        if not self.has_original:
            return None
        same_T = (self.quantized_experts.sort(dim=-1).values == self.original_experts.sort(dim=-1).values).all(dim=-1)
        return float((~same_T).double().mean())

    def of(self, expert: int, coverage: Coverage) -> ExpertRows:
        """The rows of one expert."""
        quantized = _tokens_of(self.quantized_experts, expert)
        original = _tokens_of(self.original_experts, expert)
        num_tokens = len(self.quantized_experts)
        num_prior = coverage.num_prior_rows(len(quantized), num_tokens)
        prior = torch.arange(num_prior, device=quantized.device) * num_tokens // max(1, num_prior)
        prior_weight = PRIOR_STRENGTH * coverage.width / max(1, num_prior)
        fitted = torch.cat([quantized, prior])
        return ExpertRows(
            fitted=fitted,
            num_own=len(quantized),
            quantized_scores=self.quantized_scores[fitted, expert],
            original_scores=self.original_scores[fitted, expert],
            weights=torch.cat([torch.ones(len(quantized)), torch.full((num_prior,), prior_weight)]).to(
                quantized.device
            ),
            quantized_tokens=quantized,
            quantized_own=self.quantized_scores[quantized, expert],
            original_tokens=original,
            original_own=self.original_scores[original, expert],
        )


def _tokens_of(experts_Tk: Tensor, expert: int) -> Tensor:
    return torch.nonzero((experts_Tk == expert).any(dim=-1)).squeeze(-1)
