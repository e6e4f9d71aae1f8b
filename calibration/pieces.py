"""What the layers of the decoder and of the vision tower have in common under calibration.

Rows of both models pass in chunks from file to file; sums are taken over what a weight meets, the weight is quantized,
and each model's rows go on through its own weight: the quantized model's through what is stored, as it is stored.

Shape letters: H residual width, K in, N out, R rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn import functional

from llama4_quant.calibration.decoder import as_quantized_inputs, fast_matmul
from llama4_quant.calibration.hessian import Moments
from llama4_quant.calibration.rows import RowFile
from llama4_quant.calibration.source_weights import Pair, SourceWeights
from llama4_quant.calibration.streams import StreamFiles, Streams
from llama4_quant.scheme import WeightScheme

ATTENTION_ROWS = 4096
"""Rows of whole sequences that attention is computed for at a time, unless one alone has more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Some rows of a layer's inputs in both models; `original` is the same tensor where only one model runs."""

    quantized: Tensor
    original: Tensor


InputsOf = Callable[[slice], Inputs]
"""From rows to what a weight meets there."""


class Pieces:
    """Quantizes weights on rows from files, and sends the rows on."""

    def __init__(self, weights: SourceWeights, files: StreamFiles, done: Callable[[str, int], None]) -> None:
        """Nothing is read yet.

        Args:
            weights: the model's.
            files: for what lives within a layer.
            done: called with a weight's name and the source bytes that are done now.
        """
        self._weights, self._files, self._done = weights, files, done

    def _importance(self, residual_RH: Tensor) -> Tensor:
        """What an error in each row of the residual stream counts, [R]: the next norm divides by the row's size."""
        return torch.ones(len(residual_RH), device=residual_RH.device)

    def _bias(self, name: str) -> Tensor | None:  # noqa: ARG002 - which weights have one, layers know
        """The bias of a linear weight, if it has one."""
        return None

    def _through(
        self, names: Sequence[str], inputs: InputsOf, after: Streams, activation: Callable[[list[Tensor]], Tensor]
    ) -> None:
        """Quantize weights that share inputs, and write what an activation makes of their outputs."""
        pairs = self._quantize(names, self._moments(names, after.quantized.chunks(), inputs))
        biases = [self._bias(name) for name in names]
        for rows in after.quantized.chunks():
            given = inputs(rows)
            for file, x_RK, side in self._sides(after, given):
                file.write(rows, activation(self._project(pairs, x_RK, side, biases)))

    def _write_to_residual(self, name: str, inputs: Streams, before: Streams, after: Streams) -> None:
        """Quantize a weight that writes to the residual stream, and add its outputs to `before`, giving `after`."""
        chunks = list(inputs.quantized.chunks())
        num_inputs, num_outputs = inputs.quantized.width, before.quantized.width
        device = self._weights.device
        moments = Moments(num_inputs, num_outputs=num_outputs, drift=inputs.original is not None, device=device)
        for rows in chunks if self._weights.is_pending([name]) else []:
            wanted, weight_R = self._wanted(before, rows)
            self._add(moments, [name], self._both(inputs, rows), wanted, weight_R=weight_R)
        pair = self._quantize([name], moments)
        bias = self._bias(name)
        for rows in chunks:
            given = self._both(inputs, rows)
            for (file, x_RK, side), source in zip(self._sides(after, given), before.both(), strict=True):
                (y_RH,) = self._project(pair, x_RK, side, [bias])
                file.write(rows, source.read(rows) + y_RH)

    def _wanted(self, residual: Streams, rows: slice) -> tuple[Tensor | None, Tensor]:
        """How the residual stream should move, and what an error in each row counts."""
        read = [file.read(rows) for file in residual.both()]
        return (read[1] - read[0] if len(read) == 2 else None), self._importance(read[-1])

    def _moments(self, names: Sequence[str], chunks: Iterable[slice], inputs: InputsOf) -> Moments:
        """Sums over the inputs of some weights."""
        width = self._weights.num_inputs(names[0])
        moments = Moments(width, drift=self._files.with_original, device=self._weights.device)
        for rows in chunks if self._weights.is_pending(names) else []:
            self._add(moments, names, inputs(rows))
        return moments

    def _add(
        self,
        moments: Moments,
        names: Sequence[str],
        inputs: Inputs,
        wanted: Tensor | None = None,
        *,
        weight_R: Tensor | None = None,
        num_prior: int = 0,
    ) -> None:
        """Add rows to the sums for some weights, as the first of them that is quantized meets them."""
        schemes = [scheme for name in names if (scheme := self._weights.scheme(name)) is not None]
        quantized = as_quantized_inputs(inputs.quantized, schemes[0])
        with fast_matmul(quantized.device):
            moments.add(quantized, inputs.original, wanted, weight_R, num_prior=num_prior)

    def _quantize(self, names: Sequence[str], moments: Moments, num_prior_rows: int = 0) -> dict[str, Pair]:
        pairs, num_bytes = self._weights.quantize(names, moments, num_prior_rows)
        self._done(names[0], num_bytes)
        return pairs

    def _project(
        self, pairs: dict[str, Pair], x_RK: Tensor, side: str, biases: Sequence[Tensor | None] = ()
    ) -> list[Tensor]:
        """Outputs of weights that share an input, each on the activations as it meets them: stored FP8 rounds them."""
        met: dict[WeightScheme | None, Tensor] = {None: x_RK}
        outputs = []
        for (name, pair), bias in zip_longest(pairs.items(), biases):
            scheme = self._weights.scheme(name) if side == "stored" else None
            if scheme not in met:
                met[scheme] = as_quantized_inputs(x_RK, scheme)
            with fast_matmul(x_RK.device):
                outputs.append(functional.linear(met[scheme], getattr(pair, side), bias))
        return outputs

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
    def _scratch(self, name: str, width: int, num_rows: int | None = None) -> Iterator[Streams]:
        """Files within this layer, as many as the model runs; `num_rows` if it is not that of the hidden states."""
        with ExitStack() as files:
            opened = [
                files.enter_context(self._files.scratch(f"{name}-{number}", width, num_rows))
                for number in range(2 if self._files.with_original else 1)
            ]
            yield Streams(quantized=opened[0], original=opened[1] if len(opened) == 2 else None)
