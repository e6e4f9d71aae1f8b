"""The gradient at the last hidden states: of the log-likelihood of tokens drawn from the model's own distribution.

Logits are never held for the whole vocabulary (202,048 in Llama 4): the head passes twice in parts. The first pass
keeps, for each row, the running log-sum-exp and the best of logit + Gumbel noise, which is a draw from the softmax; the
second adds up the gradient.

Shape letters: H hidden, R rows, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from llama4_quant.calibration.originals import Originals
from llama4_quant.calibration.rows import RowFile, row_chunks
from llama4_quant.config import Llama4Config

HEAD_ELEMENTS = 1 << 25
"""Elements of the head in memory at a time: 128 MiB in float32."""


def write_final_gradient(hidden: RowFile, gradient: RowFile, originals: Originals, config: Llama4Config) -> None:
    """Write the gradient in front of the last norm.

    Args:
        hidden: rows behind the last layer.
        gradient: written.
        originals: the source.
        config: the model.
    """
    text = config.text
    name = "model.embed_tokens.weight" if text.tie_word_embeddings else "lm_head.weight"
    head = f"{config.prefix}{name}"
    gain_H = originals.original(f"{config.prefix}model.norm.weight")

    def normed(rows: slice) -> Tensor:
        return functional.rms_norm(hidden.read(rows), gain_H.shape, gain_H, text.rms_norm_eps)

    part_rows = min(text.vocab_size, HEAD_ELEMENTS // text.hidden_size)
    chunks = list(row_chunks(hidden.num_rows, max(text.hidden_size, part_rows)))
    total_R, drawn_R = _draw(normed, chunks, head, originals)
    for number, (part, weight_VH) in enumerate(originals.rows(head, HEAD_ELEMENTS)):
        for rows in chunks:
            logits_RV = normed(rows) @ weight_VH.T
            # d log p(drawn) / d logits, of which the sign does not matter: one-hot - p.
            change_RV = logits_RV.sub_(total_R[rows].unsqueeze(-1)).exp_().neg_()
            here_R = (drawn_R[rows] >= part.start) & (drawn_R[rows] < part.stop)
            places_R = torch.nonzero(here_R).squeeze(-1)
            change_RV[places_R, drawn_R[rows][places_R] - part.start] += 1
            added_RH = change_RV @ weight_VH
            gradient.write(rows, added_RH if not number else gradient.read(rows) + added_RH)
    for rows in chunks:
        x_RH = hidden.read(rows).requires_grad_()
        with torch.enable_grad():
            y_RH = functional.rms_norm(x_RH, gain_H.shape, gain_H, text.rms_norm_eps)
        gradient.write(rows, torch.autograd.grad(y_RH, x_RH, gradient.read(rows))[0])


def _draw(
    normed: Callable[[slice], Tensor], chunks: Sequence[slice], head: str, originals: Originals
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every row's logits, and a token drawn for it."""
    generator = torch.Generator().manual_seed(0)
    num_rows, device = chunks[-1].stop, originals.device
    total_R = torch.full((num_rows,), -torch.inf, device=device)
    best_R, drawn_R = total_R.clone(), torch.zeros(num_rows, dtype=torch.int64, device=device)
    for part, weight_VH in originals.rows(head, HEAD_ELEMENTS):
        for rows in chunks:
            logits_RV = normed(rows) @ weight_VH.T
            total_R[rows] = torch.logaddexp(total_R[rows], logits_RV.logsumexp(dim=-1))
            noise_RV = torch.empty(logits_RV.shape).exponential_(generator=generator).log_().to(device)
            found_R, places_R = (logits_RV - noise_RV).max(dim=-1)
            drawn_R[rows] = torch.where(found_R > best_R[rows], places_R + part.start, drawn_R[rows])
            best_R[rows] = torch.maximum(best_R[rows], found_R)
    return total_R, drawn_R
