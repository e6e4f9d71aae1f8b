"""The files of a converted checkpoint against its manifest: every byte, nothing missing, nothing foreign."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from llama4_quant.checkpoint.json_files import dump_json, read_json
from llama4_quant.checkpoint.manifest import MANIFEST_NAME, FileDigest, has_self_checksum, read_manifest
from llama4_quant.checkpoint.paths import STAGING_NAME
from llama4_quant.conversion.report import REPORT_NAME
from llama4_quant.errors import CheckpointError
from llama4_quant.stream import Progress
from llama4_quant.verification.findings import Problem

READ_BYTES = 16 * 2**20


def listed_files(folder: Path) -> tuple[FileDigest, ...]:
    """The files of a converted checkpoint, as its manifest has them.

    Raises:
        CheckpointError: there is no manifest, and the message says why that may be; or it is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected the folder of a converted checkpoint, and there is none")
    if not (folder / MANIFEST_NAME).exists():
        raise CheckpointError(f"{folder}: {_without_manifest(folder)}")
    return read_manifest(folder)


def _without_manifest(folder: Path) -> str:
    if (folder / STAGING_NAME).is_dir():
        return "an unfinished conversion; run the same `llama4-quant convert` again to continue it, and then verify"
    return (
        f"there is no {MANIFEST_NAME}, so this is not what `llama4-quant convert` writes, or the file was lost; "
        "only outputs of convert can be verified"
    )


def check_files(folder: Path, files: tuple[FileDigest, ...], progress: Progress | None) -> Iterator[Problem]:
    """Every file against its ranges in the manifest; `progress` is told the bytes of each."""
    for file in files:
        yield from _check_file(folder / file.name, file)
        if progress is not None:
            progress(file.name, file.size)
    known = {file.name for file in files} | {MANIFEST_NAME, REPORT_NAME}
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            yield Problem(where=path.name, what="is not in the manifest; something else put it here")
    yield from _check_report(folder / REPORT_NAME)


def _check_file(path: Path, expected: FileDigest) -> Iterator[Problem]:
    if not path.is_file():
        yield Problem(where=path.name, what="is missing")
        return
    size = path.stat().st_size
    if size != expected.size:
        yield Problem(where=path.name, what=f"has {size:,} bytes, expected {expected.size:,}")
        return
    with path.open("rb", buffering=0) as file:
        for part in expected.ranges:
            digest, left = hashlib.sha256(), part.stop - part.start
            while left and (data := file.read(min(READ_BYTES, left))):
                digest.update(data)
                left -= len(data)
            if digest.hexdigest() != part.sha256:
                yield Problem(where=path.name, what=f"bytes {part.start:,} to {part.stop:,} are not what was written")


def _check_report(path: Path) -> Iterator[Problem]:
    try:
        content = read_json(path, CheckpointError)
    except CheckpointError as error:
        yield Problem(where=path.name, what=str(error))
        return
    # Bytes as well as values: 1e-05 and 1E-05 are one value, and so are decimals that differ in the 17th digit.
    written = dump_json(content)
    if not has_self_checksum(content) or path.stat().st_size != len(written) or path.read_bytes() != written:
        yield Problem(where=path.name, what="is not what was written: its checksum does not fit")
