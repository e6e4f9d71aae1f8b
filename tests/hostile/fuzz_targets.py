"""What is fuzzed: which file of which sound checkpoint is damaged how, and what is then done with the folder."""

import hashlib
import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from checkpoint.checkpoint_files import INDEX
from hostile.cases import Bases
from hostile.mutations import mutate_bytes, mutate_json
from hostile.output_cases import JOURNAL, line

import llama4_quant
from llama4_quant.checkpoint.manifest import MANIFEST_NAME
from llama4_quant.checkpoint.paths import STAGING_NAME
from llama4_quant.checkpoint.resume import FINGERPRINT_NAME, canonical_json
from llama4_quant.config import Llama4Config
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.dry_run import dry_run
from llama4_quant.conversion.report import REPORT_NAME
from llama4_quant.inspect import inspect
from llama4_quant.runtime.processor import ProcessorSettings
from llama4_quant.runtime.sampling import GenerationSettings
from llama4_quant.verification.verify import verify

SHARD = "model-00001-of-00002.safetensors"
Mutate = Callable[[bytes, random.Random], bytes]


class UndetectedError(Exception):
    """Verification found a checkpoint whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One kind of case.

    Attributes:
        base: the sound checkpoint.
        files: one of them is damaged.
        mutate: how.
        use: what is done with the folder of the case, in which the checkpoint is `model` or `out` (see `place`).
        place: where the checkpoint lies.
        weight: how often this target comes, beside others.
    """

    name: str
    base: str
    files: tuple[str, ...]
    mutate: Mutate
    use: Callable[[Path, random.Random], object]
    place: str = "model"
    weight: int = 1


def _header(data: bytes, rng: random.Random) -> bytes:
    """Damage the header of a safetensors file, and keep its length right most of the time."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.15:
        return mutate_bytes(data[: 8 + length], rng) + data[8 + length :]
    header = mutate_json(data[8 : 8 + length], rng)
    claimed = len(header) if rng.random() < 0.9 else rng.choice([0, 1, len(header) - 1, 2**63, 2**64 - 1, 100_000_001])
    return max(0, claimed).to_bytes(8, "little") + header + data[8 + length :]


def _pickle(data: bytes, rng: random.Random) -> bytes:
    """Damage the pickle in an archive, or the archive."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for record in old.infolist():
            content = old.read(record)
            if record.filename.endswith("data.pkl"):
                content = mutate_bytes(content, rng)
            new.writestr(zipfile.ZipInfo(record.filename), content)  # its time of change is 1980
    return out.getvalue()


def _journal(data: bytes, rng: random.Random) -> bytes:
    """Damage the lines of a journal; their checksums are right most of the time."""
    sound = data.split(b"\n")[:-1]
    lines = list(sound)
    for _ in range(rng.choice([1, 1, 3])):
        number = rng.randrange(len(lines))
        changed = mutate_json(sound[number].partition(b" ")[2], rng).replace(b"\n", b" ")
        lines[number] = line(changed)[:-1] if rng.random() < 0.9 else lines[number][:17] + changed
    return b"\n".join(lines) + b"\n"


def _canonical(data: bytes, rng: random.Random) -> bytes:
    """Damage a manifest, and spell it as a manifest has to be spelled, where that is possible."""
    changed = mutate_json(data, rng)
    try:
        return canonical_json(json.loads(changed))
    except (ValueError, RecursionError):
        return changed


def _open(root: Path, rng: random.Random) -> None:
    """What reads headers; now and then what reads everything."""
    model = root / "model"
    inspect(model)
    if rng.random() < 0.5:
        llama4_quant.load(model)
    if rng.random() < 0.1:
        convert(model, root / "out", workers=1)


def _plan(root: Path, rng: random.Random) -> None:
    path = root / "model" / "config.json"
    dry_run(path, scheme=rng.choice(["W4A16", "FP8_DYNAMIC", "FP8_BLOCK"]), config_only=True)
    _open(root, rng)


def _open_quantized(root: Path, rng: random.Random) -> None:
    inspect(root / "model")
    llama4_quant.load(root / "model")


def _verify(root: Path, rng: random.Random) -> None:
    """Damage is a result here, not an error."""
    result = verify(root / "out", source=root / "model" if rng.random() < 0.2 else None)
    if result.is_whole:
        raise UndetectedError


def _resume(root: Path, rng: random.Random) -> None:
    convert(root / "model", root / "out", workers=1)


def _settings(root: Path, rng: random.Random) -> None:
    config = Llama4Config.from_file(root / "model" / "config.json")
    GenerationSettings.from_folder(root / "model")
    assert config.vision is not None
    ProcessorSettings.from_folder(root / "model", config.vision)


_target = partial(Target, place="model")
TARGETS = (
    _target(name="header", base="bf16", files=(SHARD,), mutate=_header, use=_open, weight=12),
    _target(name="header, quantized", base="w4a16", files=(SHARD,), mutate=_header, use=_open_quantized, weight=4),
    _target(name="index", base="bf16", files=(INDEX,), mutate=mutate_json, use=_open, weight=8),
    _target(name="config", base="bf16", files=("config.json",), mutate=mutate_json, use=_plan, weight=10),
    _target(name="config, images", base="vision", files=("config.json",), mutate=mutate_json, use=_plan, weight=6),
    _target(
        name="config, w4a16", base="w4a16", files=("config.json",), mutate=mutate_json, use=_open_quantized, weight=6
    ),
    _target(name="config, fp8", base="fp8", files=("config.json",), mutate=mutate_json, use=_open_quantized, weight=4),
    _target(name="params.json", base="meta", files=("params.json",), mutate=mutate_json, use=_open, weight=4),
    _target(name="pickle", base="meta", files=("consolidated.00.pth",), mutate=_pickle, use=_open, weight=8),
    _target(
        name="settings",
        base="vision",
        files=("generation_config.json", "preprocessor_config.json", "processor_config.json"),
        mutate=mutate_json,
        use=_settings,
        weight=3,
    ),
    Target(
        name="verify",
        base="w4a16",
        files=(MANIFEST_NAME, REPORT_NAME, INDEX, "config.json"),
        mutate=mutate_json,
        use=_verify,
        place="out",
        weight=3,
    ),
    Target(
        name="manifest", base="w4a16", files=(MANIFEST_NAME,), mutate=_canonical, use=_verify, place="out", weight=3
    ),
    Target(name="verify, header", base="w4a16", files=(SHARD,), mutate=_header, use=_verify, place="out", weight=2),
    Target(
        name="journal",
        base="partial",
        files=(f"{STAGING_NAME}/{JOURNAL}",),
        mutate=_journal,
        use=_resume,
        place="out",
        weight=2,
    ),
    Target(
        name="fingerprint",
        base="partial",
        files=(f"{STAGING_NAME}/{FINGERPRINT_NAME}",),
        mutate=mutate_json,
        use=_resume,
        place="out",
    ),
)


def choose(seed: int, number: int, only: str | None = None) -> tuple[Target, random.Random]:
    """Target and generator of a case: the same for the same seed and number."""
    rng = random.Random(hashlib.sha256(f"{seed}:{number}".encode()).digest())
    targets = [target for target in TARGETS if only in {None, target.name}]
    return rng.choices(targets, [target.weight for target in targets])[0], rng


def prepare(target: Target, rng: random.Random, bases: Bases, root: Path) -> tuple[str, bool]:
    """Make the folder of a case; returns the name of the file that is damaged, and whether it is."""
    bases.put(target.base, root / target.place)
    if target.place == "out":
        bases.put("bf16", root / "model")
    file = rng.choice(target.files)
    path = root / target.place / file
    sound = path.read_bytes()
    damaged = target.mutate(sound, rng)
    path.write_bytes(damaged)
    return file, damaged != sound


def clear(root: Path) -> None:
    """Remove what a case left in its folder, but not the victim."""
    for name in ("model", "out"):
        shutil.rmtree(root / name, ignore_errors=True)
