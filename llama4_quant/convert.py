"""Offline conversion: BF16 checkpoint in, quantized compressed-tensors checkpoint out, weight by weight.

The plan says everything that will be written, the layout says where; then source weights stream through the
quantizers into their places, one expert slice or chunk of rows at a time, on several threads, and with torchrun on
several machines. What is finished is journalled: a conversion that was interrupted, in whatever way, is continued by
running it again, with the same bytes as if nothing had happened.
"""

import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from llama4_quant._version import __version__
from llama4_quant.architecture import Role
from llama4_quant.calibration.memory import with_calibration
from llama4_quant.calibration.mixed import check_target, choices_of, parse_record, units_of
from llama4_quant.calibration.records import MixedPrecisionRecord
from llama4_quant.calibration.run import PreparedCalibration, prepare
from llama4_quant.calibration.settings import Calibration
from llama4_quant.checkpoint.files import os_errors
from llama4_quant.checkpoint.hub_cache import bytes_to_download, cache_folder, require_room
from llama4_quant.checkpoint.hub_reader import HubReader
from llama4_quant.checkpoint.json_files import read_json
from llama4_quant.checkpoint.layout import Layout, layout_shards, parse_size
from llama4_quant.checkpoint.meta import MetaReader
from llama4_quant.checkpoint.paths import DOWNLOAD_NAME, STAGING_NAME
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.resume import Job, Resume, found_fingerprint, parse_resume
from llama4_quant.checkpoint.source import is_hub_id, open_headers, open_source, side_files
from llama4_quant.checkpoint.staging import check_output, is_publishing, reserved_bytes
from llama4_quant.checkpoint.state_dicts import layout_state_dicts
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.config import Llama4Config
from llama4_quant.conversion import Conversion
from llama4_quant.errors import OtherLayoutError, OutputError, QuantizationError, UsageError
from llama4_quant.formats import compressed_tensors, fbgemm_fp8
from llama4_quant.formats.choice import CheckpointFormat, choose_format
from llama4_quant.formats.meta_params import params_of
from llama4_quant.planning.choose import Choice
from llama4_quant.planning.make import make_plan
from llama4_quant.planning.plan import Plan
from llama4_quant.quantizers.backend import Backend, choose_backend
from llama4_quant.ranks import Rank
from llama4_quant.report import REPORT_NAME, Report, make_report
from llama4_quant.scheme import KVCacheScheme, Scheme, WeightType
from llama4_quant.stream import Progress
from llama4_quant.work import MemoryUse, WorkItem, cache_items, plan_memory, work_items

SECONDS_BETWEEN_LOOKS = 0.5
MIXED_SECTION = "mixed_precision"
"""Of the fingerprint: what mixed precision chose, so that a resumed conversion goes on with that."""


def dry_run(
    source: str | Path,
    *,
    scheme: str | Scheme | None = None,
    format: str = CheckpointFormat.COMPRESSED_TENSORS,  # noqa: A002 - the flag's name
    revision: str | None = None,
    config_only: bool = False,
    model_parallel: int | None = None,
    max_memory: int | str | None = None,
    workers: int | None = None,
    calibration: Calibration | None = None,
) -> Report:
    """Say what `convert` would do, without reading a weight.

    Args:
        source: as for `convert`; with `config_only` a config.json, or a folder that has one.
        scheme: as for `convert`.
        format: as for `convert`.
        revision: as for `convert`.
        config_only: plan from config.json alone, for a BF16 checkpoint that is not there.
        model_parallel: as for `convert`.
        max_memory: as for `convert`.
        workers: as for `convert`.
        calibration: as for `convert`; its data is not opened, and what it would choose by measuring is not known.

    Raises:
        Llama4QuantError: as for `convert`.
    """
    storage, chosen = choose_format(format, scheme)
    cache = None if calibration is None else calibration.kv_cache_scheme
    if config_only:
        path = Path(source)
        config = Llama4Config.from_file(path / "config.json" if path.is_dir() else path)
        plan = make_plan(config, chosen, format=storage, model_parallel=model_parallel, kv_cache_scheme=cache)
        output_config(plan)
        return _planned(plan, str(source), max_memory, workers, calibration)
    with open_headers(str(source), revision) as reader:
        plan = _plan(reader, chosen, storage, model_parallel, cache)
        output_config(plan, reader)
        return _planned(plan, str(source), max_memory, workers, calibration)


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
    out, shard_size = Path(output), parse_size(max_shard_size)
    with os_errors(f"{out}: cannot be used"):
        check_output(out.resolve(), overwrite=overwrite, source=Path(source))
    if not delete_source_shards and is_hub_id(str(source), revision):
        with suppress(OtherLayoutError):  # its plan is known once it is here
            ahead = dry_run(
                source,
                scheme=chosen,
                format=storage,
                revision=revision,
                model_parallel=model_parallel,
                max_memory=max_memory,
                workers=workers,
            )
            _require_room(str(source), revision, out, ahead.totals.bytes_out)
    with open_source(
        str(source), revision, download_to=_downloads(out, rank) if delete_source_shards else None
    ) as reader:
        cache = None if calibration is None else calibration.kv_cache_scheme
        plan = _plan(reader, chosen, storage, model_parallel, cache)
        backend = choose_backend()
        if calibration is not None:
            _check_calibration(calibration, plan, rank, delete_source_shards=delete_source_shards)
        memory = _memory(plan, backend, max_memory, workers, calibration)
        if on_plan is not None:
            on_plan(make_report(plan, str(source), memory=memory, backend=backend))
        prepared = mixed = None
        if calibration is not None:
            prepared = prepare(calibration, reader)
            _require_disk(prepared, plan, out, shard_size)
            mixed = _mixed_precision(plan, prepared, reader, out, mode, progress)
        if prepared is not None and mixed is not None:
            plan = _plan(reader, chosen, storage, model_parallel, cache, choices_of(plan, mixed))
            memory = _memory(plan, backend, max_memory, workers, calibration)
            _require_disk(prepared, plan, out, shard_size)
        config, items = output_config(plan, reader), work_items(plan)
        layout = _layout(plan, shard_size)
        job = Job(
            fingerprint=_fingerprint(reader, plan, shard_size, prepared, mixed),
            resume=mode,
            rank=rank.rank,
            world_size=rank.world_size,
            hopeless=(QuantizationError,),
        )
        with ExitStack() as stack:
            with rank.meeting() as meet:
                rank.check_shared(out.resolve() / STAGING_NAME)
                writer = stack.enter_context(
                    CheckpointWriter(out, layout, overwrite=overwrite, source=reader.path, job=job)
                )
                calibrated = () if prepared is None else prepared.items(plan, items)
                records = writer.records()
                mine = _share(plan, items, {*records, *(item.id for item in calibrated)}, reader, rank)
                left = [*mine, *(item for item in calibrated if item.id not in records)]
                if isinstance(reader, HubReader):
                    reader.require_space()
                    reader.expect((plan.tensors[item.tensor].spec.name, item.num_bytes) for item in mine)
                meet()  # nobody begins before all have seen what is left
            conversion = Conversion(plan, reader, writer, backend)
            conversion.run(items, left, mine, memory, progress)
            calibrating = None
            if prepared is not None:
                calibrating = prepared.run(plan, items, reader, writer, backend, progress, mixed_precision=mixed)
            return _publish(
                writer,
                items={item.id for item in items} | {*cache_items(plan, items)},
                report=lambda: make_report(
                    plan,
                    str(source),
                    memory=memory,
                    backend=backend,
                    output=str(out),
                    weights=conversion.weight_records(items),
                    calibration=calibrating,
                    seconds=time.perf_counter() - started,
                ),
                config={layout.last_file: config},
                copies={path.name: path for path in side_files(reader.path)},
            )


def _planned(
    plan: Plan, source: str, max_memory: int | str | None, workers: int | None, calibration: Calibration | None
) -> Report:
    """What a dry run returns."""
    backend = choose_backend()
    if calibration is not None:
        _check_calibration(calibration, plan, Rank.from_environment())
    memory = _memory(plan, backend, max_memory, workers, calibration)
    report = make_report(plan, source, memory=memory, backend=backend)
    bits = None if calibration is None else calibration.target_bits
    if bits is None:
        return report
    check_target(units_of(plan), bits)
    note = (
        f"--target-bits {bits:g}: weights of the decoder will get int4, FP8 or BF16 one by one, once they have been "
        "measured; shown is one scheme for all"
    )
    return dataclasses.replace(report, notes=(*report.notes, note))


def _require_room(repository: str, revision: str | None, out: Path, output_bytes: int) -> None:
    """Refuse full disks before weights are downloaded; headers and side files of the output are left out."""
    left = max(0, output_bytes - reserved_bytes(out))
    require_room({cache_folder(): bytes_to_download(repository, revision), out.resolve(): left})


def _require_disk(prepared: PreparedCalibration, plan: Plan, out: Path, max_shard_size: int) -> None:
    """Refuse a disk without room for output and hidden states, before either is begun."""
    folder = out.resolve()
    if not is_publishing(folder):
        prepared.require_disk(plan, folder, max(0, _layout(plan, max_shard_size).nbytes - reserved_bytes(folder)))


def _downloads(out: Path, rank: Rank) -> Path:
    """Where shards are downloaded to that are deleted after use: inside the output."""
    if rank.world_size > 1:
        raise UsageError("--delete-source-shards works in one process, since each would download every shard")
    return out / STAGING_NAME / DOWNLOAD_NAME


def _plan(
    reader: CheckpointReader,
    scheme: Scheme | None,
    storage: CheckpointFormat,
    model_parallel: int | None,
    kv_cache_scheme: KVCacheScheme | None,
    choices: Mapping[str, Choice] | None = None,
) -> Plan:
    if storage is CheckpointFormat.META_FP8 and model_parallel is None and isinstance(reader, MetaReader):
        model_parallel = reader.num_ranks
    config = Llama4Config.from_dict(reader.config)
    return make_plan(config, scheme, reader.tensors, storage, model_parallel, kv_cache_scheme, choices=choices)


def _memory(
    plan: Plan, backend: Backend, max_memory: int | str | None, workers: int | None, calibration: Calibration | None
) -> MemoryUse:
    """What a plan takes, calibration included."""
    memory = plan_memory(plan, work_items(plan), backend, max_memory, workers)
    return memory if calibration is None else with_calibration(memory, plan, calibration)


def _layout(plan: Plan, max_shard_size: int) -> Layout:
    if plan.format is CheckpointFormat.META_FP8:
        return layout_state_dicts(plan.outputs)
    return layout_shards(plan.outputs, max_shard_size)


def output_config(plan: Plan, reader: CheckpointReader | None = None) -> dict[str, Any]:
    """config.json of the output: the source's, in BF16, with an exact `quantization_config` if it is quantized.

    In Meta's layout: params.json, which says nothing of quantization; that of a source in this layout as it is.

    Raises:
        SchemeError: Meta's params.json cannot express the model.
    """
    if plan.format is CheckpointFormat.META_FP8:
        return dict(reader.params) if isinstance(reader, MetaReader) else params_of(plan.config)
    config = copy.deepcopy(dict(plan.config.raw))
    for section in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(section, dict):
            section.update({key: "bfloat16" for key in ("torch_dtype", "dtype") if key in section})
    if plan.format is CheckpointFormat.FBGEMM_FP8:
        config["quantization_config"] = fbgemm_fp8.quantization_config(plan.ignore)
    elif plan.is_mixed:
        schemes = {d.name: d.scheme for d in plan.decisions if d.scheme is not None}
        config["quantization_config"] = compressed_tensors.mixed_quantization_config(
            schemes, plan.ignore, plan.kv_cache_scheme
        )
    elif plan.scheme is not None:
        heads = [d.name for d in plan.decisions if d.role is Role.LM_HEAD and d.scheme is not None]
        config["quantization_config"] = compressed_tensors.quantization_config(
            plan.scheme, plan.ignore, heads, plan.kv_cache_scheme
        )
    return config


def _mixed_precision(
    plan: Plan,
    prepared: PreparedCalibration,
    reader: CheckpointReader,
    out: Path,
    mode: Resume,
    progress: Progress | None,
) -> MixedPrecisionRecord | None:
    """The schemes that an interrupted conversion in `out` has chosen, or those that a survey gives now.

    A resumed conversion never chooses again: another choice would be another output.
    """
    if prepared.settings.target_bits is None:
        return None
    found = None if mode is Resume.NEVER else found_fingerprint(out / STAGING_NAME)
    if found is not None:
        if found.get(MIXED_SECTION) is None:
            raise OutputError(
                f"{out}: the unfinished conversion in it was begun without --target-bits; run it as it was begun, or "
                "give --resume never to delete it and start anew"
            )
        record = parse_record(found[MIXED_SECTION])
        # With what is asked for now, so that another target is refused as all other differences are.
        return dataclasses.replace(record, target_bits=prepared.settings.target_bits)
    with os_errors(f"{out.parent}: cannot be created"):
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
    return prepared.choose_schemes(plan, reader, out.resolve().parent, progress)


def _check_calibration(calibration: Calibration, plan: Plan, rank: Rank, *, delete_source_shards: bool = False) -> None:
    """Raise UsageError for what does not go with calibration."""
    storage, scheme = plan.format, plan.scheme
    if calibration.target_bits is not None and (scheme is None or scheme.weights.type is not WeightType.INT4):
        raise UsageError("--target-bits chooses each weight's scheme from int4 up; drop --scheme, or give W4A16")
    if storage is not CheckpointFormat.COMPRESSED_TENSORS:
        raise UsageError(f"--format {storage} is written without calibration; use --algorithm rtn")
    if rank.world_size > 1:
        raise UsageError("calibration goes layer by layer in one process; without torchrun, or with --algorithm rtn")
    if delete_source_shards:
        raise UsageError(
            "calibration reads weights more than once; drop --delete-source-shards, or use --algorithm rtn"
        )


def _fingerprint(
    reader: CheckpointReader,
    plan: Plan,
    max_shard_size: int,
    prepared: PreparedCalibration | None,
    mixed: MixedPrecisionRecord | None,
) -> dict[str, Any]:
    """Everything that decides the bytes of the output."""
    copied = {path.name: _sha256(path) for path in side_files(reader.path)}
    return {
        "source": {**reader.facts, "copied": copied},
        "scheme": None if plan.scheme is None else dataclasses.asdict(plan.scheme),
        "settings": {
            "format": plan.format,
            "max_shard_size": max_shard_size,
            **({} if plan.model_parallel is None else {"model_parallel": plan.model_parallel}),
        },
        **({} if prepared is None else {"calibration": prepared.fingerprint}),
        **({} if mixed is None else {MIXED_SECTION: dataclasses.asdict(mixed)}),
        "version": {"llama4_quant": __version__},
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _share(
    plan: Plan, items: Sequence[WorkItem], done: Collection[int], reader: CheckpointReader, rank: Rank
) -> list[WorkItem]:
    """What this process has to do: every `world_size`-th of what is left, from front to back of the files."""
    left = [item for item in items if item.id not in done][rank.rank :: rank.world_size]
    entries = [reader.tensors[tensor.spec.name] for tensor in plan.tensors]
    return sorted(left, key=lambda item: (entries[item.tensor].path.name, entries[item.tensor].start, item.id))


def _publish(
    writer: CheckpointWriter,
    *,
    items: Collection[int],
    report: Callable[[], Report],
    config: dict[str, dict[str, Any]],
    copies: dict[str, Path],
) -> Report:
    """Whichever process finds all items finished makes the output visible; the others wait for that."""
    while True:
        others = writer.others_alive()  # asked first: what they finish before they end is in their journals
        with writer.turn() as turn:
            if not turn.here:
                return Report.from_json(read_json(writer.out / REPORT_NAME))
            num_missing = len(set(items) - writer.records().keys())
            if not num_missing:
                made = report()
                writer.finish({REPORT_NAME: made.to_json(), **config}, copies)
                return made
        if not others:
            raise OutputError(
                f"{writer.out}: {num_missing} of {len(items)} pieces of work are missing, because another process of "
                "this conversion has ended; run it again: it resumes"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)
