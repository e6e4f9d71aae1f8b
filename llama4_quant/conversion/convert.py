"""Offline conversion: BF16 checkpoint in, quantized compressed-tensors checkpoint out, weight by weight.

The plan says everything that will be written, the layout says where; then source weights stream through the
quantizers into their places, one expert slice or chunk of rows at a time, on several threads, and with torchrun on
several machines. What is finished is journalled: a conversion that was interrupted, in whatever way, is continued by
running it again, with the same bytes as if nothing had happened.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from llama4_quant.calibration.settings import Calibration
from llama4_quant.checkpoint.files import os_errors
from llama4_quant.checkpoint.hub_reader import HubReader
from llama4_quant.checkpoint.layout import parse_size
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.resume import Job, Resume, parse_resume
from llama4_quant.checkpoint.source import is_hub_id, open_source, side_files
from llama4_quant.checkpoint.staging import check_output
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.conversion.fingerprint import fingerprint
from llama4_quant.conversion.output import output_config, output_layout
from llama4_quant.conversion.prepare import Preparation, prepare_conversion
from llama4_quant.conversion.publish import publish
from llama4_quant.conversion.ranks import Rank
from llama4_quant.conversion.report import Report, make_report
from llama4_quant.conversion.request import Request, Target
from llama4_quant.conversion.room import require_download_room
from llama4_quant.conversion.run import Conversion
from llama4_quant.errors import QuantizationError
from llama4_quant.formats.choice import CheckpointFormat, choose_format
from llama4_quant.scheme import Scheme
from llama4_quant.stream import Progress
from llama4_quant.work import WorkItem, cache_items, work_items


def convert(
    source: str | Path,
    output: str | Path,
    *,
    scheme: str | Scheme | None = None,
    format: str = CheckpointFormat.COMPRESSED_TENSORS,  # noqa: A002 - the flag's name
    model_parallel: int | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    revision: str | None = None,
    max_memory: int | str | None = None,
    workers: int | None = None,
    resume: str = Resume.AUTO,
    delete_source_shards: bool = False,
    calibration: Calibration | None = None,
    on_plan: Callable[[Report], None] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert a BF16 Llama 4 checkpoint to a quantized one, or to another layout.

    Args:
        source: a local directory, or a Hub id; in Hugging Face layout, or in Meta's (consolidated.NN.pth, params.json).
        output: directory to make; it must not hold anything unless `overwrite`.
        scheme: "W4A16", "FP8_DYNAMIC" or "FP8_BLOCK", or a Scheme with settings (see `preset`). Default: what the
            format is for (W4A16, FP8_DYNAMIC, none).
        format: "compressed-tensors"; "bf16" for another layout or other shards without quantization; "fbgemm-fp8"; or
            "meta-fp8".
        model_parallel: for meta-fp8: the number of ranks, one file each. Default: as many as a source in Meta's layout
            has; otherwise 8, or the largest of 4, 2 and 1 that can share the model.
        max_shard_size: bytes, or a string such as "5GB" or "512MiB"; a single larger tensor gets its own shard. Files
            of meta-fp8 are as large as a rank.
        overwrite: replace a checkpoint that is already in `output`.
        revision: branch, tag or commit of a Hub id.
        max_memory: bytes, or a size such as "2GiB", that the conversion may hold at a time, over what the interpreter
            holds anyway; default: a quarter of the machine's. It bounds the number of workers.
        workers: threads that work at the same time, at most; default: one for each core.
        resume: "auto" continues an interrupted conversion in `output` if it is the same one, and refuses if it is
            another; "required" refuses if there is none; "never" deletes it and begins anew.
        delete_source_shards: for a Hub id: download, convert and delete shard by shard, so that the disk holds the
            output and a few shards. Local folders and the Hub's cache are never touched.
        calibration: choose codes for the layers' outputs on calibration data instead of rounding to nearest; see
            `make_calibration`. With its `target_bits` weights get different schemes.
        on_plan: called once with what `dry_run` would return, when that is certain and no weight has been read.
        progress: called after each piece of work.

    Under torchrun (RANK and WORLD_SIZE in the environment) every process has to call this: they share the work, and
    all return when the output is complete.

    Returns:
        The report that is also in `output` as quantization_report.json.

    Raises:
        Llama4QuantError: bad source, scheme, pattern or output; a weight with NaN or Inf; a full disk. Nothing that
            looks like a finished checkpoint is left behind. What is finished is kept in `output` and continued by the
            next call, except when a weight cannot be quantized: then nothing is kept, since the source has to change.
    """
    started = time.perf_counter()
    mode, rank = parse_resume(resume), Rank.from_environment()
    storage, chosen = choose_format(format, scheme)
    request = Request(
        source=str(source),
        revision=revision,
        storage=storage,
        scheme=chosen,
        model_parallel=model_parallel,
        max_memory=max_memory,
        workers=workers,
        calibration=calibration,
    )
    target = Target(
        out=Path(output),
        shard_size=parse_size(max_shard_size),
        overwrite=overwrite,
        resume=mode,
        rank=rank,
        delete_source_shards=delete_source_shards,
    )
    with os_errors(f"{target.out}: cannot be used"):
        check_output(target.out.resolve(), overwrite=overwrite, source=Path(source))
    if not delete_source_shards and is_hub_id(request.source, revision):
        require_download_room(request, target.out)
    with open_source(request.source, revision, download_to=target.download_folder) as reader:
        preparation = prepare_conversion(request, target, reader, on_plan=on_plan, progress=progress)
        return _carry_out(request, target, preparation, reader, progress, started)


def _carry_out(
    request: Request,
    target: Target,
    preparation: Preparation,
    reader: CheckpointReader,
    progress: Progress | None,
    started: float,
) -> Report:
    """Do what is left of the items, here and beside other processes, and make the output visible."""
    plan, calibration = preparation.plan, preparation.calibration
    config, items, layout = output_config(plan, reader), work_items(plan), output_layout(plan, target.shard_size)
    job = _job(target, preparation, reader)
    with ExitStack() as stack:
        with target.rank.meeting() as meet:
            target.rank.check_shared(target.staging)
            writer = stack.enter_context(
                CheckpointWriter(target.out, layout, overwrite=target.overwrite, source=reader.path, job=job)
            )
            share = _share(preparation, items, writer, reader, target.rank)
            if isinstance(reader, HubReader):
                reader.require_space()
                reader.expect((plan.tensors[item.tensor].spec.name, item.num_bytes) for item in share.mine)
            meet()  # nobody begins before all have seen what is left
        conversion = Conversion(plan, reader, writer, preparation.backend)
        conversion.run(items, share.left, share.mine, preparation.memory, progress)
        calibrated = None
        if calibration is not None:
            calibrated = calibration.run(
                plan, items, reader, writer, preparation.backend, progress, mixed_precision=preparation.mixed
            )
        return publish(
            writer,
            items={item.id for item in items} | {*cache_items(plan, items)},
            report=lambda: make_report(
                plan,
                request.source,
                memory=preparation.memory,
                backend=preparation.backend,
                output=str(target.out),
                weights=conversion.weight_records(items),
                calibration=calibrated,
                seconds=time.perf_counter() - started,
            ),
            config={layout.last_file: config},
            copies={path.name: path for path in side_files(reader.path)},
        )


def _job(target: Target, preparation: Preparation, reader: CheckpointReader) -> Job:
    return Job(
        fingerprint=fingerprint(reader, preparation, target.shard_size),
        resume=target.resume,
        rank=target.rank.rank,
        world_size=target.rank.world_size,
        hopeless=(QuantizationError,),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Share:
    """What this process has to do.

    Attributes:
        mine: items to do without data, from front to back of the source's files.
        left: these, and the ones that are calibrated after them.
    """

    mine: Sequence[WorkItem]
    left: Sequence[WorkItem]


def _share(
    preparation: Preparation, items: Sequence[WorkItem], writer: CheckpointWriter, reader: CheckpointReader, rank: Rank
) -> _Share:
    """Every `world_size`-th of what no journal has; with calibration there is one process."""
    plan, calibration = preparation.plan, preparation.calibration
    calibrated = () if calibration is None else calibration.items(plan, items)
    records = writer.records()
    done = {*records, *(item.id for item in calibrated)}
    entries = [reader.tensors[tensor.spec.name] for tensor in plan.tensors]
    mine = sorted(
        [item for item in items if item.id not in done][rank.rank :: rank.world_size],
        key=lambda item: (entries[item.tensor].path.name, entries[item.tensor].start, item.id),
    )
    return _Share(mine=mine, left=[*mine, *(item for item in calibrated if item.id not in records)])
