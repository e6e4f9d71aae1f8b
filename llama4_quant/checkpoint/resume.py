"""Whether an interrupted job may be continued: the fingerprint of everything that decides the bytes of an output.

The fingerprint is plain data in named sections, so that a refusal can say what differs. It is written to the staging
folder once the shards are reserved; a staging folder without it has nothing to continue.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from llama4_quant.checkpoint.files import os_errors, read_own
from llama4_quant.checkpoint.header import TensorEntry
from llama4_quant.checkpoint.json_files import MAX_JSON_BYTES, named, parse_json, shown
from llama4_quant.errors import OutputError, UsageError

FINGERPRINT_NAME = "fingerprint.json"
_MAX_NAMED = 4


class Resume(StrEnum):
    """What to do about an interrupted job in the output folder."""

    AUTO = "auto"
    """Continue it; begin anew if there is none; refuse if it is another job."""
    REQUIRED = "required"
    """Continue it, or refuse."""
    NEVER = "never"
    """Delete it and begin anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One resumable piece of work, possibly of several processes.

    Attributes:
        fingerprint: JSON data in named sections: everything that decides the bytes of the output.
        resume: what to do about an interrupted job.
        rank: number of this process among those that work together.
        world_size: how many work together.
        hopeless: errors after which continuing cannot help, so that nothing is kept.
    """

    fingerprint: Mapping[str, Any]
    resume: Resume = Resume.AUTO
    rank: int = 0
    world_size: int = 1
    hopeless: tuple[type[BaseException], ...] = ()


def parse_resume(text: str) -> Resume:
    """The mode that a user named.

    Raises:
        UsageError: there is no such mode.
    """
    if text not in set(Resume):
        raise UsageError(f"resume {text!r} is unknown; use one of {', '.join(Resume)}")
    return Resume(text)


def canonical_json(value: object) -> bytes:
    """The one spelling of JSON data: sorted keys, no spaces, a newline at the end."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode("utf-8")


def digest(fingerprint: Mapping[str, Any]) -> str:
    """SHA-256 of a fingerprint, hexadecimal."""
    return hashlib.sha256(canonical_json(fingerprint)).hexdigest()


def can_continue(folder: Path, job: Job, *, alone: bool) -> bool:
    """Whether to continue what is in the staging folder rather than to begin anew.

    Args:
        folder: the staging folder.
        job: what is to be done.
        alone: False if other processes of this launch work there already: then it must be the same job.

    Raises:
        OutputError: it is another job, or there is none and one is required.
    """
    path = folder / FINGERPRINT_NAME
    if alone and job.resume is Resume.NEVER:
        return False
    if not os.path.lexists(path):
        if job.resume is Resume.REQUIRED or not alone:
            raise OutputError(f"{folder.parent}: there is nothing to resume here; run without --resume required")
        return False
    found = found_fingerprint(folder)
    differences = tuple(_differences(found, json.loads(canonical_json(job.fingerprint))))
    if differences:
        raise OutputError(_refusal(folder.parent, differences))
    return True


def found_fingerprint(folder: Path) -> dict[str, Any] | None:
    """The fingerprint of the job that is in a staging folder; None if there is none.

    Raises:
        OutputError: it cannot be read, or is no JSON object.
    """
    path = folder / FINGERPRINT_NAME
    if not os.path.lexists(path):
        return None
    with os_errors(f"{path}: cannot be read"):
        return parse_json(read_own(path, MAX_JSON_BYTES), str(path), OutputError)


def source_facts(tensors: Mapping[str, TensorEntry], others: Sequence[Path]) -> dict[str, Any]:
    """What a source is, by file: size, time of change, and for weights a digest of what the header says."""
    records: dict[Path, list[Any]] = {path: [] for path in others}
    for entry in tensors.values():
        facts = [entry.name, entry.dtype, entry.shape, entry.start]
        records.setdefault(entry.path, []).append(facts)
    facts_of: dict[str, Any] = {}
    for path, facts in records.items():
        status = path.stat()
        facts_of[path.name] = {"size": status.st_size, "changed_ns": status.st_mtime_ns}
        if facts:
            facts_of[path.name]["tensors"] = hashlib.sha256(canonical_json(facts)).hexdigest()
    return facts_of


def _differences(old: object, new: object, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Path of keys and "was ..., is ..." for every value that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), (*where, named(key)))
    elif old != new:
        yield where, f"was {shown(old)}, is {shown(new)}"


def _refusal(out: Path, differences: Sequence[tuple[tuple[str, ...], str]]) -> str:
    sections = list(dict.fromkeys(where[0] for where, _ in differences))[:_MAX_NAMED]
    named = "; ".join(f"{' '.join(where)[:200]} {what}" for where, what in differences[:_MAX_NAMED])
    more = f"; and {len(differences) - _MAX_NAMED} more" if len(differences) > _MAX_NAMED else ""
    return (
        f"{out}: the unfinished conversion in it cannot be resumed, because the {' and the '.join(sections)} changed "
        f"({named}{more}); run it as it was begun, or give --resume never to delete it and start anew"
    )
