"""One decoder layer under calibration: take statistics, quantize, go on with the quantized weights; piece by piece.

The order is that of the computation: q, k, v; then, on what attention makes of the quantized ones, o; then the
feed-forward in the same way. So every weight is fitted to inputs as the quantized model will see them.

Shape letters: E experts, H hidden, I intermediate, K in, N out, R rows, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llama4_quant.calibration.cache_scales import CacheCalibration, largest_magnitudes, scales_of
from llama4_quant.calibration.decoder import DecoderMath, as_quantized_inputs, fast_matmul, swiglu
from llama4_quant.calibration.hessian import Moments
from llama4_quant.calibration.pieces import ATTENTION_ROWS, Inputs, InputsOf, Pieces
from llama4_quant.calibration.records import CacheScaleRecord
from llama4_quant.calibration.routing import ExpertRows, Routing, route
from llama4_quant.calibration.rows import RowFile, row_chunks
from llama4_quant.calibration.source_weights import Pair, SourceWeights
from llama4_quant.calibration.streams import Sequences, StreamFiles, Streams


@dataclass(frozen=True, kw_only=True, slots=True)
class _ExpertFiles:
    """Rows of all tokens that a layer's experts read and write.

    Attributes:
        normed: what they get, before scores.
        inner: room for what an expert's down_proj gets, at most as many rows as tokens.
        after: the residual stream that they add to.
        wanted: of `_remember_wanted`.
    """

    normed: Streams
    inner: RowFile
    after: Streams
    wanted: RowFile


class LayerPass(Pieces):
    """Calibrates one layer and writes the hidden states after it."""

    def __init__(
        self,
        layer: int,
        base: str,
        *,
        maths: DecoderMath,
        weights: SourceWeights,
        files: StreamFiles,
        sequences: Sequences,
        cache: CacheCalibration | None,
        done: Callable[[str, int], None],
    ) -> None:
        """Nothing is read yet.

        Args:
            layer: its number.
            base: what its weights' names start with.
            maths: the model's arithmetic.
            weights: the model's.
            files: for hidden states and what lives within a layer.
            sequences: where samples lie.
            cache: scales of an FP8 KV cache, if the conversion has one.
            done: called with a weight's name and the source bytes that are done now.
        """
        super().__init__(weights, files, done)
        self._layer, self._base = layer, base
        self._maths, self._sequences, self._cache = maths, sequences, cache
        self.cache: CacheScaleRecord | None = None
        """Scales of the layer's KV cache, if it has some."""
        self.routing: Routing | None = None
        """Where tokens went, once that is known; stays None for a dense layer."""

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

        moments = self._moments(names, before.quantized.chunks(), normed)
        pairs = self._quantize(names, moments)
        if self._cache is not None:
            self.cache = self._cache.scales(
                self._layer, lambda: self._cache_ranges(before, gain, [pairs[name] for name in names[1:]], biases[1:])
            )
        with self._scratch("context", width) as context:
            for rows, length in self._sequences.batches(ATTENTION_ROWS):
                inputs = normed(rows)
                for file, x_RH, side in self._sides(context, inputs):
                    projected = self._project(pairs, x_RH, side, biases)
                    scales = scales_of(self.cache) if side == "stored" else None
                    with fast_matmul(x_RH.device):
                        file.write(rows, self._maths.context(self._layer, projected, length, scales))
            self._write_to_residual(f"{self._base}.self_attn.o_proj", context, before, after)

    def _cache_ranges(
        self, before: Streams, gain: Tensor, pairs: Sequence[Pair], biases: Sequence[Tensor | None]
    ) -> tuple[float, float]:
        """Largest magnitudes of the quantized model's keys and values, as they are cached, over all tokens."""
        scheme = self._weights.scheme(f"{self._base}.self_attn.k_proj")
        largest: list[Tensor] = []
        for rows, length in self._sequences.batches(ATTENTION_ROWS):
            x_RH = as_quantized_inputs(self._maths.norm(before.quantized.read(rows), gain), scheme)
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

        with self._scratch("inner", self._maths.config.intermediate_size_mlp) as inner:
            self._gate_up(base, normed, inner)
            self._write_to_residual(f"{base}.down_proj", inner, after, after)

    def _gate_up(self, base: str, inputs: InputsOf, inner: Streams) -> None:
        """Quantize gate and up of an MLP that all tokens take, and write what its down_proj gets."""
        self._through([f"{base}.gate_proj", f"{base}.up_proj"], inputs, inner, lambda outputs: swiglu(*outputs))

    def _inner(self, gate_up: dict[str, Pair], x_RH: Tensor, side: str) -> Tensor:
        """What down_proj gets."""
        gate_RI, up_RI = self._project(gate_up, x_RH, side)
        return swiglu(gate_RI, up_RI)

    # Mixture of experts ----------------------------------------------------------------------------------------------

    def _experts(self, after: Streams) -> None:
        """Shared expert first, then each routed expert on its own rows."""
        gain = self._kept(f"{self._base}.post_attention_layernorm.weight")
        base = f"{self._base}.feed_forward"
        config = self._maths.config
        with self._scratch("normed", config.hidden_size) as normed:
            for rows in normed.quantized.chunks():
                given = self._both(after, rows, lambda x_RH: self._maths.norm(x_RH, gain))
                for file, x_RH, _ in self._sides(normed, given):
                    file.write(rows, x_RH)
            self.routing = routing = self._route(normed)
            with ExitStack() as opened:
                inner = opened.enter_context(self._scratch("inner", config.intermediate_size))
                self._gate_up(f"{base}.shared_expert", lambda rows: self._both(normed, rows), inner)
                self._write_to_residual(f"{base}.shared_expert.down_proj", inner, after, after)
                wanted = opened.enter_context(self._files.scratch("wanted", config.hidden_size))
                weights_T = self._remember_wanted(after, wanted)
                files = _ExpertFiles(normed=normed, inner=inner.quantized, after=after, wanted=wanted)
                for expert in range(config.num_local_experts):
                    self._expert(f"{base}.experts.{expert}", routing.of(expert), files, weights_T)

    def _route(self, normed: Streams) -> Routing:
        router_EH = self._kept(f"{self._base}.feed_forward.router")
        config = self._maths.config

        def logits() -> Iterator[tuple[Tensor, Tensor]]:
            for rows in normed.quantized.chunks():
                given = self._both(normed, rows, lambda x_RH: functional.linear(x_RH, router_EH))
                yield given.quantized, given.original

        return route(
            logits(),
            normed.quantized.num_rows,
            experts_per_token=config.num_experts_per_tok,
            width=config.hidden_size,
        )

    def _remember_wanted(self, residual: Streams, wanted: RowFile) -> Tensor:
        """What `_wanted` says about every row before any routed expert has added to it: rows, and their weights [T].

        Each of a token's k experts is to make up for its part only.
        """
        num_experts = self._maths.config.num_experts_per_tok
        weights = []
        for rows in wanted.chunks():
            wanted_RH, weight_R = self._wanted(residual, rows)
            weights.append(weight_R)
            if wanted_RH is not None:
                wanted.write(rows, wanted_RH / num_experts)
        return torch.cat(weights)

    def _expert(self, base: str, rows: ExpertRows, files: _ExpertFiles, weights_T: Tensor) -> None:
        """Quantize one expert, and add its outputs to the rows that are routed to it, in each model."""
        normed, after = files.normed, files.after
        gate_up, down = [f"{base}.gate_proj", f"{base}.up_proj"], f"{base}.down_proj"
        drifts, text, device = normed.original is not None, self._maths.config, rows.fitted.device

        def scored(part: slice) -> Inputs:
            tokens = rows.fitted[part]
            quantized = normed.quantized.gather(tokens) * rows.quantized_scores[part].unsqueeze(-1)
            if normed.original is None:
                return Inputs(quantized=quantized, original=quantized)
            original = normed.original.gather(tokens) * rows.original_scores[part].unsqueeze(-1)
            return Inputs(quantized=quantized, original=original)

        chunks = list(row_chunks(len(rows.fitted), max(text.hidden_size, text.intermediate_size)))
        only = scored(chunks[0]) if len(chunks) == 1 else None
        moments = Moments(text.hidden_size, drift=drifts, device=device)
        for part in chunks if self._weights.is_pending(gate_up) else []:
            self._add(
                moments, gate_up, only or scored(part), weight_R=rows.weights[part], num_prior=rows.num_prior(part)
            )
        pairs = self._quantize(gate_up, moments, rows.total_prior)
        moments = Moments(text.intermediate_size, num_outputs=text.hidden_size, drift=drifts, device=device)
        is_pending = self._weights.is_pending([down])
        for part in chunks:  # also of what is finished: its outputs have to be the same
            given = only or scored(part)
            quantized_RI = self._inner(pairs, given.quantized, "stored")
            own = slice(part.start, min(part.stop, rows.num_own))
            if own.start < own.stop:
                files.inner.write(own, quantized_RI[: own.stop - own.start])
            if not is_pending:
                continue
            original_RI = self._inner(pairs, given.original, "original") if drifts else quantized_RI
            tokens = rows.fitted[part]
            self._add(
                moments,
                [down],
                Inputs(quantized=quantized_RI, original=original_RI),
                files.wanted.gather(tokens) if drifts else None,
                weight_R=weights_T[tokens] * rows.weights[part],
                num_prior=rows.num_prior(part),
            )
        down_pair = self._quantize([down], moments, rows.total_prior)
        for part in row_chunks(rows.num_own, text.intermediate_size):
            self._add_outputs(after.quantized, rows.quantized_tokens[part], down_pair, files.inner.read(part), "stored")
        if after.original is None or normed.original is None:
            return
        for part in row_chunks(len(rows.original_tokens), text.intermediate_size):
            tokens, scores_R = rows.original_tokens[part], rows.original_own[part]
            x_RH = normed.original.gather(tokens) * scores_R.unsqueeze(-1)
            self._add_outputs(after.original, tokens, down_pair, self._inner(pairs, x_RH, "original"), "original")

    def _add_outputs(self, residual: RowFile, tokens: Tensor, down: dict[str, Pair], x_RI: Tensor, side: str) -> None:
        """Add what an expert's down_proj makes of its inputs to the rows of some tokens."""
        (y_RH,) = self._project(down, x_RI, side)
        residual.scatter(tokens, residual.gather(tokens) + y_RH)

    # What is the decoder's own ---------------------------------------------------------------------------------------

    def _importance(self, residual_RH: Tensor) -> Tensor:
        return 1.0 / (residual_RH.square().mean(dim=-1) + self._maths.config.rms_norm_eps)

    def _kept(self, name: str) -> Tensor:
        """A weight that stays BF16, once it is written."""
        self._done(name, self._weights.keep(name))
        return self._weights.original(name)

    def _bias(self, name: str) -> Tensor | None:
        is_biased = self._maths.config.attention_bias and ".self_attn." in name
        return self._kept(f"{name}.bias") if is_biased else None
