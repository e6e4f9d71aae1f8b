"""What it costs when an error sends a token to another expert, as a gradient for the survey.

A router's choice jumps, so the gradient of the likelihood knows nothing of it. To second order it can be put in: let m
be the margin between a token's last chosen expert and the next one, xi the error of that difference of logits, and J
what the swap would cost. The expected cost is `J P(xi > m)`; for a normal xi of deviation sigma it is written as
`c xi^2` with `c = J P(xi > m) / sigma^2`, which is right at sigma and additive in what weights contribute to xi^2. A
gradient `+-sqrt(2 c)` of the difference, of random sign, gives the survey's `1/2 (g . d)^2` that very term. J comes
from the gradient at the layer's output, `1/2 (g . (y_next - y_last))^2`.

Shape letters: E experts, H hidden, R rows, T tokens.
"""

import torch
from torch import Tensor

RELATIVE_ERROR = 0.05
"""Sigma, as a part of the logits' deviation: about what int4 leaves in the hidden states."""
_FARTHEST = 3.0


class Rerouting:
    """The tokens of a layer that an error may send elsewhere.

    Attributes:
        tokens: their numbers, [R].
        last, next: the experts that would be swapped, [R].
    """

    def __init__(self, logits_TE: Tensor, experts_per_token: int) -> None:
        """Find them; none where all experts are chosen anyway."""
        num_ranked = min(experts_per_token + 1, logits_TE.shape[1])
        ranked = logits_TE.topk(num_ranked, dim=-1)
        self._sigma = float(RELATIVE_ERROR * logits_TE.std()) or 1.0
        margin_T = ranked.values[:, experts_per_token - 1] - ranked.values[:, -1]
        is_near_T = margin_T < _FARTHEST * self._sigma
        if num_ranked == experts_per_token:
            is_near_T = torch.zeros_like(is_near_T)
        self.tokens = torch.nonzero(is_near_T).squeeze(-1)
        self._margin_R = margin_T[self.tokens]
        self.last = ranked.indices[self.tokens, experts_per_token - 1]
        self.next = ranked.indices[self.tokens, -1]
        self._change_R = torch.zeros_like(self._margin_R)

    def places(self, expert: int) -> Tensor:
        """Where in `tokens` an expert would be swapped in or out."""
        return torch.nonzero((self.last == expert) | (self.next == expert)).squeeze(-1)

    def add(self, expert: int, places_R: Tensor, outputs_RH: Tensor, gradients_RH: Tensor) -> None:
        """Note what an expert makes of those tokens, beside the gradient at the layer's output."""
        along_R = (outputs_RH * gradients_RH).sum(dim=-1)
        sign_R = torch.where(self.next[places_R] == expert, 1.0, -1.0)
        self._change_R[places_R] += along_R * sign_R

    def gradients(self, router_EH: Tensor, generator: torch.Generator) -> Tensor:
        """The gradient [R, H] at the router's input, once all experts have been added."""
        cost_R = 0.5 * self._change_R.square()
        chance_R = torch.special.ndtr(-self._margin_R / self._sigma)
        size_R: Tensor = (2 * cost_R * chance_R).sqrt() / self._sigma
        sign_R: Tensor = torch.randint(0, 2, size_R.shape, generator=generator).mul_(2).sub_(1).to(size_R)
        difference_RH: Tensor = router_EH[self.last] - router_EH[self.next]
        return difference_RH * (size_R * sign_R).unsqueeze(-1)
