"""Verifying a checkpoint in Hugging Face layout: what its tensors decode to, alone and against the source.

Weights are looked at some rows at a time, and compared with the pieces that the source is converted in.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Self

import torch

from llama4_quant.calibration.equalize import Equalizer
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.config import Llama4Config
from llama4_quant.errors import CheckpointError, Llama4QuantError
from llama4_quant.formats import compressed_tensors
from llama4_quant.formats.choice import CheckpointFormat
from llama4_quant.planning.make import make_plan
from llama4_quant.planning.plan import Plan
from llama4_quant.quantizers.error import WeightError, measure
from llama4_quant.quantizers.lanes import rows_per_scale
from llama4_quant.quantizers.quantize import QuantizedWeight
from llama4_quant.scheme import FP8_BLOCK_SIZE
from llama4_quant.stored import (
    StoredWeight,
    cache_scale_names,
    quantization_section,
    quantized_weights,
    read_cache_scale,
)
from llama4_quant.stored_fused import expert_rows, fused_weights, is_fbgemm, is_fused, read_expert
from llama4_quant.stream import Piece, Progress, read_pieces
from llama4_quant.verification.findings import Problem, WeightDistance, distance, is_finite
from llama4_quant.verification.promises import is_equalized

READ_BYTES = 16 * 2**20


class HuggingFaceOutput:
    """An open output.

    Attributes:
        num_weights: weights of the model.
    """

    def __init__(self, reader: CheckpointReader, weights: tuple[StoredWeight, ...]) -> None:
        self._reader = reader
        self._weights = weights
        self.num_weights = len(weights)

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[Self]:
        """Open the files and check that they hold exactly the weights of the model in config.json.

        Raises:
            CheckpointError: files are missing or damaged, or tensors are not the model's.
            ConfigError: config.json is not usable.
        """
        with CheckpointReader.open(folder) as reader:
            yield cls(reader, _stored(reader))

    def check_values(self) -> Iterator[Problem]:
        """Everything is decoded; NaN and Inf are problems in scales, FP8 codes and unquantized values alike."""
        for weight in self._weights:
            yield from _check_values(weight, self._reader)
        yield from _check_cache_scales(self._reader)

    def compare(
        self, source: CheckpointReader, progress: Progress | None
    ) -> tuple[list[WeightDistance], list[Problem]]:
        """Kept weights must equal the source; of quantized ones the distances.

        Raises:
            CheckpointError: the source is another model.
        """
        by_name = {weight.name: weight for weight in self._weights}
        distances: list[WeightDistance] = []
        problems: list[Problem] = []
        plan = make_plan(Llama4Config.from_dict(source.config), None, source.tensors, _format_of(self._weights))
        _check_same_model(plan, by_name)
        equalizer = None
        if is_equalized(self._reader.path):
            equalizer = Equalizer(plan, lambda name: by_name[name].scheme, source)
        for tensor in plan.tensors:
            sums: dict[str, WeightError] = {}
            for original in read_pieces(source, tensor):
                piece = original if equalizer is None else _equalized(original, equalizer)
                weight = by_name[piece.decision.name]
                if weight.scheme is not None:
                    error = _error(weight, piece, self._reader)
                    sums[weight.name] = error.merge(sums[weight.name]) if weight.name in sums else error
                elif not _equals_source(weight, piece, self._reader):
                    problems.append(Problem(where=weight.name, what="differs from the source, but was to be kept"))
                if progress is not None:
                    progress(weight.name, piece.num_bytes)
            for name, error in sums.items():
                scheme = by_name[name].scheme
                assert scheme is not None
                distances.append(distance(name, scheme, error))
        return distances, problems


def _stored(reader: CheckpointReader) -> tuple[StoredWeight, ...]:
    """Every weight, checked against config.json."""
    config = Llama4Config.from_dict(reader.config)
    if quantization_section(config) is None or is_fbgemm(config):
        return fused_weights(config, reader.tensors)
    return quantized_weights(config, reader.tensors)


def _check_values(weight: StoredWeight, reader: CheckpointReader) -> Iterator[Problem]:
    """Decode what can be decoded; NaN and Inf are problems in scales, FP8 codes and unquantized values alike."""
    if is_fused(weight):
        for name, part in expert_rows(weight, reader):
            if not is_finite(part):
                yield Problem(where=f"{weight.name}, {name}", what="holds NaN or Inf")
        return
    shape_name = f"{weight.name}.weight_shape"
    if shape_name in weight.tensors:
        stored_shape = tuple(reader.read(shape_name).tolist())
        if stored_shape != weight.shape:
            yield Problem(where=shape_name, what=f"says {list(stored_shape)}, expected {list(weight.shape)}")
            return
    bad: dict[str, None] = {}  # in order, each once
    for start, stop in _row_ranges(weight):
        rows = _stored_rows(weight, start, stop, reader)
        if weight.scheme is not None:
            try:
                compressed_tensors.decode(weight.name, rows, weight.scheme)
            except Llama4QuantError as error:
                yield Problem(where=weight.name, what=str(error))
                return
        bad |= {name: None for name, part in rows.items() if part.is_floating_point() and not is_finite(part)}
    yield from (Problem(where=name, what="holds NaN or Inf") for name in bad)


def _check_cache_scales(reader: CheckpointReader) -> Iterator[Problem]:
    config = Llama4Config.from_dict(reader.config)
    if is_fbgemm(config):
        return
    for name in chain.from_iterable(cache_scale_names(config, reader.tensors)):
        try:
            read_cache_scale(reader, name)
        except CheckpointError as error:
            yield Problem(where=name, what=str(error).removeprefix(f"{name}: "))


def _row_ranges(weight: StoredWeight) -> Iterator[tuple[int, int]]:
    """Rows (of dimension 0) that are read at a time, whole blocks of scales."""
    row_elements = max(1, weight.num_weights // max(1, weight.shape[0]))
    step = max(1, READ_BYTES // (row_elements * FP8_BLOCK_SIZE)) * FP8_BLOCK_SIZE
    step = step if len(weight.shape) == 2 else max(1, READ_BYTES // row_elements)
    return ((start, min(start + step, weight.shape[0])) for start in range(0, weight.shape[0], step))


def _equalized(piece: Piece, equalizer: Equalizer) -> Piece:
    factors = equalizer.factors(piece.decision.name)
    return dataclasses.replace(piece, values=factors.apply(piece.values, piece.row_start))


def _format_of(weights: Sequence[StoredWeight]) -> CheckpointFormat:
    """A format that cuts a source into the same weights."""
    return CheckpointFormat.BF16 if any(map(is_fused, weights)) else CheckpointFormat.COMPRESSED_TENSORS


def _check_same_model(plan: Plan, weights: Mapping[str, StoredWeight]) -> None:
    expected = {decision.name: decision.shape for decision in plan.decisions}
    found = {name: weight.shape for name, weight in weights.items()}
    differing = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if differing:
        raise CheckpointError(
            f"{differing[0]}: the output and the source are of different models ({len(differing)} weights differ in "
            "name or shape); give the checkpoint that the output was made of"
        )


def _error(weight: StoredWeight, piece: Piece, output: CheckpointReader) -> WeightError:
    """How far the rows of a quantized weight are from a piece of the source."""
    original = piece.values[0].T if piece.decision.fused else piece.values
    return measure(original, _decoded(weight, piece, output))


def _decoded(weight: StoredWeight, piece: Piece, output: CheckpointReader) -> QuantizedWeight:
    """The rows of a quantized weight that a piece of the source stands for."""
    assert weight.scheme is not None
    if is_fused(weight):
        return read_expert(weight, output)
    rows = _stored_rows(weight, piece.row_start, piece.row_start + len(piece.values), output)
    return compressed_tensors.decode(weight.name, rows, weight.scheme)


def _stored_rows(weight: StoredWeight, start: int, stop: int, output: CheckpointReader) -> dict[str, torch.Tensor]:
    """What holds rows `start` to `stop` of a weight, as a weight of its own."""
    if weight.scheme is None:
        return {name: output.read_rows(name, start, stop) for name in weight.tensors}
    block = rows_per_scale(weight.scheme)
    rows: dict[str, torch.Tensor] = {}
    for name in weight.tensors:
        if name.endswith(".weight_shape"):
            rows[name] = torch.tensor([stop - start, weight.shape[1]])
        elif name.endswith(".weight_scale"):
            rows[name] = output.read_rows(name, start // block, -(-stop // block))
        else:
            rows[name] = output.read_rows(name, start, stop)
    return rows


def _equals_source(weight: StoredWeight, piece: Piece, output: CheckpointReader) -> bool:
    stored = output.read_rows(weight.tensors[0], piece.row_start, piece.row_start + len(piece.values))
    return torch.equal(stored.view(torch.int16), piece.values.to(torch.bfloat16).contiguous().view(torch.int16))
