"""The end of a conversion: one of the processes that share it makes the output visible, the others see that."""

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from llama4_quant.checkpoint.json_files import read_json
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.conversion.report import REPORT_NAME, Report
from llama4_quant.errors import OutputError

SECONDS_BETWEEN_LOOKS = 0.5


def publish(
    writer: CheckpointWriter,
    *,
    items: Collection[int],
    report: Callable[[], Report],
    config: dict[str, dict[str, Any]],
    copies: dict[str, Path],
) -> Report:
    """Whichever process finds all items finished makes the output visible; the others wait for that.

    Args:
        writer: of the output.
        items: numbers of all items of the plan.
        report: makes the report, once all items are finished.
        config: the file that says what the checkpoint is, by its name.
        copies: by file name, what is copied from the source.

    Raises:
        OutputError: items are missing, and whoever had them is gone; or the disk is full.
    """
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
