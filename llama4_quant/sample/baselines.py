"""Count-based language models, the yardstick for the sample's perplexity.

Both see the same training tokens as the model and are scored on the same held-out tokens.

Legend: B windows, L positions, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ADDED = 0.1
# The interpolation weight is picked on the held-out text itself: that favours the baseline, never the model.
_WEIGHTS = tuple(step / 20 for step in range(1, 20))


@dataclass(frozen=True, kw_only=True, slots=True)
class Baselines:
    """Perplexities (per token) of the count-based models."""

    unigram: float
    bigram: float


def score(train: Tensor, windows_BL: Tensor, *, vocab_size: int) -> Baselines:
    """Score both models.

    Args:
        train: int64 [T], the training tokens in order.
        windows_BL: int64 [B, L]; every token but the first of a window is predicted.
        vocab_size: number of different tokens.

    Returns:
        Perplexity of a unigram model (add-k smoothed) and of a bigram model interpolated with it.
    """
    counts_V = torch.bincount(train, minlength=vocab_size).double()
    unigram_V = (counts_V + _ADDED) / (counts_V + _ADDED).sum()
    pairs = torch.bincount(train[:-1] * vocab_size + train[1:], minlength=vocab_size**2).view(vocab_size, vocab_size)
    before, after = windows_BL[:, :-1].reshape(-1), windows_BL[:, 1:].reshape(-1)
    seen = pairs[before].sum(dim=-1).double().clamp(min=1)
    conditional = pairs[before, after].double() / seen
    bigrams = [_perplexity(weight * conditional + (1 - weight) * unigram_V[after]) for weight in _WEIGHTS]
    return Baselines(unigram=_perplexity(unigram_V[after]), bigram=min(bigrams))


def _perplexity(probabilities: Tensor) -> float:
    return math.exp(-probabilities.log().mean().item())
