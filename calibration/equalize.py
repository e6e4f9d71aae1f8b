"""Powers of two moved between weights that follow each other, so that the columns of int4 weights are about alike.

A group of int4 weights shares one scale, and an outlier column makes it too coarse for all others. Three places let a
factor move from a weight's columns into what makes its inputs, without changing what the model computes:

    input_layernorm gain -> q, k, v                         gain / a,  W diag(a)
    post_attention_layernorm gain -> router, gate, up       the same, for all experts of the layer together
    v rows -> o columns, up rows -> down columns            diag(b) W,  W' / diag(b)

Rows of an int4 or FP8 weight have scales of their own, so scaling them costs nothing; and factors that are powers of
two change no bit of a mantissa: the model with equalized BF16 weights gives the same numbers, bit for bit. Factors are
the inverse norms of the columns, rounded to powers of two (from weights only; like the weight part of SmoothQuant's and
AWQ's scales, arXiv 2211.10438, 2306.00978).

They follow from the source and the plan alone, so that they can be computed again by whoever needs them: by a resumed
conversion, and by `verify`.

Shape letters: D head dimension, G key-value heads, H hidden, I intermediate, K in, N out, Q query heads.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.planning.plan import Plan
from llama4_quant.scheme import SchemeLookup, WeightType

MAX_EXPONENT = 12
_ROWS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """Powers of two for one weight; None is 1.

    Attributes:
        inputs: multiplies columns, float32 [K].
        outputs: multiplies rows, float32 [N]; of a norm's gain its elements.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def apply(self, values: Tensor, row_start: int = 0) -> Tensor:
        """Some rows of the weight ([rows, K], or elements [rows] of a gain), equalized; exact in every float dtype."""
        if self.outputs is not None:
            rows = self.outputs[row_start : row_start + len(values)].to(values)
            values = values * (rows if values.dim() == 1 else rows.unsqueeze(-1))
        return values if self.inputs is None else values * self.inputs.to(values)


_NONE = Factors()


class Equalizer:
    """Computes factors layer by layer, and remembers those of one layer."""

    def __init__(self, plan: Plan, scheme_of: SchemeLookup, reader: CheckpointReader) -> None:
        """Nothing is read yet.

        Args:
            plan: of the source's weights.
            scheme_of: how each linear weight of the output is stored.
            reader: the source.
        """
        self._config, self._reader, self._scheme_of = plan.config, reader, scheme_of
        self._decisions = {decision.name: decision for decision in plan.decisions}
        self._layer: int | None = None
        self._found: dict[str, Factors] = {}

    def factors(self, name: str) -> Factors:
        """The factors of a weight, bias or norm gain, by the name that the plan has for it."""
        decision = self._decisions[name]
        if decision.layer is None or not name.startswith(f"{self._config.prefix}model.layers."):
            return _NONE
        if decision.layer != self._layer:
            self._found = dict(self._of_layer(decision.layer))
            self._layer = decision.layer
        return self._found.get(name, _NONE)

    def _of_layer(self, layer: int) -> Iterator[tuple[str, Factors]]:
        base = f"{self._config.prefix}model.layers.{layer}"
        found: dict[str, Factors] = {}
        for name, factors in (*self._attention(base), *self._feed_forward(base, layer)):
            earlier = found.get(name, _NONE)
            found[name] = Factors(
                inputs=factors.inputs if earlier.inputs is None else earlier.inputs,
                outputs=factors.outputs if earlier.outputs is None else earlier.outputs,
            )
        yield from found.items()

    def _attention(self, base: str) -> Iterator[tuple[str, Factors]]:
        projections = [f"{base}.self_attn.{letter}_proj" for letter in "qkv"]
        yield from self._norm(f"{base}.input_layernorm.weight", [[name] for name in projections])
        values, outputs = projections[2], f"{base}.self_attn.o_proj"
        if self._is_int4(outputs) and self._is_quantized(values):
            text = self._config.text
            energy_GD = self._column_energy([outputs]).view(text.num_key_value_heads, -1, text.head_dim).sum(dim=1)
            factors_GD = _inverse_norms(energy_GD.flatten()).view(energy_GD.shape)
            queries_per_key = text.num_attention_heads // text.num_key_value_heads
            columns = factors_GD.repeat_interleave(queries_per_key, dim=0).flatten()
            for name in (values, f"{values}.bias") if text.attention_bias else (values,):
                yield name, Factors(outputs=1 / factors_GD.flatten())
            yield outputs, Factors(inputs=columns)

    def _feed_forward(self, base: str, layer: int) -> Iterator[tuple[str, Factors]]:
        norm, base = f"{base}.post_attention_layernorm.weight", f"{base}.feed_forward"
        if layer in self._config.text.moe_layers:
            experts = [f"{base}.experts.{expert}" for expert in range(self._config.text.num_local_experts)]
            mlps, others = [f"{base}.shared_expert", *experts], [f"{base}.router"]
        else:
            mlps, others = [base], []
        yield from self._norm(norm, [[f"{mlp}.gate_proj", f"{mlp}.up_proj"] for mlp in mlps], others)
        for mlp in mlps:
            up, down = f"{mlp}.up_proj", f"{mlp}.down_proj"
            if self._is_int4(down) and self._is_quantized(up):
                columns = _inverse_norms(self._column_energy([down]))
                yield up, Factors(outputs=1 / columns)
                yield down, Factors(inputs=columns)

    def _norm(self, norm: str, groups: list[list[str]], others: Iterable[str] = ()) -> Iterator[tuple[str, Factors]]:
        """A norm, groups of linear weights that decide about its factors, and weights that just have to follow."""
        followers = [name for group in groups for name in group]
        if not all(self._is_int4(name) for name in followers):
            return
        energy_K = torch.zeros(self._config.text.hidden_size, dtype=torch.float64)
        for group in groups:
            energy_K += self._column_energy(group)
        columns = _inverse_norms(energy_K)
        yield norm, Factors(outputs=1 / columns)
        for name in (*followers, *others):
            yield name, Factors(inputs=columns)

    def _column_energy(self, group: Sequence[str]) -> Tensor:
        """Sum of squares of each column, of rows that are scaled to norm 1: float64 [K].

        Args:
            group: weights that share their inputs; of a routed expert all weights that one tensor holds.
        """
        linears = [linear for name in group if (linear := self._decisions[name].linear)]
        first = linears[0]
        if first.expert is not None:  # [in, out] of all of them, read once
            stored_KN = self._reader.read_slice(first.source, first.expert, 0, first.in_features)
            return _row_normalized_energy(stored_KN.T)
        return torch.stack([_row_normalized_energy(self._reader.read(linear.source)) for linear in linears]).sum(dim=0)

    def _is_int4(self, name: str) -> bool:
        scheme = self._scheme_of(name)
        return scheme is not None and scheme.type is WeightType.INT4

    def _is_quantized(self, name: str) -> bool:
        return self._scheme_of(name) is not None


def _row_normalized_energy(weight_NK: Tensor) -> Tensor:
    energy_K = torch.zeros(weight_NK.shape[1], dtype=torch.float64)
    for start in range(0, len(weight_NK), _ROWS):
        squares = weight_NK[start : start + _ROWS].double().square()
        energy_K += squares.div_(squares.sum(dim=1, keepdim=True).clamp(min=1e-300)).sum(dim=0)
    return energy_K


def _inverse_norms(energy_K: Tensor) -> Tensor:
    """1 / norm of each column, in parts of their geometric mean, as the nearest power of two: float32 [K]."""
    exponents_K = -0.5 * torch.log2(energy_K.clamp(min=float(energy_K.max()) * 2.0**-60 + 1e-300))
    exponents_K = (exponents_K - exponents_K.median()).round().clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return torch.exp2(exponents_K).to(torch.float32)
