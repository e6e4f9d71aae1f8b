"""Outputs in which somebody has put things: staging folders to resume from, and finished checkpoints to verify."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.cases import Bases, Case
from hostile.folder_cases import edit_json

from llama4_quant.checkpoint.manifest import MANIFEST_NAME
from llama4_quant.checkpoint.paths import STAGING_NAME
from llama4_quant.checkpoint.resume import FINGERPRINT_NAME, canonical_json, digest
from llama4_quant.conversion.report import REPORT_NAME

JOURNAL = "journal-0.jsonl"
SHARD = "model-00001-of-00001.safetensors"
FOREIGN = "expected a file made by llama4-quant, found"


def line(text: bytes) -> bytes:
    """A line of a journal with the right checksum."""
    return hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n"


def session(staging: Path) -> bytes:
    """The line that begins a session of the job in this staging folder."""
    job = digest(json.loads((staging / FINGERPRINT_NAME).read_bytes()))
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return line(json.dumps({"session": job, "boot": boot}).encode())


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _second_name(path: Path) -> None:
    """A hard link to somebody's file, which is as long as what was there."""
    victim = path.parents[2] / "victim.bin"
    os.link(victim, path)


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


THINGS: dict[str, Callable[[Path], object]] = {
    "link": _link("../../victim.bin"),
    "second name": _second_name,
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "link to /dev/zero": _link("/dev/zero"),
}


def _staged(name: str, file: str, make: Callable[[Path], object], message: str) -> Case:
    """An interrupted output in whose staging folder `file` is replaced; `make` gets its path."""

    def change(root: Path, bases: Bases) -> None:
        bases.put("bf16", root / "model")
        path = bases.put("partial", root / "out") / STAGING_NAME / file
        size = path.stat().st_size if path.exists() else 0
        if file.endswith(".safetensors"):
            (root / "victim.bin").write_bytes(bytes(size))
        path.unlink(missing_ok=True)
        make(path)

    return Case(name=f"staging: {name}", make=change, commands=("convert",), message=message)


def _record(**fields: object) -> Callable[[Path], object]:
    """A journal with one record of every item, all alike."""

    def write(path: Path) -> None:
        records = (json.dumps({"item": item, "ranges": [], "notes": [], **fields}) for item in range(1000))
        path.write_bytes(session(path.parent) + b"".join(line(record.encode()) for record in records))

    return write


UNREADABLE_LINES = {
    "a list": b"[]",
    "a number": b"1",
    "not JSON": b"{",
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "not UTF-8": b'{"item": "\xff"}',
    "no fields": b"{}",
    "item a string": b'{"item": "1", "ranges": [], "notes": []}',
    "item a list": b'{"item": [1], "ranges": [], "notes": []}',
    "ranges a number": b'{"item": 1, "ranges": 1, "notes": []}',
    "range too short": b'{"item": 1, "ranges": [["a", 1]], "notes": []}',
    "range of strings": b'{"item": 1, "ranges": [["a", "0", "1", "x", null]], "notes": []}',
    "range of floats": b'{"item": 1, "ranges": [["a", 0.0, 1.5, "x", null]], "notes": []}',
    "range backwards": b'{"item": 1, "ranges": [["a", 2, 1, "x", null]], "notes": []}',
    "range of 4,000 digits": b'{"item": 1, "ranges": [["a", 0, ' + b"9" * 4000 + b', "x", null]], "notes": []}',
    "synced a string": b'{"synced": "x"}',
    "synced of 4,000 digits": b'{"synced": ' + b"9" * 4000 + b"}",
    "session a list": b'{"session": [1], "boot": {}}',
    "item of 4,000 digits": b'{"item": ' + b"9" * 4000 + b', "ranges": [], "notes": []}',
}
"""Lines with a right checksum, after which a journal is not believed: the conversion does those items again."""


def _staging_cases() -> list[Case]:
    cases = [
        _staged(f"{file} is a {name}", file, make, f"{FOREIGN}|bytes from the interrupted run, and the file is missing")
        for file in ("lock", FINGERPRINT_NAME, JOURNAL, "journal-7.jsonl", SHARD)
        for name, make in THINGS.items()
        if (file, name) != (SHARD, "link to /dev/zero")  # the file system says that it is a device, not its target
    ]
    fingerprint = (FINGERPRINT_NAME, lambda content: lambda path: path.write_bytes(content))
    strange = b'{"\\u001b[2J": {"' + b"x" * 10**6 + b'": 1}}'
    return [
        *cases,
        _staged("journal of a terabyte", JOURNAL, _huge, "expected at most"),
        _staged("fingerprint of a terabyte", FINGERPRINT_NAME, _huge, "expected at most"),
        _staged(
            "fingerprint that is deep", fingerprint[0], fingerprint[1](b'{"a":' + b"[" * 10**5), "nested more than 64"
        ),
        _staged(
            "fingerprint of another job", fingerprint[0], fingerprint[1](strange), "cannot be resumed, because the"
        ),
        _staged("journal with no notes", JOURNAL, _record(notes=None), "journal .* damaged|not complete"),
        _staged(
            "journal with strange notes", JOURNAL, _record(notes=[{"weight": []}]), "journal .* damaged|not complete"
        ),
        _staged(
            "journal with ranges beyond the output",
            JOURNAL,
            _record(ranges=[["model.norm.weight", 0, 2**62, "x", None]]),
            "bytes 0 to 4,611,686,018,427,387,904 are not part of the output",
        ),
        _staged(
            "journal with a terminal escape",
            JOURNAL,
            _record(ranges=[["model.\x1b[2J", 0, 1, "x", None]]),
            r"'model\.\\x1b\[2J': bytes 0 to 1 are not part of the output",
        ),
        _staged("journal that says all is done", JOURNAL, _record(), "tensors not complete|journal .* damaged"),
    ]


def _finished(
    name: str, change: Callable[[Path], object], message: str, commands: tuple[str, ...] = ("verify",)
) -> Case:
    """A finished output; `change` gets its folder."""

    def make(root: Path, bases: Bases) -> None:
        bases.put("bf16", root / "model")
        change(bases.put("w4a16", root / "out"))

    return Case(name=f"finished: {name}", make=make, commands=commands, message=message)


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the manifest, and spell it canonically."""

    def write(out: Path) -> None:
        content = json.loads((out / MANIFEST_NAME).read_bytes())
        change(content)
        (out / MANIFEST_NAME).write_bytes(canonical_json(content))

    return write


def _first_shard(**changes: object) -> Callable[[Path], None]:
    return _manifest(lambda content: next(iter(content["shards"].values())).update(changes))


def _replaced(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / file).unlink(missing_ok=True)
        make(out / file)

    return change


def _report(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda out: edit_json(out / REPORT_NAME, change)


def _finished_cases() -> list[Case]:
    damaged = "the manifest is damaged"
    both = ("verify", "verify-source")
    wrong_errors = _report(lambda report: [weight.update(relative_error="x") for weight in report["weights"]])
    return [
        _finished("no manifest", lambda out: (out / MANIFEST_NAME).unlink(), f"there is no {MANIFEST_NAME}"),
        _finished("manifest is a pipe", _replaced(MANIFEST_NAME, os.mkfifo), "not a file"),
        _finished("manifest is /dev/zero", _replaced(MANIFEST_NAME, _link("/dev/zero")), "not a file"),
        _finished("manifest of a terabyte", _replaced(MANIFEST_NAME, _huge), "at most"),
        _finished(
            "manifest of half a pair", _replaced(MANIFEST_NAME, lambda p: p.write_text('"\\ud800"')), "valid JSON"
        ),
        _finished("manifest of another version", _manifest(lambda c: c.update(version=2)), "expected format"),
        _finished("manifest without shards", _manifest(lambda c: c.pop("shards")), damaged),
        _finished("manifest with a list", _manifest(lambda c: c.update(shards=[1])), damaged),
        _finished("manifest with ranges of floats", _first_shard(header=[0.0, 88.0, "x"]), damaged),
        _finished("manifest with a hole", _first_shard(header=[1, 88, "x"]), damaged),
        _finished("manifest with a range backwards", _first_shard(header=[0, -1, "x"]), damaged),
        _finished("manifest with a size of 4,000 digits", _first_shard(size=10**4000), damaged),
        _finished(
            "manifest with a size of true",
            _manifest(lambda c: c["files"].update(a={"size": True, "sha256": ""})),
            damaged,
        ),
        _finished("manifest without checksums", _first_shard(ranges=[1]), damaged),
        _finished(
            "manifest that names ..",
            _manifest(lambda c: c["files"].update({"../victim.bin": {"size": 0, "sha256": ""}})),
            damaged,
        ),
        _finished(
            "manifest that names /etc",
            _manifest(lambda c: c["files"].update({"/etc/passwd": {"size": 0, "sha256": ""}})),
            damaged,
        ),
        _finished(
            "manifest with a terminal escape",
            _manifest(lambda c: c["files"].update({"\x1b[2J": {"size": 0, "sha256": ""}})),
            damaged,
        ),
        _finished(
            "shard of a terabyte",
            _replaced("model-00002-of-00002.safetensors", _huge),
            "has 1,099,511,627,776 bytes",
            both,
        ),
        _finished("shard is a pipe", _replaced("model-00002-of-00002.safetensors", os.mkfifo), "is missing", both),
        _finished("foreign link", _replaced("stray", _link("/etc/hostname")), "stray: is not in the manifest", both),
        _finished("report is a pipe", _replaced(REPORT_NAME, os.mkfifo), f"{REPORT_NAME}: .*not a file", both),
        _finished("report of strings", wrong_errors, "checksum does not fit", both),
        _finished("report without weights", _report(lambda r: r.update(weights=1)), "checksum does not fit", both),
        _finished(
            "report with NaN", _replaced(REPORT_NAME, lambda p: p.write_text('{"a": NaN}')), "NaN is not JSON", both
        ),
        _finished(
            "config of absurd size",
            lambda out: edit_json(out / "config.json", lambda c: c.update(hidden_size=10**12)),
            "hidden_size is 1000000000000",
            (*both, "load-out"),
        ),
        _finished(
            "config with a quantization of 1",
            lambda out: edit_json(out / "config.json", lambda c: c.update(quantization_config=1)),
            "quantization_config is 1, expected an object",
            (*both, "load-out"),
        ),
        _finished(
            "config of another model",
            lambda out: edit_json(out / "config.json", lambda c: c.update(num_hidden_layers=1)),
            "not part of the model",
            (*both, "load-out"),
        ),
    ]


def output_cases() -> list[Case]:
    """All of them."""
    return [*_staging_cases(), *_finished_cases()]
