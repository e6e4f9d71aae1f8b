"""Logits of tokens that were there before are changed, so that a text does not go round in circles.

Shape letters: B rows, P prompt columns, V vocabulary.
"""

import torch
from torch import Tensor

from llama4_quant.runtime.sampling import GenerationSettings


class TokenHistory:
    """The tokens that each row holds so far, as far as penalties need them."""

    def __init__(
        self, prompt_BP: Tensor, mask_BP: Tensor | None, settings: GenerationSettings, num_tokens: int
    ) -> None:
        """Start with prompts.

        Args:
            prompt_BP: [B, P] token ids.
            mask_BP: [B, P], 0 = padding, which no row holds; None for no padding.
            settings: which penalties.
            num_tokens: V.
        """
        batch_size, device = prompt_BP.shape[0], prompt_BP.device
        self._settings = settings
        # One column more than there are tokens, for padding.
        places_BP = prompt_BP if mask_BP is None else prompt_BP.masked_fill(mask_BP == 0, num_tokens)
        seen_BV = torch.zeros(batch_size, num_tokens + 1, dtype=torch.bool, device=device)
        self._seen_BV = seen_BV.scatter_(1, places_BP, value=True)[:, :num_tokens]
        self._counts_BV = torch.zeros(batch_size, num_tokens, dtype=torch.float32, device=device)

    def add(self, tokens_B: Tensor) -> None:
        """Each row holds one more token, which is part of its answer."""
        tokens_B1 = tokens_B.unsqueeze(1)
        self._seen_BV.scatter_(1, tokens_B1, value=True)
        self._counts_BV.scatter_add_(1, tokens_B1, torch.ones_like(tokens_B1, dtype=torch.float32))

    def penalize(self, logits_BV: Tensor) -> Tensor:
        """Logits as they are to be chosen from, [B, V] float32.

        The repetition penalty counts prompt and answer, as in transformers (Keskar et al. 2019, arXiv 1909.05858: there
        it divides; a negative logit is multiplied, so that it falls too). The other two count the answer alone, as in
        OpenAI's interface and in vLLM.
        """
        settings, logits_BV = self._settings, logits_BV.to(torch.float32)
        if settings.repetition_penalty != 1:
            penalty = settings.repetition_penalty
            lowered_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
            logits_BV = torch.where(self._seen_BV, lowered_BV, logits_BV)
        if settings.frequency_penalty != 0:
            logits_BV = logits_BV - settings.frequency_penalty * self._counts_BV
        if settings.presence_penalty != 0:
            logits_BV = logits_BV - settings.presence_penalty * (self._counts_BV > 0)
        return logits_BV
