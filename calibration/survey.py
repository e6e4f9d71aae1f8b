"""How much each weight's error matters: one streamed pass forwards and one backwards through the original model.

Forwards, the hidden states in front of every layer are kept in files. Backwards, the gradient of the log-likelihood of
drawn tokens (final_gradient.py) goes from the last layer to the first; a layer's activations are computed again, and at
each weight the sums are taken that predict what storing it in some scheme will cost (sensitivity.py). Of weights one
expert, or one layer's attention, is in memory at a time; an expert sees the rows that are routed to it, times their
scores, and the gradient passes through the scores too.

Shape letters: E experts, H hidden, I intermediate, K in, N out, R rows, T tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from llama4_quant.calibration.decoder import DecoderMath, fast_matmul, swiglu
from llama4_quant.calibration.final_gradient import write_final_gradient
from llama4_quant.calibration.originals import Originals
from llama4_quant.calibration.rerouting import Rerouting
from llama4_quant.calibration.rows import RowFile, row_chunks
from llama4_quant.calibration.sensitivity import InputSums, predicted_kl
from llama4_quant.calibration.streams import Sequences
from llama4_quant.config import Llama4Config
from llama4_quant.scheme import WeightScheme

_ATTENTION_ROWS = 4096


class Survey:
    """One survey of one model.

    Attributes:
        predicted: by unit, the KL in nats per token that each of its candidates is predicted to cost.
    """

    def __init__(
        self,
        config: Llama4Config,
        originals: Originals,
        sequences: Sequences,
        folder: Path,
        *,
        unit_of: Mapping[str, str],
        candidates: Mapping[str, Sequence[WeightScheme]],
        done: Callable[[str], None],
    ) -> None:
        """Nothing is read yet.

        Args:
            config: the model.
            originals: its weights.
            sequences: where samples lie.
            folder: for hidden states; files have no name there, so that nothing is left of them, however this ends.
            unit_of: by weight, which weights it shares its scheme with; weights that are not in it are left out.
            candidates: by unit, the schemes to look at.
            done: called with what has been done.
        """
        self._config, self._originals, self._sequences, self._folder = config, originals, sequences, folder
        self._unit_of, self._candidates, self._done = unit_of, candidates, done
        self._maths = DecoderMath(config.text, originals.device)
        self.predicted = {unit: [0.0] * len(schemes) for unit, schemes in candidates.items()}

    def run(self, embed: Callable[[RowFile], None]) -> None:
        """Fill `predicted`; `embed` writes the embeddings of all tokens."""
        num_layers = self._config.text.num_hidden_layers
        with ExitStack() as files:
            hidden = [files.enter_context(self._file(f"hidden-{layer}")) for layer in range(num_layers + 1)]
            gradient, mid, total = (files.enter_context(self._file(name)) for name in ("gradient", "mid", "total"))
            embed(hidden[0])
            for layer in range(num_layers):
                with fast_matmul(self._originals.device):
                    self._attention_forward(layer, hidden[layer], hidden[layer + 1])
                    self._feed_forward_forward(layer, hidden[layer + 1])
                self._done(f"survey: layer {layer} forwards")
            write_final_gradient(hidden[-1], gradient, self._originals, self._config)
            for layer in reversed(range(num_layers)):
                with fast_matmul(self._originals.device):
                    self._attention_forward(layer, hidden[layer], mid)
                self._feed_forward_backward(layer, mid, gradient, total)
                self._attention_backward(layer, hidden[layer], total, gradient)
                self._done(f"survey: layer {layer} backwards")

    # Attention -------------------------------------------------------------------------------------------------------

    def _attention_forward(self, layer: int, before: RowFile, after: RowFile) -> None:
        weights, biases, gain_H = self._attention_weights(layer)
        for rows, length in self._sequences.batches(_ATTENTION_ROWS):
            x_RH = before.read(rows)
            *_, y_RH = self._attend(layer, weights, biases, self._maths.norm(x_RH, gain_H), length)
            after.write(rows, x_RH + y_RH)

    def _attention_backward(self, layer: int, before: RowFile, given: RowFile, gradient: RowFile) -> None:
        """From the gradient after attention, `given`, to the one before the layer."""
        weights, biases, gain_H = self._attention_weights(layer)
        *qkv, out = weights
        device = self._originals.device
        inputs = InputSums(self._config.text.hidden_size, device)
        contexts = InputSums(weights[out].shape[1], device)
        for rows, length in self._sequences.batches(_ATTENTION_ROWS):
            x_RH, given_RH = before.read(rows).requires_grad_(), given.read(rows)
            with torch.enable_grad(), fast_matmul(device):
                normed_RH = self._maths.norm(x_RH, gain_H)
                projected, context_RK, y_RH = self._attend(layer, weights, biases, normed_RH, length)
                passed_RH, *gradients = torch.autograd.grad(y_RH, [x_RH, *projected], given_RH)
            gradient.write(rows, given_RH + passed_RH)
            inputs.add(normed_RH.detach(), dict(zip(qkv, gradients, strict=True)), weights)
            contexts.add(context_RK.detach(), {out: given_RH}, weights)
        self._predict({name: weights[name] for name in qkv}, inputs)
        self._predict({out: weights[out]}, contexts)

    def _attention_weights(self, layer: int) -> tuple[dict[str, Tensor], list[Tensor | None], Tensor]:
        base = self._base(layer)
        names = [f"{base}.self_attn.{projection}_proj" for projection in "qkvo"]
        has_bias = self._config.text.attention_bias
        biases = [self._originals.original(f"{name}.bias") if has_bias else None for name in names]
        gain_H = self._originals.original(f"{base}.input_layernorm.weight")
        return {name: self._originals.original(name) for name in names}, biases, gain_H

    def _attend(
        self, layer: int, weights: Mapping[str, Tensor], biases: Sequence[Tensor | None], x_RH: Tensor, length: int
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Queries, keys and values; what attention makes of them; and what goes to the residual stream."""
        *qkv, out = weights.values()
        projected = [functional.linear(x_RH, w, bias) for w, bias in zip(qkv, biases[:-1], strict=True)]
        context_RK = self._maths.context(layer, projected, length)
        return projected, context_RK, functional.linear(context_RK, out, biases[-1])

    # Feed-forward ----------------------------------------------------------------------------------------------------

    def _feed_forward_forward(self, layer: int, hidden: RowFile) -> None:
        """Add a layer's feed-forward to hidden states after its attention."""
        gain_H = self._originals.original(f"{self._base(layer)}.post_attention_layernorm.weight")
        with self._file("added") as added:
            for rows in hidden.chunks():
                added.write(rows, hidden.read(rows))
            for base, tokens, router_H in self._mlps(layer, hidden, gain_H):
                weights = self._mlp_weights(base)
                for part in row_chunks(len(tokens), self._widest(weights)):
                    x_RH = self._scored(hidden.gather(tokens[part]), gain_H, router_H)
                    *_, y_RH = _mlp(weights, x_RH)
                    added.scatter(tokens[part], added.gather(tokens[part]) + y_RH)
            for rows in hidden.chunks():
                hidden.write(rows, added.read(rows))

    def _feed_forward_backward(self, layer: int, mid: RowFile, given: RowFile, total: RowFile) -> None:
        """From the gradient after the layer, `given`, to the one after its attention, `total`."""
        gain_H = self._originals.original(f"{self._base(layer)}.post_attention_layernorm.weight")
        for rows in given.chunks():
            total.write(rows, given.read(rows))
        rerouting = self._rerouting(layer, mid, gain_H)
        for base, tokens, router_H in self._mlps(layer, mid, gain_H):
            weights = self._mlp_weights(base)
            self._mlp_backward(weights, tokens, router_H, gain_H, (mid, given, total))
            if rerouting is not None and router_H is not None:
                expert = int(base.rpartition(".")[2])
                places = rerouting.places(expert)
                for part in row_chunks(len(places), self._widest(weights)):
                    swapped = rerouting.tokens[places[part]]
                    *_, y_RH = _mlp(weights, self._scored(mid.gather(swapped), gain_H, router_H))
                    rerouting.add(expert, places[part], y_RH, given.gather(swapped))
        if rerouting is not None:
            self._reroute(layer, rerouting, gain_H, mid, total)

    def _mlp_backward(
        self,
        weights: dict[str, Tensor],
        tokens: Tensor,
        router_H: Tensor | None,
        gain_H: Tensor,
        files: tuple[RowFile, RowFile, RowFile],
    ) -> None:
        """One MLP's part of the gradient, and its predictions; files as of `_feed_forward_backward`."""
        mid, given, total = files
        gate, up, down = weights
        device = self._originals.device
        inputs, inner = InputSums(self._config.text.hidden_size, device), InputSums(weights[down].shape[1], device)
        for part in row_chunks(len(tokens), self._widest(weights)):
            mid_RH, given_RH = mid.gather(tokens[part]).requires_grad_(), given.gather(tokens[part])
            with torch.enable_grad(), fast_matmul(device):
                x_RH = self._scored(mid_RH, gain_H, router_H)
                gate_RI, up_RI, inner_RI, y_RH = _mlp(weights, x_RH)
                passed_RH, *gradients = torch.autograd.grad(y_RH, [mid_RH, gate_RI, up_RI], given_RH)
            total.scatter(tokens[part], total.gather(tokens[part]) + passed_RH)
            inputs.add(x_RH.detach(), dict(zip((gate, up), gradients, strict=True)), weights)
            inner.add(inner_RI.detach(), {down: given_RH}, weights)
        self._predict({name: weights[name] for name in (gate, up)}, inputs)
        self._predict({down: weights[down]}, inner)

    def _rerouting(self, layer: int, mid: RowFile, gain_H: Tensor) -> Rerouting | None:
        if layer not in self._config.text.moe_layers:
            return None
        router_EH = self._originals.original(f"{self._base(layer)}.feed_forward.router")
        logits = [self._logits(mid.read(rows), gain_H, router_EH) for rows in mid.chunks()]
        return Rerouting(torch.cat(logits), self._config.text.num_experts_per_tok)

    def _reroute(self, layer: int, rerouting: Rerouting, gain_H: Tensor, mid: RowFile, total: RowFile) -> None:
        """Add the gradient of what another choice of experts would cost."""
        router_EH = self._originals.original(f"{self._base(layer)}.feed_forward.router")
        given_RH = rerouting.gradients(router_EH, torch.Generator().manual_seed(layer))
        for part in row_chunks(len(rerouting.tokens), self._config.text.hidden_size):
            tokens = rerouting.tokens[part]
            mid_RH = mid.gather(tokens).requires_grad_()
            with torch.enable_grad():
                x_RH = self._maths.norm(mid_RH, gain_H)
            (passed_RH,) = torch.autograd.grad(x_RH, mid_RH, given_RH[part])
            total.scatter(tokens, total.gather(tokens) + passed_RH)

    def _mlps(self, layer: int, mid: RowFile, gain_H: Tensor) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """A layer's MLPs: name, the tokens that take it, and the row of the router that scores them."""
        base = f"{self._base(layer)}.feed_forward"
        text = self._config.text
        all_T = torch.arange(mid.num_rows, device=self._originals.device)
        if layer not in text.moe_layers:
            yield base, all_T, None
            return
        yield f"{base}.shared_expert", all_T, None
        router_EH = self._originals.original(f"{base}.router")
        chosen_Tk = torch.cat(
            [
                self._logits(mid.read(rows), gain_H, router_EH).topk(text.num_experts_per_tok).indices
                for rows in mid.chunks()
            ]
        )
        for expert in range(text.num_local_experts):
            tokens = torch.nonzero((chosen_Tk == expert).any(dim=-1)).squeeze(-1)
            if len(tokens):
                yield f"{base}.experts.{expert}", tokens, router_EH[expert]

    def _logits(self, mid_RH: Tensor, gain_H: Tensor, router_EH: Tensor) -> Tensor:
        return functional.linear(self._maths.norm(mid_RH, gain_H), router_EH)

    def _scored(self, mid_RH: Tensor, gain_H: Tensor, router_H: Tensor | None) -> Tensor:
        """What an MLP gets; routed experts get it times their score."""
        x_RH = self._maths.norm(mid_RH, gain_H)
        return x_RH if router_H is None else x_RH * (x_RH @ router_H).sigmoid().unsqueeze(-1)

    def _mlp_weights(self, base: str) -> dict[str, Tensor]:
        names = [f"{base}.{projection}_proj" for projection in ("gate", "up", "down")]
        return {name: self._originals.original(name) for name in names}

    # What the pieces share -------------------------------------------------------------------------------------------

    def _predict(self, weights: Mapping[str, Tensor], sums: InputSums) -> None:
        """Add what weights on one input cost to their unit's predictions."""
        asked = {name: weight for name, weight in weights.items() if name in self._unit_of}
        for unit in dict.fromkeys(self._unit_of[name] for name in asked):
            members = {name: weight for name, weight in asked.items() if self._unit_of[name] == unit}
            costs = predicted_kl(members, sums, self._candidates[unit], self._sequences.num_rows)
            self.predicted[unit] = [a + b for a, b in zip(self.predicted[unit], costs, strict=True)]

    @staticmethod
    def _widest(weights: Mapping[str, Tensor]) -> int:
        return max(max(weight.shape) for weight in weights.values())

    def _base(self, layer: int) -> str:
        return f"{self._config.prefix}model.layers.{layer}"

    def _file(self, name: str) -> RowFile:
        file = RowFile(
            self._folder / f"{name}.rows",
            self._sequences.num_rows,
            self._config.text.hidden_size,
            self._originals.device,
        )
        file.path.unlink()
        return file


def _mlp(weights: Mapping[str, Tensor], x_RH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of gate and up, what down gets, and its output."""
    gate_IH, up_IH, down_HI = weights.values()
    gate_RI, up_RI = functional.linear(x_RH, gate_IH), functional.linear(x_RH, up_IH)
    inner_RI = swiglu(gate_RI, up_RI)
    return gate_RI, up_RI, inner_RI, functional.linear(inner_RI, down_HI)
