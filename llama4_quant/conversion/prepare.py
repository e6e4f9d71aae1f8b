"""What is settled before the first weight is converted: the plan, its memory, the calibration's data."""

from collections.abc import Callable
from dataclasses import dataclass

from llama4_quant.calibration.mixed import choices_of
from llama4_quant.calibration.records import MixedPrecisionRecord
from llama4_quant.calibration.run import PreparedCalibration, prepare
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.conversion.mixed_precision import choose_or_resume
from llama4_quant.conversion.report import Report, make_report
from llama4_quant.conversion.request import Request, Target
from llama4_quant.conversion.room import require_disk
from llama4_quant.planning.plan import Plan
from llama4_quant.quantizers.backend import Backend, choose_backend
from llama4_quant.stream import Progress
from llama4_quant.work import MemoryUse


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """A conversion that can begin.

    Attributes:
        calibration: its data, found and drawn; None rounds to nearest.
        mixed: the choice of mixed precision, which the plan has; None: one scheme for all.
    """

    plan: Plan
    memory: MemoryUse
    backend: Backend
    calibration: PreparedCalibration | None = None
    mixed: MixedPrecisionRecord | None = None


def prepare_conversion(
    request: Request,
    target: Target,
    reader: CheckpointReader,
    *,
    on_plan: Callable[[Report], None] | None,
    progress: Progress | None,
) -> Preparation:
    """Plan, and with calibration draw its data and choose schemes.

    Args:
        request: what to make.
        target: where; it is not written to.
        reader: the source.
        on_plan: called with the report of the plan, before data is drawn.
        progress: told of what a survey reads.

    Raises:
        Llama4QuantError: as for `convert`.
    """
    plan, backend = request.plan(reader), choose_backend()
    request.check_calibration(target.rank, delete_source_shards=target.delete_source_shards)
    memory = request.memory(plan, backend)
    if on_plan is not None:
        on_plan(make_report(plan, request.source, memory=memory, backend=backend))
    if request.calibration is None:
        return Preparation(plan=plan, memory=memory, backend=backend)
    prepared = prepare(request.calibration, reader)
    require_disk(prepared, plan, target)
    mixed = choose_or_resume(plan, prepared, reader, target, progress)
    if mixed is not None:
        plan = request.plan(reader, choices_of(plan, mixed))
        memory = request.memory(plan, backend)
        require_disk(prepared, plan, target)
    return Preparation(plan=plan, memory=memory, backend=backend, calibration=prepared, mixed=mixed)
