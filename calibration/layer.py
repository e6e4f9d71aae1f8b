"""One decoder layer under calibration: take statistics, quantize, go on with the quantized weights; piece by piece.

The order is that of the computation: q, k, v; then, on what attention makes of the quantized ones, o; then the
feed-forward in the same way. So every weight is fitted to inputs as the quantized model will see them.

Shape letters: E experts, H hidden, I intermediate, K in, N out, R rows, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llama4_quant.calibration.cache_scales import CacheCalibration, largest_magnitudes, scales_of
from llama4_quant.calibration.decoder import DecoderMath, as_quantized_inputs, fast_matmul, swiglu
from llama4_quant.calibration.hessian import Moments
from llama4_quant.calibration.records import CacheScaleRecord
from llama4_quant.calibration.routing import Coverage, ExpertRows, Routing
from llama4_quant.calibration.rows import RowFile, row_chunks
from llama4_quant.calibration.streams import Sequences, StreamFiles, Streams
from llama4_quant.calibration.weights import Pair, Weights

_ATTENTION_ROWS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Some rows of a layer's inputs in both models; `original` is the same tensor where only one model runs."""

    quantized: Tensor
    original: Tensor


class LayerPass:
    """Calibrates one layer and writes the hidden states after it."""

    def __init__(
        self,
        layer: int,
        base: str,
        *,
        maths: DecoderMath,
        weights: Weights,
        files: StreamFiles,
        sequences: Sequences,
        coverage: Coverage,
        cache: CacheCalibration,
        done: Callable[[str, int], None],
    ) -> None:
        """Nothing is read yet.

        Args:
            layer: its number.
            base: what its weights' names start with.
            maths: the model's arithmetic.
            weights: the conversion's weights.
            files: for hidden states and what lives within a layer.
            sequences: where samples lie.
            coverage: what to do about experts that see few rows.
            cache: scales of an FP8 KV cache, if the conversion has one.
            done: called with a weight's name and the source bytes that are done now.
        """
        self._layer, self._base = layer, base
        self._maths, self._weights, self._files = maths, weights, files
        self._sequences, self._coverage, self._cache, self._done = sequences, coverage, cache, done
        self.cache: CacheScaleRecord | None = None
        self.rows_per_expert: tuple[int, ...] = ()
        self.rerouted: float | None = None

    def run(self, before: Streams, after: Streams) -> None:
        """Calibrate the layer on hidden states in front of it, and write those after it."""
        self._attend(before, after)
        if self._layer in self._maths.config.moe_layers:
            self._experts(after)
        else:
            self._dense(after)

    # Attention -------------------------------------------------------------------------------------------------------

    def _attend(self, before: Streams, after: Streams) -> None:
        """Hidden states before the layer -> hidden states after attention, in `after`."""
        config = self._maths.config
        names = [f"{self._base}.self_attn.{projection}_proj" for projection in "qkv"]
        gain = self._kept(f"{self._base}.input_layernorm.weight")
        biases = [self._bias(name) for name in names]
        width = config.num_attention_heads * config.head_dim

        def normed(rows: slice) -> Inputs:
            return self._both(before, rows, lambda x_RH: self._maths.norm(x_RH, gain))

        moments = self._moments(names[0], before.quantized.chunks(), normed)
        pairs = self._quantize(names, moments)
        self.cache = self._cache.scales(
            self._layer, lambda: self._cache_ranges(before, gain, [pairs[name] for name in names[1:]], biases[1:])
        )
        with self._scratch(before, "context", width) as context:
            for rows, length in self._sequences.batches(_ATTENTION_ROWS):
                inputs = normed(rows)
                for file, x_RH, side in self._sides(context, inputs):
                    x_RK = self._as_inputs(names[0], x_RH, side)
                    with fast_matmul(x_RK.device):
                        projected = [
                            functional.linear(x_RK, getattr(pairs[name], side), bias)
                            for name, bias in zip(names, biases, strict=True)
                        ]
                        scales = scales_of(self.cache) if side == "stored" else None
                        file.write(rows, self._maths.context(self._layer, projected, length, scales))
            self._write_to_residual(f"{self._base}.self_attn.o_proj", context, before, after)

    def _cache_ranges(
        self, before: Streams, gain: Tensor, pairs: Sequence[Pair], biases: Sequence[Tensor | None]
    ) -> tuple[float, float]:
        """Largest magnitudes of the quantized model's keys and values, as they are cached, over all tokens."""
        name = f"{self._base}.self_attn.k_proj"
        largest: list[Tensor] = []
        for rows, length in self._sequences.batches(_ATTENTION_ROWS):
            x_RH = self._as_inputs(name, self._maths.norm(before.quantized.read(rows), gain), "stored")
            with fast_matmul(x_RH.device):
                projected = [
                    functional.linear(x_RH, pair.stored, bias) for pair, bias in zip(pairs, biases, strict=True)
                ]
            largest.append(largest_magnitudes(self._maths.cached(self._layer, projected, length)))
        key, value = torch.stack(largest).amax(dim=0).tolist()
        return key, value

    # Dense feed-forward ----------------------------------------------------------------------------------------------

    def _dense(self, after: Streams) -> None:
        gain = self._kept(f"{self._base}.post_attention_layernorm.weight")
        base = f"{self._base}.feed_forward"

        def normed(rows: slice) -> Inputs:
            return self._both(after, rows, lambda x_RH: self._maths.norm(x_RH, gain))

        with self._scratch(after, "inner", self._maths.config.intermediate_size_mlp) as inner:
            self._gate_up(base, normed, inner)
            self._write_to_residual(f"{base}.down_proj", inner, after, after)

    def _gate_up(self, base: str, inputs: Callable[[slice], Inputs], inner: Streams) -> None:
        """Quantize gate and up of an MLP that all tokens take, and write what its down_proj gets."""
        names = [f"{base}.gate_proj", f"{base}.up_proj"]
        pairs = self._quantize(names, self._moments(names[0], inner.quantized.chunks(), inputs))
        for rows in inner.quantized.chunks():
            given = inputs(rows)
            for file, x_RH, side in self._sides(inner, given):
                file.write(rows, self._inner(names, pairs, x_RH, side))

    def _inner(self, names: Sequence[str], pairs: dict[str, Pair], x_RH: Tensor, side: str) -> Tensor:
        x_RK = self._as_inputs(names[0], x_RH, side)
        with fast_matmul(x_RK.device):
            gate_RI, up_RI = (functional.linear(x_RK, getattr(pairs[name], side)) for name in names)
        return swiglu(gate_RI, up_RI)

    # Mixture of experts ----------------------------------------------------------------------------------------------

    def _experts(self, after: Streams) -> None:
        """Shared expert first, then each routed expert on its own rows."""
        gain = self._kept(f"{self._base}.post_attention_layernorm.weight")
        base = f"{self._base}.feed_forward"
        config = self._maths.config
        with self._scratch(after, "normed", config.hidden_size) as normed:
            for rows in normed.quantized.chunks():
                given = self._both(after, rows, lambda x_RH: self._maths.norm(x_RH, gain))
                for file, x_RH, _ in self._sides(normed, given):
                    file.write(rows, x_RH)
            routing = self._route(normed)
            self.rows_per_expert, self.rerouted = routing.rows_per_expert, routing.rerouted
            with self._scratch(after, "inner", config.intermediate_size) as inner:
                self._gate_up(f"{base}.shared_expert", lambda rows: self._both(normed, rows), inner)
                self._write_to_residual(f"{base}.shared_expert.down_proj", inner, after, after)
            with self._files.scratch("wanted", config.hidden_size) as wanted:
                weights_T = self._remember_wanted(after, wanted)
                for expert in range(config.num_local_experts):
                    chosen = routing.of(expert, self._coverage)
                    self._expert(f"{base}.experts.{expert}", chosen, normed, after, (wanted, weights_T))

    def _route(self, normed: Streams) -> Routing:
        router_EH = self._kept(f"{self._base}.feed_forward.router")
        logits = [
            torch.cat([self._maths.route(file.read(rows), router_EH)[0] for rows in file.chunks()])
            for file in normed.both()
        ]
        return Routing.of_logits(logits[0], logits[-1], self._maths.config.num_experts_per_tok)

    def _remember_wanted(self, residual: Streams, wanted: RowFile) -> Tensor:
        """What `_wanted` says about every row before any routed expert has added to it: rows, and their weights [T]."""
        weights = []
        for rows in wanted.chunks():
            wanted_RH, weight_R = self._wanted(residual, rows)
            weights.append(weight_R)
            if wanted_RH is not None:
                wanted.write(rows, wanted_RH)
        return torch.cat(weights)

    def _expert(
        self, base: str, rows: ExpertRows, normed: Streams, after: Streams, remembered: tuple[RowFile, Tensor]
    ) -> None:
        """Quantize one expert, and add its outputs to the rows that are routed to it, in each model."""
        wanted, weights_T = remembered
        gate_up, down = [f"{base}.gate_proj", f"{base}.up_proj"], f"{base}.down_proj"
        drifts = normed.original is not None

        def scored(part: slice) -> Inputs:
            tokens = rows.fitted[part]
            quantized = normed.quantized.gather(tokens) * rows.quantized_scores[part].unsqueeze(-1)
            if normed.original is None:
                return Inputs(quantized=quantized, original=quantized)
            original = normed.original.gather(tokens) * rows.original_scores[part].unsqueeze(-1)
            return Inputs(quantized=quantized, original=original)

        chunks = list(row_chunks(len(rows.fitted), self._maths.config.intermediate_size))
        moments = Moments(self._maths.config.hidden_size, drift=drifts, device=rows.fitted.device)
        for part in chunks:
            self._add(moments, gate_up[0], scored(part), weight_R=rows.weights[part], num_prior=rows.num_prior(part))
        pairs = self._quantize(gate_up, moments, rows.total_prior)
        moments = Moments(
            self._maths.config.intermediate_size,
            num_outputs=self._maths.config.hidden_size,
            drift=drifts,
            device=rows.fitted.device,
        )
        for part in chunks:
            given = scored(part)
            inner = Inputs(
                quantized=self._inner(gate_up, pairs, given.quantized, "stored"),
                original=self._inner(gate_up, pairs, given.original, "original") if drifts else given.original,
            )
            tokens = rows.fitted[part]
            self._add(
                moments,
                down,
                inner,
                wanted.gather(tokens) if drifts else None,
                weight_R=weights_T[tokens] * rows.weights[part],
                num_prior=rows.num_prior(part),
            )
        pairs |= self._quantize([down], moments, rows.total_prior)
        self._add_outputs(after.quantized, normed.quantized, rows.quantized_tokens, rows.quantized_own, pairs, "stored")
        if after.original is not None and normed.original is not None:
            self._add_outputs(
                after.original, normed.original, rows.original_tokens, rows.original_own, pairs, "original"
            )

    def _add_outputs(
        self, residual: RowFile, normed: RowFile, tokens: Tensor, scores: Tensor, pairs: dict[str, Pair], side: str
    ) -> None:
        *gate_up, down = pairs
        for part in row_chunks(len(tokens), self._maths.config.intermediate_size):
            scored_RH = normed.gather(tokens[part]) * scores[part].unsqueeze(-1)
            inner_RI = self._as_inputs(down, self._inner(gate_up, pairs, scored_RH, side), side)
            with fast_matmul(inner_RI.device):
                y_RH = functional.linear(inner_RI, getattr(pairs[down], side))
            residual.scatter(tokens[part], residual.gather(tokens[part]) + y_RH)

    # What the pieces share -------------------------------------------------------------------------------------------

    def _write_to_residual(self, name: str, inputs: Streams, before: Streams, after: Streams) -> None:
        """Quantize a weight that writes to the residual stream, and add its outputs to `before`, giving `after`."""
        chunks = list(inputs.quantized.chunks())
        num_inputs, num_outputs = inputs.quantized.width, before.quantized.width
        device = self._weights.device
        moments = Moments(num_inputs, num_outputs=num_outputs, drift=inputs.original is not None, device=device)
        for rows in chunks:
            wanted, weight_R = self._wanted(before, rows)
            self._add(moments, name, self._both(inputs, rows), wanted, weight_R=weight_R)
        pair = self._quantize([name], moments)[name]
        bias = self._bias(name)
        for rows in chunks:
            given = self._both(inputs, rows)
            for (file, x_RK, side), source in zip(self._sides(after, given), before.both(), strict=True):
                with fast_matmul(x_RK.device):
                    y_RH = functional.linear(self._as_inputs(name, x_RK, side), getattr(pair, side), bias)
                file.write(rows, source.read(rows) + y_RH)

    def _wanted(self, residual: Streams, rows: slice) -> tuple[Tensor | None, Tensor]:
        """How the residual stream should move, and what an error in each row counts.

        The next norm divides by the root mean square of a row, so an error counts by its size relative to that.
        """
        read = [file.read(rows) for file in residual.both()]
        weight_R = 1.0 / read[-1].square().mean(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        return (read[1] - read[0] if len(read) == 2 else None), weight_R

    def _moments(self, name: str, chunks: Iterator[slice], inputs: Callable[[slice], Inputs]) -> Moments:
        width = self._maths.config.hidden_size
        moments = Moments(width, drift=self._files.with_original, device=self._weights.device)
        for rows in chunks:
            self._add(moments, name, inputs(rows))
        return moments

    def _add(
        self,
        moments: Moments,
        name: str,
        inputs: Inputs,
        wanted: Tensor | None = None,
        *,
        weight_R: Tensor | None = None,
        num_prior: int = 0,
    ) -> None:
        quantized = self._as_inputs(name, inputs.quantized, "stored")
        with fast_matmul(quantized.device):
            moments.add(quantized, inputs.original, wanted, weight_R, num_prior=num_prior)

    def _quantize(self, names: Sequence[str], moments: Moments, num_prior_rows: int = 0) -> dict[str, Pair]:
        pairs, num_bytes = self._weights.quantize(names, moments, num_prior_rows)
        self._done(names[0], num_bytes)
        return pairs

    def _as_inputs(self, name: str, x_RK: Tensor, side: str) -> Tensor:
        """Activations as the weight meets them; only stored weights round them."""
        return as_quantized_inputs(x_RK, self._weights.decision(name).scheme) if side == "stored" else x_RK

    def _kept(self, name: str) -> Tensor:
        """A weight that stays BF16, once it is written."""
        self._weights.keep(name)
        return self._weights.original(name)

    def _bias(self, name: str) -> Tensor | None:
        has_bias = self._maths.config.attention_bias and ".self_attn." in name
        return self._kept(f"{name}.bias") if has_bias else None

    def _both(self, streams: Streams, rows: slice, change: Callable[[Tensor], Tensor] = lambda x: x) -> Inputs:
        quantized = change(streams.quantized.read(rows))
        original = quantized if streams.original is None else change(streams.original.read(rows))
        return Inputs(quantized=quantized, original=original)

    @staticmethod
    def _sides(files: Streams, inputs: Inputs) -> Iterator[tuple[RowFile, Tensor, str]]:
        """Each model's file, its rows, and which weight of a Pair it uses."""
        yield files.quantized, inputs.quantized, "stored"
        if files.original is not None:
            yield files.original, inputs.original, "original"

    @contextmanager
    def _scratch(self, like: Streams, name: str, width: int) -> Iterator[Streams]:
        """Files within this layer, as many as the model runs."""
        with ExitStack() as files:
            opened = [
                files.enter_context(self._files.scratch(f"{name}-{number}", width))
                for number in range(len(like.both()))
            ]
            yield Streams(quantized=opened[0], original=opened[1] if len(opened) == 2 else None)
