"""Is a converted checkpoint whole? Every byte, every header, every code; and with the source, how far every weight is.

Four questions, each only as deep as the ones before allow:

- bytes: the SHA-256 ranges of manifest.json tile every file, so one flipped bit is found, and placed;
- structure: headers, index, config.json and the tensors agree, as for loading;
- values: codes and scales decode to finite numbers;
- the source, if given: kept weights are equal to it, and quantized ones as far from it as the report says; both up to
  the powers of two that calibration has moved between weights, which are computed again.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Self

import torch

from llama4_quant.calibration.equalize import Equalizer
from llama4_quant.checkpoint.json_files import read_json
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.source import open_source
from llama4_quant.config import Llama4Config
from llama4_quant.conversion.report import REPORT_NAME
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
from llama4_quant.verification import (
    Problem,
    Verification,
    WeightDistance,
    broken_promise,
    distance,
    is_finite,
)
from llama4_quant.verify_files import check_files, listed_files
from llama4_quant.verify_meta import MetaOutput

__all__ = ["Problem", "Verification", "WeightDistance", "verify"]

READ_BYTES = 16 * 2**20


def verify(
    output: str | Path,
    *,
    source: str | Path | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a checkpoint that `convert` wrote.

    Args:
        output: its folder.
        source: the BF16 checkpoint (a folder, or a Hub id) that it was made from; adds the distance of every weight.
        revision: branch, tag or commit of a Hub id.
        progress: called with what is checked and the bytes done more than before.

    Returns:
        All problems found; damage is data here, not an exception.

    Raises:
        CheckpointError: `output` is not a folder with a manifest, or the source cannot be used.
    """
    folder = Path(output)
    files = listed_files(folder)
    problems = [*check_files(folder, files, progress)]
    is_meta = any(file.name.endswith(".pth") for file in files)
    num_weights = 0
    distances: list[WeightDistance] = []
    try:
        with (MetaOutput if is_meta else _HuggingFaceOutput).open(folder) as found:
            num_weights = found.num_weights
            problems += found.check_values()
            if source is not None:
                with open_source(str(source), revision) as original:
                    distances, wrong = found.compare(original, _promised(folder), progress)
                problems += wrong
    except Llama4QuantError as error:
        problems.append(Problem(where=str(folder), what=str(error)))
    return Verification(
        output=str(output),
        source=None if source is None else str(source),
        num_files=len(files),
        num_bytes=sum(file.size for file in files),
        num_weights=num_weights,
        problems=tuple(problems),
        distances=tuple(distances),
    )


class _HuggingFaceOutput:
    """An open output in Hugging Face layout; a context manager."""

    def __init__(self, reader: CheckpointReader, weights: tuple[StoredWeight, ...]) -> None:
        self._reader = reader
        self._weights = weights
        self.num_weights = len(weights)

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[Self]:
        with CheckpointReader.open(folder) as reader:
            yield cls(reader, _stored(reader))

    def check_values(self) -> Iterator[Problem]:
        for weight in self._weights:
            yield from _check_values(weight, self._reader)
        yield from _check_cache_scales(self._reader)

    def compare(
        self, source: CheckpointReader, promised: Mapping[str, float], progress: Progress | None
    ) -> tuple[list[WeightDistance], list[Problem]]:
        return _compare(source, self._weights, self._reader, promised, progress)


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


def _promised(folder: Path) -> dict[str, float]:
    """Relative errors by weight, as the report has them."""
    try:
        weights = read_json(folder / REPORT_NAME, CheckpointError)["weights"]
        return {w["name"]: w["relative_error"] for w in weights if isinstance(w["relative_error"], float)}
    except (CheckpointError, KeyError, TypeError):
        return {}  # a damaged report is a problem that _check_report names


def _compare(
    source: CheckpointReader,
    weights: tuple[StoredWeight, ...],
    output: CheckpointReader,
    promised: Mapping[str, float],
    progress: Progress | None,
) -> tuple[list[WeightDistance], list[Problem]]:
    by_name = {weight.name: weight for weight in weights}
    distances: list[WeightDistance] = []
    problems: list[Problem] = []
    plan = make_plan(Llama4Config.from_dict(source.config), None, source.tensors, _format_of(weights))
    _check_same_model(plan, by_name)
    equalizer = None
    if _is_equalized(output.path):
        equalizer = Equalizer(plan, lambda name: by_name[name].scheme, source)
    for tensor in plan.tensors:
        sums: dict[str, WeightError] = {}
        for original in read_pieces(source, tensor):
            piece = original if equalizer is None else _equalized(original, equalizer)
            weight = by_name[piece.decision.name]
            if weight.scheme is not None:
                error = measure(
                    piece.values[0].T if piece.decision.fused else piece.values, _decoded(weight, piece, output)
                )
                sums[weight.name] = error.merge(sums[weight.name]) if weight.name in sums else error
            elif not _equals_source(weight, piece, output):
                problems.append(Problem(where=weight.name, what="differs from the source, but was to be kept"))
            if progress is not None:
                progress(weight.name, piece.num_bytes)
        for name, error in sums.items():
            scheme = by_name[name].scheme
            assert scheme is not None
            distances.append(distance(name, scheme, error))
    problems += [problem for found in distances if (problem := broken_promise(found, promised))]
    return distances, problems


def _is_equalized(folder: Path) -> bool:
    """Whether the report says that powers of two were moved between weights."""
    try:
        calibration = read_json(folder / REPORT_NAME, CheckpointError)["calibration"]
        return calibration is not None and calibration["equalized"] is True
    except (CheckpointError, KeyError, TypeError):
        return False


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
