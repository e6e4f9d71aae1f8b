"""How surprised a model is by a text: negative log-likelihood per token, in nats.

Shape letters: T scored tokens, V vocabulary.
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Logits that are widened to float64 at a time: 32 MiB."""


def token_losses(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """-log p(target), computed in float64 a few positions at a time.

    Args:
        logits_TV: [T, V], any floating dtype.
        targets_T: [T] int64, the token that came after each position.

    Returns:
        [T] float64, nats.
    """
    losses = []
    for logits, targets in zip(chunks(logits_TV), chunks(targets_T, like=logits_TV), strict=True):
        wide = logits.to(torch.float64)
        losses.append(wide.logsumexp(dim=-1) - wide.gather(1, targets[:, None]).squeeze(1))
    return torch.cat(losses)


def chunks(values: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split along positions so that a chunk of `like` (of `values` itself) has about CHUNK_ELEMENTS elements."""
    num_columns = (values if like is None else like).shape[-1]
    return torch.split(values, max(1, CHUNK_ELEMENTS // num_columns))
