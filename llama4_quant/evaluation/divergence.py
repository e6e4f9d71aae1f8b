"""How far a model's predictions are from a reference's: the KL divergence per token, and agreement of the best token.

KL(reference || model) = sum over v of p(v) (log p(v) - log q(v)) is the mean number of nats that the model's
predictions cost when tokens come from the reference. Unlike perplexity it does not need the text to be typical of
anything, and its noise is far below that of a difference of perplexities.

Shape letters: T positions, V vocabulary.
"""

import torch
from torch import Tensor

from llama4_quant.evaluation.perplexity import chunks


def token_divergences(logits_TV: Tensor, reference_TV: Tensor) -> Tensor:
    """KL(reference || model) at every position, over the whole vocabulary, in float64.

    Equal logits give exactly 0. A token that the reference excludes (logit -inf) contributes nothing.

    Args:
        logits_TV: [T, V], any floating dtype.
        reference_TV: [T, V], on the same device.

    Returns:
        [T] float64, nats.
    """
    divergences = []
    for logits, reference in zip(chunks(logits_TV), chunks(reference_TV), strict=True):
        log_q = logits.to(torch.float64).log_softmax(dim=-1)
        log_p = reference.to(torch.float64).log_softmax(dim=-1)
        p = log_p.exp()
        divergences.append(torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1))
    return torch.cat(divergences)


def token_agreements(logits_TV: Tensor, reference_TV: Tensor) -> Tensor:
    """Whether both hold the same token for the most probable; [T] bool. Of equal logits the first counts."""
    return logits_TV.argmax(dim=-1) == reference_TV.argmax(dim=-1)
