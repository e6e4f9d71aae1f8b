"""`llama4-quant convert`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click

from llama4_quant.calibration.records import CalibrationReport, LayerRecord
from llama4_quant.checkpoint.layout import parse_size
from llama4_quant.checkpoint.paths import STAGING_NAME
from llama4_quant.checkpoint.resume import Resume
from llama4_quant.cli.config_file import configurable
from llama4_quant.cli.options import (
    SCHEMES,
    calibration_for,
    calibration_options,
    json_option,
    scheme_for,
    scheme_options,
)
from llama4_quant.cli.progress import byte_progress
from llama4_quant.cli.tables import console, count, largest_errors, parameters, size, table
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.dry_run import dry_run
from llama4_quant.conversion.ranks import Rank
from llama4_quant.conversion.report import REPORT_NAME, Report, WeightRecord
from llama4_quant.errors import UsageError
from llama4_quant.formats.choice import CheckpointFormat

RARE_FLAGS = (
    "--observer",
    "--model-parallel",
    "--max-seq-length",
    "--min-tokens-per-expert",
    "--seed",
    "--text-column",
    "--kv-cache-scheme",
    "--max-shard-size",
    "--workers",
    "--delete-source-shards",
    "--revision",
    "--save-plan",
)
"""Not in `--help`, but in `--help-all` and docs/cli.md."""


@configurable(rare=RARE_FLAGS)
@click.command("convert", short_help="Convert a BF16 checkpoint to FP8 or int4.")
@click.argument("source", metavar="SRC")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT", help="Directory to make.")
@click.option(
    "--format",
    "storage",
    type=click.Choice([storage.value for storage in CheckpointFormat]),
    default=CheckpointFormat.COMPRESSED_TENSORS.value,
    show_default=True,
    help="How OUT is stored; bf16 does not quantize.",
)
@scheme_options(scheme_help=f"{SCHEMES}. [default: W4A16; for fbgemm-fp8 and meta-fp8 FP8_DYNAMIC]", default=None)
@click.option(
    "--model-parallel",
    type=int,
    metavar="N",
    help="For meta-fp8: ranks, with a file each. [default: as in SRC, if in Meta's layout; else 8, 4, 2 or 1]",
)
@calibration_options
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest file: 5GB, 512MiB, ...")
@click.option(
    "--max-memory", metavar="SIZE", help="Hold at most so much: 2GiB, ... [default: a quarter of the machine]"
)
@click.option("--workers", type=int, metavar="N", help="Work on at most N pieces at a time. [default: one per core]")
@click.option(
    "--resume",
    type=click.Choice([mode.value for mode in Resume]),
    default=Resume.AUTO.value,
    show_default=True,
    help="An interrupted conversion in OUT: continue it if there is one; continue it or fail; delete it.",
)
@click.option(
    "--delete-source-shards",
    is_flag=True,
    help="Hub ids only: download, convert and delete shard by shard; local folders and the Hub's cache stay.",
)
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that is in OUT.")
@click.option("--dry-run", "is_dry_run", is_flag=True, help="Show the decision about every weight, and write nothing.")
@click.option("--config-only", is_flag=True, help="With --dry-run: SRC is a config.json; no weights are needed.")
@click.option(
    "--save-plan", type=click.Path(path_type=Path, dir_okay=False), help="With --dry-run: write the plan here as JSON."
)
@json_option
def convert_command(
    source: str,
    output: Path | None,
    storage: str,
    model_parallel: int | None,
    max_shard_size: str,
    max_memory: str | None,
    workers: int | None,
    resume: str,
    delete_source_shards: bool,
    revision: str | None,
    overwrite: bool,
    is_dry_run: bool,
    config_only: bool,
    save_plan: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Convert the BF16 Llama 4 checkpoint SRC (a directory or a Hub id) to FP8 or int4.

    SRC may be in Meta's original layout (params.json, consolidated.NN.pth). Unless --format says otherwise, the output
    is a compressed-tensors checkpoint that llama4-quant, transformers and vLLM load. A quantization_report.json stands
    beside it. A conversion that was interrupted is continued by the same command. With torchrun (-m llama4_quant.cli)
    several processes share the work, on one or more machines.

    \b
    llama4-quant convert meta-llama/Llama-4-Scout-17B-16E-Instruct -o scout-w4a16 --scheme W4A16
    llama4-quant convert ./scout -o scout-fp8 --scheme FP8_DYNAMIC --quantize attention
    llama4-quant convert ./Llama-4-Scout-17B-16E-Original -o scout-hf --format bf16
    llama4-quant convert --dry-run --config-only config.json --scheme W4A16 --group-size 64
    """  # noqa: D301 - \b is click's mark for lines that must not be wrapped
    calibration = calibration_for(settings)
    scheme, shard_size = scheme_for(storage, settings), parse_size(max_shard_size)
    if not is_dry_run and (config_only or save_plan is not None):
        raise UsageError("--config-only and --save-plan go with --dry-run")
    if not is_dry_run and output is None:
        raise UsageError("convert needs -o OUT, the directory to make (or --dry-run)")
    chosen: dict[str, Any] = {
        "scheme": scheme,
        "format": storage,
        "revision": revision,
        "model_parallel": model_parallel,
        "max_memory": max_memory,
        "workers": workers,
        "calibration": calibration,
    }
    if is_dry_run:
        planned = dry_run(source, config_only=config_only, **chosen)
        if save_plan is not None:
            save_plan.write_text(json.dumps(planned.to_json(), indent=1) + "\n", encoding="utf-8")
        _show(planned, as_json=as_json)
        return
    assert output is not None
    is_first = Rank.from_environment().rank == 0  # one of several processes talks
    with _ProgressOfPlan() as shown, _said_when_stopped(output, is_first=is_first):
        report = convert(
            source,
            output,
            max_shard_size=shard_size,
            resume=resume,
            delete_source_shards=delete_source_shards,
            overwrite=overwrite,
            on_plan=shown.plan if is_first else None,
            progress=shown.progress if is_first else None,
            **chosen,
        )
    if is_first:
        _show(report, as_json=as_json)


@contextmanager
def _said_when_stopped(output: Path, *, is_first: bool) -> Iterator[None]:
    """A signal stops the conversion in order: say that this is not the end of it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if is_first and (output / STAGING_NAME).exists():
            click.echo(f"what is finished is kept in {output}; the same command continues it", err=True)
        raise


class _ProgressOfPlan(ExitStack):
    """A bar that appears when `convert` says how much there is to do."""

    def plan(self, planned: Report) -> None:
        self._advance = self.enter_context(byte_progress("converting", planned.totals.bytes_in))

    def progress(self, what: str, num_bytes: int) -> None:
        self._advance(what, num_bytes)


def _show(report: Report, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report.to_json()))
        return
    out = console()
    roles = table(
        f"{report.architecture} to {report.scheme}", "role", "stored as", "why", "weights", "shape", "in", "out", left=3
    )
    for role in report.roles:
        shape = "x".join(map(str, role.shapes[0])) + (f" (+{len(role.shapes) - 1})" if len(role.shapes) > 1 else "")
        roles.add_row(
            role.role, role.scheme, role.reason, count(role.count), shape, size(role.bytes_in), size(role.bytes_out)
        )
    out.print(roles)
    totals = report.totals
    out.print(
        f"{parameters(totals.num_weights)}, {size(totals.bytes_in)} in, {size(totals.bytes_out)} out: "
        f"{totals.bits_per_weight:.3f} bits per weight ({totals.quantized_bits_per_weight:.3f} over the "
        f"{totals.quantized_fraction:.1%} that is quantized)"
    )
    memory = report.memory
    out.print(
        f"memory: at most {size(memory.predicted)} of {size(memory.limit)} for {memory.num_workers} "
        f"worker{'' if memory.num_workers == 1 else 's'}; the smallest --max-memory is {memory.smallest // 2**20}MiB"
    )
    if report.backend is not None:
        out.print(f"quantizers: {report.backend}")
    for note in report.notes:
        out.print(f"note: {note}")
    if report.output is not None:
        _show_result(report)


def _show_result(report: Report) -> None:
    out = console()
    if report.calibration is not None:
        _show_calibration(report.calibration)
    measured = [weight for weight in report.weights if weight.relative_error is not None]
    if measured:
        _show_worst(measured)
    assert report.output is not None
    assert report.seconds is not None
    out.print(
        f"wrote {report.output} in {report.seconds:.1f} s; every weight is in {Path(report.output) / REPORT_NAME}"
    )


def _show_calibration(calibration: CalibrationReport) -> None:
    """What was calibrated on, and of each layer who saw how much and how far the hidden states are off."""
    out = console()
    out.print(
        f"calibrated ({calibration.algorithm}) on {count(calibration.num_samples)} samples, "
        f"{count(calibration.num_tokens)} tokens: {calibration.data}"
    )
    layers = table("hidden states after each layer", "layer", "rows per expert", "error", "SQNR", "rerouted", left=0)
    for record in calibration.layers:
        layers.add_row(*_layer_cells(record))
    out.print(layers)
    for note in calibration.notes:
        out.print(f"note: {note}")


def _layer_cells(record: LayerRecord) -> Sequence[str]:
    rows = record.rows_per_expert
    spread = f"{count(min(rows))} to {count(max(rows))}, median {count(int(median(rows)))}" if rows else "dense"
    return (
        str(record.layer),
        spread,
        "" if record.relative_error is None else f"{record.relative_error:.2%}",
        "" if record.sqnr_db is None else f"{record.sqnr_db:.1f} dB",
        "" if record.rerouted is None else f"{record.rerouted:.2%}",
    )


def _show_worst(measured: Sequence[WeightRecord]) -> None:
    console().print(largest_errors((w.name, w.scheme, w.relative_error or 0.0, w.sqnr_db) for w in measured))
