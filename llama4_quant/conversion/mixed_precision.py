"""The schemes of mixed precision: chosen by a survey, once; a conversion that goes on keeps them."""

import dataclasses

from llama4_quant.calibration.mixed import parse_record
from llama4_quant.calibration.records import MixedPrecisionRecord
from llama4_quant.calibration.run import PreparedCalibration
from llama4_quant.checkpoint.files import os_errors
from llama4_quant.checkpoint.paths import STAGING_NAME
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.resume import Resume, found_fingerprint
from llama4_quant.conversion.request import Target
from llama4_quant.errors import OutputError
from llama4_quant.planning.plan import Plan
from llama4_quant.stream import Progress

MIXED_SECTION = "mixed_precision"
"""Of the fingerprint: what mixed precision chose, so that a resumed conversion goes on with that."""


def choose_or_resume(
    plan: Plan, prepared: PreparedCalibration, reader: CheckpointReader, target: Target, progress: Progress | None
) -> MixedPrecisionRecord | None:
    """The schemes that an interrupted conversion in `target` has chosen, or those that a survey gives now.

    A resumed conversion never chooses again: another choice would be another output.
    """
    if prepared.settings.target_bits is None:
        return None
    found = None if target.resume is Resume.NEVER else found_fingerprint(target.out / STAGING_NAME)
    if found is not None:
        if found.get(MIXED_SECTION) is None:
            raise OutputError(
                f"{target.out}: the unfinished conversion in it was begun without --target-bits; run it as it was "
                "begun, or give --resume never to delete it and start anew"
            )
        record = parse_record(found[MIXED_SECTION])
        # With what is asked for now, so that another target is refused as all other differences are.
        return dataclasses.replace(record, target_bits=prepared.settings.target_bits)
    parent = target.out.resolve().parent
    with os_errors(f"{target.out.parent}: cannot be created"):
        parent.mkdir(parents=True, exist_ok=True)
    return prepared.choose_schemes(plan, reader, parent, progress)
