"""What a conversion would do, without reading a weight."""

import dataclasses
from pathlib import Path

from llama4_quant.calibration.mixed import check_target, units_of
from llama4_quant.calibration.settings import Calibration
from llama4_quant.checkpoint.source import open_headers
from llama4_quant.config import Llama4Config
from llama4_quant.conversion.output import output_config
from llama4_quant.conversion.ranks import Rank
from llama4_quant.conversion.report import Report, make_report
from llama4_quant.conversion.request import Request
from llama4_quant.formats.choice import CheckpointFormat, choose_format
from llama4_quant.planning.plan import Plan
from llama4_quant.quantizers.backend import choose_backend
from llama4_quant.scheme import Scheme


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
    return _of_config(request, Path(source)) if config_only else dry_run_of_headers(request)


def dry_run_of_headers(request: Request) -> Report:
    """Plan from config.json and the headers of a source.

    Raises:
        Llama4QuantError: as for `convert`.
    """
    with open_headers(request.source, request.revision) as reader:
        plan = request.plan(reader)
        output_config(plan, reader)
        return _planned(request, plan)


def _of_config(request: Request, path: Path) -> Report:
    """Plan from config.json alone."""
    config = Llama4Config.from_file(path / "config.json" if path.is_dir() else path)
    plan = request.plan_of(config, None, request.model_parallel)
    output_config(plan)
    return _planned(request, plan)


def _planned(request: Request, plan: Plan) -> Report:
    backend = choose_backend()
    request.check_calibration(Rank.from_environment())
    report = make_report(plan, request.source, memory=request.memory(plan, backend), backend=backend)
    bits = None if request.calibration is None else request.calibration.target_bits
    if bits is None:
        return report
    check_target(units_of(plan), bits)
    note = (
        f"--target-bits {bits:g}: weights of the decoder will get int4, FP8 or BF16 one by one, once they have been "
        "measured; shown is one scheme for all"
    )
    return dataclasses.replace(report, notes=(*report.notes, note))
