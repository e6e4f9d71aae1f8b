"""The mixture-of-experts layer: route, sort, multiply each expert's own rows, put back.

`y = shared_expert(x) + sum over the k chosen experts e of expert_e(s_e * x)`, with `s_e = sigmoid(logit_e)`. The score
multiplies the expert's *input*: SwiGLU is not homogeneous, so scoring the output would be another function. T tokens
cost exactly T*k rows of expert work; an expert that nobody chose is not touched.

The experts of a layer are stacked per projection, [E, N, K], in the same bytes as on disk.

Shape letters: E experts, H hidden, I intermediate, K in, N out, R = T*k rows of expert work, T tokens, k experts per
token.
"""

import torch
from torch import Tensor, nn

from llama4_quant.config import TextConfig
from llama4_quant.ops import native_elementwise, native_tape
from llama4_quant.ops.native_tape import NotRecordableError, Tape
from llama4_quant.runtime.elementwise import Gate
from llama4_quant.runtime.linear import Builder, WeightStorage
from llama4_quant.runtime.offload import OffloadedExperts
from llama4_quant.scheme import WeightType


class DenseStack(WeightStorage):
    """`weight` [E, N, K] in the compute dtype."""

    weight: nn.Parameter

    def forward(self, x_RK: Tensor, rows_per_expert: Tensor) -> Tensor:
        """Rows sorted by expert -> [R, N]."""
        return self.call(x_RK, rows_per_expert, self.weight)


class Int4Stack(WeightStorage):
    """`weight_packed` int32 [E, N, ceil(K/8)] and `weight_scale` bf16 [E, N, G]."""

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter

    def forward(self, x_RK: Tensor, rows_per_expert: Tensor) -> Tensor:
        """Rows sorted by expert -> [R, N]."""
        return self.call(x_RK, rows_per_expert, self.weight_packed, self.weight_scale)


class Fp8Stack(WeightStorage):
    """`weight` e4m3 [E, N, K] and `weight_scale` fp32 [E, N, 1] or [E, ceil(N/128), ceil(K/128)]."""

    weight: nn.Parameter
    weight_scale: nn.Parameter

    def forward(self, x_RK: Tensor, rows_per_expert: Tensor) -> Tensor:
        """Rows sorted by expert -> [R, N]."""
        return self.call(x_RK, rows_per_expert, self.weight, self.weight_scale)


_STACKS: dict[WeightType | None, type[WeightStorage]] = {
    None: DenseStack,
    WeightType.INT4: Int4Stack,
    WeightType.FP8: Fp8Stack,
}


def make_stack(
    builder: Builder, projection: str, num_experts: int, out_features: int, in_features: int
) -> WeightStorage:
    """Uninitialized storage for one projection of all experts of a layer.

    Raises:
        SchemeError: the experts are not all stored the same way, or the scheme does not divide the inputs.
    """
    scheme = builder.common_scheme(projection, num_experts, in_features)
    kind = _STACKS[None if scheme is None else scheme.type]
    name = builder.child(projection).name
    return kind(builder, name, scheme, out_features, in_features, num_experts=num_experts)


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`; the dense layers' feed-forward, and the shared expert."""

    def __init__(self, builder: Builder, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = builder.linear("gate_proj", intermediate_size, hidden_size)
        self.up_proj = builder.linear("up_proj", intermediate_size, hidden_size)
        self.down_proj = builder.linear("down_proj", hidden_size, intermediate_size)
        self.gated = Gate(builder)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        y: Tensor = self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))
        return y

    def record(self, tape: Tape, x_1H: Tensor) -> Tensor:
        """`forward` of one token on a tape."""
        gate_1I, up_1I = self.gate_proj.record(tape, x_1H), self.up_proj.record(tape, x_1H)
        return self.down_proj.record(tape, self.gated.record(tape, gate_1I, up_1I))


class RoutedExperts(nn.Module):
    """The same SwiGLU for every routed expert, on rows sorted by expert."""

    def __init__(self, config: TextConfig, builder: Builder) -> None:
        super().__init__()
        experts, hidden, intermediate = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_proj = make_stack(builder, "gate_proj", experts, intermediate, hidden)
        self.up_proj = make_stack(builder, "up_proj", experts, intermediate, hidden)
        self.down_proj = make_stack(builder, "down_proj", experts, hidden, intermediate)
        self.gated = Gate(builder)

    def forward(self, x_RH: Tensor, rows_per_expert: Tensor) -> Tensor:
        """[R, H] sorted by expert, [E] -> [R, H] in the same order."""
        inner_RI = self.gated(self.gate_proj(x_RH, rows_per_expert), self.up_proj(x_RH, rows_per_expert))
        y_RH: Tensor = self.down_proj(inner_RI, rows_per_expert)
        return y_RH

    def record(self, tape: Tape, x_1H: Tensor, rows_per_expert: Tensor) -> Tensor:
        """`forward` of one row on a tape."""
        gate_1I, up_1I = (proj.record(tape, x_1H, rows_per_expert) for proj in (self.gate_proj, self.up_proj))
        return self.down_proj.record(tape, self.gated.record(tape, gate_1I, up_1I), rows_per_expert)


class MixtureOfExperts(nn.Module):
    """Router, routed experts and the shared expert that every token takes."""

    def __init__(self, config: TextConfig, builder: Builder) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        self.experts_per_token = config.num_experts_per_tok
        self.router = builder.linear("router", config.num_local_experts, config.hidden_size)
        experts = builder.child("experts")
        self.experts = OffloadedExperts(config, experts) if builder.offload_experts else RoutedExperts(config, experts)
        self.shared_expert = MLP(builder.child("shared_expert"), config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        x_TH = x.flatten(0, -2)
        y_TH: Tensor = self.shared_expert(x_TH) + self._routed(x_TH)
        return y_TH.view(x.shape)

    def record(self, tape: Tape, x_1H: Tensor) -> Tensor:
        """`forward` of one token on a tape.

        Raises:
            NotRecordableError: a token has several experts, or they are in the file.
        """
        if self.experts_per_token != 1 or not isinstance(self.experts, RoutedExperts):
            raise NotRecordableError("only a single expert for each token, in memory, can be recorded")
        shared_1H = self.shared_expert.record(tape, x_1H)
        rows_per_expert, scored_1H = native_tape.record_route(tape, self.router.record(tape, x_1H), x_1H)
        native_elementwise.record_add(tape, shared_1H, self.experts.record(tape, scored_1H, rows_per_expert))
        return shared_1H

    def _routed(self, x_TH: Tensor) -> Tensor:
        experts_R, scores_R = self._route(x_TH)
        rows_per_expert = _count(experts_R, self.num_experts)
        if experts_R.shape[0] == 1:  # one token, one expert: nothing to sort
            y_TH: Tensor = self.experts(x_TH * scores_R.unsqueeze(-1), rows_per_expert)
            return y_TH
        order_R = experts_R.argsort(stable=True)
        sorted_RH = x_TH[order_R // self.experts_per_token] * scores_R[order_R].unsqueeze(-1)
        y_sorted_RH = self.experts(sorted_RH, rows_per_expert)
        y_RH = torch.empty_like(y_sorted_RH)
        y_RH[order_R] = y_sorted_RH
        if self.experts_per_token == 1:
            return y_RH
        return y_RH.view(x_TH.shape[0], self.experts_per_token, -1).sum(dim=1)

    def _route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Expert and score of each of a token's k rows: row t*k + i is token t's i-th choice."""
        logits_TE: Tensor = self.router(x_TH)
        # In bf16 one token of some hundred has two largest logits; which of them counts is as in transformers.
        top_Tk, experts_Tk = logits_TE.topk(self.experts_per_token, dim=-1)
        # The sigmoid is taken in fp32, then rounded: a bf16 sigmoid would lose digits of the score.
        scores_Tk = top_Tk.float().sigmoid().to(logits_TE.dtype)
        return experts_Tk.flatten(), scores_Tk.flatten()


def _count(experts_R: Tensor, num_experts: int) -> Tensor:
    """How many rows each expert has: [E] int64."""
    # Not `bincount`: the size of its result may vary, which breaks a compiled graph.
    counts_E = experts_R.new_zeros(num_experts)
    return counts_E.scatter_add_(0, experts_R, torch.ones_like(experts_R))
