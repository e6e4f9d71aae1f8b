"""Refusing disks that are too full, before anything dear is begun."""

import dataclasses
from contextlib import suppress
from pathlib import Path

from llama4_quant.calibration.run import PreparedCalibration
from llama4_quant.checkpoint.hub_cache import bytes_to_download, cache_folder, require_room
from llama4_quant.checkpoint.staging import is_publishing, reserved_bytes
from llama4_quant.conversion.dry_run import dry_run_of_headers
from llama4_quant.conversion.output import output_layout
from llama4_quant.conversion.request import Request, Target
from llama4_quant.errors import OtherLayoutError
from llama4_quant.planning.plan import Plan


def require_download_room(request: Request, out: Path) -> None:
    """Refuse full disks before a Hub repository's weights are downloaded.

    Headers and side files of the output are left out, and so is what calibration needs; it asks for itself. The plan of
    a repository in another layout is known once it is here.

    Raises:
        Llama4QuantError: as a dry run.
        OutputError: there is too little room.
    """
    with suppress(OtherLayoutError):
        ahead = dry_run_of_headers(dataclasses.replace(request, calibration=None))
        left = max(0, ahead.totals.bytes_out - reserved_bytes(out))
        needed = bytes_to_download(request.source, request.revision)
        require_room({cache_folder(): needed, out.resolve(): left})


def require_disk(prepared: PreparedCalibration, plan: Plan, target: Target) -> None:
    """Refuse a disk without room for output and hidden states, before either is begun.

    Raises:
        OutputError: there is too little room.
    """
    folder = target.out.resolve()
    if not is_publishing(folder):
        num_bytes = output_layout(plan, target.shard_size).nbytes
        prepared.require_disk(plan, folder, max(0, num_bytes - reserved_bytes(folder)))
