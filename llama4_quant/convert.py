"""Offline conversion: BF16 checkpoint in, quantized compressed-tensors checkpoint out, weight by weight.

The plan says everything that will be written, the layout says where; then source weights stream through the
quantizers into their places, one expert slice or chunk of rows at a time.
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama4_quant.checkpoint.layout import layout_shards, parse_size
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.source import resolve, side_files
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.config import Llama4Config
from llama4_quant.formats import compressed_tensors
from llama4_quant.plan import Decision, Plan, make_plan
from llama4_quant.quantizers.error import WeightError, measure
from llama4_quant.report import REPORT_NAME, Report, WeightRecord, make_report, weight_record
from llama4_quant.scheme import Scheme, preset
from llama4_quant.stream import Piece, encode_piece, finite_bf16, quantize_piece, read_pieces

Progress = Callable[[str, int], None]
"""Called after each piece with the weight's name and the source bytes that are now done more than before."""


def dry_run(
    source: str | Path, *, scheme: str | Scheme = "W4A16", revision: str | None = None, config_only: bool = False
) -> Report:
    """Say what `convert` would do, without reading a weight.

    Args:
        source: as for `convert`; with `config_only` a config.json, or a folder that has one.
        scheme: as for `convert`.
        revision: as for `convert`.
        config_only: plan from config.json alone, for a BF16 checkpoint that is not there.

    Raises:
        Llama4QuantError: as for `convert`.
    """
    chosen = preset(scheme)
    if config_only:
        path = Path(source)
        config = Llama4Config.from_file(path / "config.json" if path.is_dir() else path)
        return make_report(make_plan(config, chosen), str(source))
    with CheckpointReader.open(resolve(str(source), revision)) as reader:
        config = Llama4Config.from_dict(reader.config)
        return make_report(make_plan(config, chosen, reader.tensors), str(source))


def convert(
    source: str | Path,
    output: str | Path,
    *,
    scheme: str | Scheme = "W4A16",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert a BF16 Llama 4 checkpoint to a quantized one in compressed-tensors layout.

    Args:
        source: a local directory, or a Hub id.
        output: directory to make; it must not hold anything unless `overwrite`.
        scheme: "W4A16", "FP8_DYNAMIC" or "FP8_BLOCK", or a Scheme with settings (see `preset`).
        max_shard_size: bytes, or a string such as "5GB" or "512MiB"; a single larger tensor gets its own shard.
        overwrite: replace a checkpoint that is already in `output`.
        revision: branch, tag or commit of a Hub id.
        progress: called after each piece of work.

    Returns:
        The report that is also in `output` as quantization_report.json.

    Raises:
        Llama4QuantError: bad source, scheme, pattern or output; a weight with NaN or Inf; a full disk. Nothing that
            looks like a finished checkpoint is left behind.
    """
    started = time.perf_counter()
    chosen = preset(scheme)
    folder, out = resolve(str(source), revision), Path(output)
    with CheckpointReader.open(folder) as reader:
        config = Llama4Config.from_dict(reader.config)
        plan = make_plan(config, chosen, reader.tensors)
        layout = layout_shards(plan.outputs, parse_size(max_shard_size))
        with CheckpointWriter(out, layout, overwrite=overwrite, source=folder) as writer:
            records = _convert_weights(plan, reader, writer, progress)
            seconds = time.perf_counter() - started
            report = make_report(plan, str(source), output=str(out), weights=records, seconds=seconds)
            files = {REPORT_NAME: report.to_json(), "config.json": output_config(plan)}
            writer.finish(files, {path.name: path for path in side_files(folder)})
    return report


def output_config(plan: Plan) -> dict[str, Any]:
    """config.json of the quantized checkpoint: the source's, in BF16, with an exact `quantization_config`."""
    assert plan.scheme is not None
    config = copy.deepcopy(dict(plan.config.raw))
    for section in (config, config.get("text_config") or {}):
        section.update({key: "bfloat16" for key in ("torch_dtype", "dtype") if key in section})
    config["quantization_config"] = compressed_tensors.quantization_config(plan.scheme, plan.ignore)
    return config


def _convert_weights(
    plan: Plan, reader: CheckpointReader, writer: CheckpointWriter, progress: Progress | None
) -> tuple[WeightRecord, ...]:
    records = []
    for tensor in plan.tensors:
        work: dict[str, _Work] = {}
        for piece in read_pieces(reader, tensor):
            work.setdefault(piece.decision.name, _Work(piece.decision)).do(piece, writer)
            if progress is not None:
                progress(piece.decision.name, piece.num_bytes)
        records += [done.record() for done in work.values()]
    return tuple(records)


class _Work:
    """One weight on its way: writes its pieces and sums up their errors."""

    def __init__(self, decision: Decision) -> None:
        self._decision = decision
        self._error: WeightError | None = None
        self._seconds = 0.0

    def do(self, piece: Piece, writer: CheckpointWriter) -> None:
        if self._decision.scheme is None:
            writer.write(self._decision.outputs[0].name, finite_bf16(piece), row_start=piece.row_start)
            return
        started = time.perf_counter()
        quantized = quantize_piece(piece)
        error = measure(piece.values, quantized)
        self._seconds += time.perf_counter() - started
        self._error = error if self._error is None else self._error.merge(error)
        for rows in encode_piece(piece, quantized):
            writer.write(rows.name, rows.values, rows.row_start)

    def record(self) -> WeightRecord:
        quantized = self._error is not None
        return weight_record(self._decision, self._error, self._seconds if quantized else None)
