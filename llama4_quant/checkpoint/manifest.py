"""manifest.json: a SHA-256 for every byte of a checkpoint, so that a single flipped bit can be found, and placed.

    {"format": "llama4-quant-manifest", "version": 1,
     "shards": {name: {"size": 123, "header": [0, 88, sha256], "ranges": [[88, 120, sha256], [120, 123, sha256]]}},
     "files": {name: {"size": 123, "sha256": sha256}}}

The header (length included; of an archive, all that stands before the first tensor) and the ranges tile the file.
Ranges are what single pieces of work wrote, and in an archive what stands between and after the tensors, so no byte is
read again to make this. The manifest is canonical JSON: any changed byte of it is a changed value. It does not list
itself, nor the report of the conversion: that holds times, which differ from run to run, and carries its own checksum
(`self_checksum`), so that everything else in two outputs of the same job is equal byte for byte.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_quant.checkpoint.coverage import Coverage
from llama4_quant.checkpoint.json_files import read_json, shown
from llama4_quant.checkpoint.layout import Layout
from llama4_quant.checkpoint.paths import is_plain_name
from llama4_quant.checkpoint.resume import canonical_json
from llama4_quant.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
FORMAT = "llama4-quant-manifest"
VERSION = 1
CHECKSUM_KEY = "sha256"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRange:
    """Bytes `start` to `stop` of a file, and their SHA-256 (hexadecimal)."""

    start: int
    stop: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """A file: its size, and ranges that tile it."""

    name: str
    size: int
    ranges: tuple[FileRange, ...]


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 as it is written here: hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def make_manifest(
    layout: Layout,
    coverage: Coverage,
    frames: Sequence[Sequence[tuple[int, bytes]]],
    files: Mapping[str, tuple[int, str]],
) -> bytes:
    """The manifest of an output that is complete.

    Args:
        layout: the shards.
        coverage: what was written to them.
        frames: of each shard, what stands around its tensors: (start, bytes), the first at 0.
        files: (size, SHA-256) of every other file but the report and the manifest itself, by name.
    """
    ranges: list[list[list[Any]]] = [[] for _ in layout.shards]
    for name, placement in layout.placements.items():
        for part in coverage.ranges(name):
            ranges[placement.shard].append([placement.start + part.start, placement.start + part.stop, part.sha256])
    framed = [[[start, start + len(data), sha256(data)] for start, data in frame] for frame in frames]
    shards = {
        shard.filename: {"size": shard.nbytes, "header": frame[0], "ranges": sorted([*frame[1:], *parts])}
        for shard, frame, parts in zip(layout.shards, framed, ranges, strict=True)
    }
    others = {name: {"size": size, "sha256": digest} for name, (size, digest) in files.items()}
    return canonical_json({"format": FORMAT, "version": VERSION, "shards": shards, "files": others})


def read_manifest(folder: Path) -> tuple[FileDigest, ...]:
    """Read and check the manifest of a checkpoint: every file that it lists, with ranges that tile it.

    Raises:
        CheckpointError: there is none, or it is damaged or not one of ours.
    """
    path = folder / MANIFEST_NAME
    content = read_json(path, CheckpointError)
    version = content.get("version")
    if content.get("format") != FORMAT or type(version) is not int or version != VERSION:
        raise CheckpointError(f"{path}: expected format {FORMAT} version {VERSION}; use a newer llama4-quant")
    written = canonical_json(content)
    if path.stat().st_size != len(written) or path.read_bytes() != written:
        raise CheckpointError(f"{path}: a byte of the manifest itself has changed; convert again")
    try:
        shards = [_shard(name, record) for name, record in content["shards"].items()]
        files = [
            _file(name, record["size"], [(0, record["size"], record["sha256"])])
            for name, record in content["files"].items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise CheckpointError(f"{path}: the manifest is damaged ({shown(problem)}); convert again") from problem
    return (*shards, *files)


def with_self_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a checksum of itself under "sha256"."""
    rest = {key: value for key, value in content.items() if key != CHECKSUM_KEY}
    return {**rest, CHECKSUM_KEY: sha256(canonical_json(rest))}


def has_self_checksum(content: Mapping[str, Any]) -> bool:
    """Whether the content is unchanged since `with_self_checksum`."""
    return with_self_checksum(content) == content


def _shard(name: str, record: Mapping[str, Any]) -> FileDigest:
    return _file(name, record["size"], [record["header"], *record["ranges"]])


def _file(name: str, size: int, parts: Iterable[tuple[int, int, str]]) -> FileDigest:
    ranges = tuple(FileRange(start=start, stop=stop, sha256=digest) for start, stop, digest in parts)
    end = 0
    for part in ranges:
        if {type(part.start), type(part.stop)} != {int} or part.start != end or part.stop < part.start:
            raise ValueError(f"{shown(name)}: a range from {shown(part.start)} to {shown(part.stop)}, not from {end}")
        end = part.stop
    if end != size or type(size) is not int or not is_plain_name(name):
        raise ValueError(f"{shown(name)}: ranges end at {end} of {shown(size)}")
    return FileDigest(name=name, size=size, ranges=ranges)
