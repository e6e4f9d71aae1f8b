"""The model as it is trained: transformers' Llama 4 whose mixtures do only the routed work.

transformers sends every token through every expert, most of them as rows of zeros: eight times the arithmetic here.
`RoutedFeedForward` holds the same parameters under the same names, sorts tokens by expert, and remembers a
load-balancing loss. The saved weights are those of the unmodified model.

Legend: T tokens, E experts, H hidden, I intermediate.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Llama4Config, Llama4ForConditionalGeneration

IGNORED = -100
"""Label of a position that is not learned."""


class RoutedFeedForward(nn.Module):
    """A Llama 4 mixture (top-1 routed experts plus a shared one) that does T rows of expert work for T tokens."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.experts: Any = moe.experts
        self.router: Any = moe.router
        self.shared_expert: Any = moe.shared_expert
        self.balance_loss: Tensor | None = None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [T, H] and the router logits [T, E]; keep the balance loss of this call."""
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        logits_TE = functional.linear(x_TH, self.router.weight)
        top_T, expert_T = logits_TE.max(dim=-1)
        order_T = expert_T.argsort(stable=True)
        counts_E = torch.bincount(expert_T, minlength=logits_TE.shape[-1])
        # The score multiplies the expert's input, before the non-linearity: Llama 4's routing.
        scored_TH = (x_TH * torch.sigmoid(top_T.float()).to(x_TH.dtype)[:, None])[order_T]
        routed_TH = self._experts(scored_TH, counts_E.tolist())
        self.balance_loss = balance_loss(logits_TE, counts_E)
        return self.shared_expert(x_TH) + routed_TH[order_T.argsort()], logits_TE

    def _experts(self, sorted_TH: Tensor, counts: list[int]) -> Tensor:
        parts = []
        for expert, rows_TH in enumerate(torch.split(sorted_TH, counts)):
            gate_TI, up_TI = (rows_TH @ self.experts.gate_up_proj[expert]).chunk(2, dim=-1)
            parts.append((functional.silu(gate_TI) * up_TI) @ self.experts.down_proj[expert])
        return torch.cat(parts)


def balance_loss(logits_TE: Tensor, counts_E: Tensor) -> Tensor:
    """Load-balancing loss of the Switch Transformer (Fedus et al., 2021, equation 4); 1 when perfectly even."""
    share_E = counts_E.to(logits_TE.dtype) / logits_TE.shape[0]
    return logits_TE.shape[-1] * (share_E * logits_TE.softmax(dim=-1).mean(dim=0)).sum()


class TrainingModel:
    """transformers' Llama 4 with `RoutedFeedForward` mixtures, which keep their parameters' names.

    So the state dict is that of the unmodified model. Several of these can share one set of parameters and run in
    different threads.
    """

    def __init__(self, config: Llama4Config) -> None:
        self.llama = Llama4ForConditionalGeneration(config).float().train()
        for layer in self.llama.language_model.model.layers:
            if layer.is_moe_layer:
                layer.feed_forward = RoutedFeedForward(layer.feed_forward)
        self.parameters: list[nn.Parameter] = list(self.llama.parameters())

    def share_parameters_of(self, other: "TrainingModel") -> None:
        """Use the parameters of another model in place of one's own."""
        self.llama.load_state_dict(other.llama.state_dict(keep_vars=True), assign=True)
        self.parameters = other.parameters

    def losses(self, ids_BL: Tensor, labels_BL: Tensor, pixels_NCSS: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the cross entropy in nats per token, and the balance loss summed over the mixtures."""
        logits_BLV = self.llama(input_ids=ids_BL, pixel_values=pixels_NCSS, use_cache=False).logits
        loss = functional.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORED)
        mixtures = [m for m in self.llama.modules() if isinstance(m, RoutedFeedForward)]
        return loss, torch.stack([m.balance_loss for m in mixtures if m.balance_loss is not None]).sum()
