"""Converting: each contender in a process of its own, with a cache of what it wrote.

A conversion is cached in a folder named after the digest of everything that it depends on: source checkpoint,
calibration tokens, settings, seed, and the version of who converts (of ours, the sources). So slow peers run once, and
changing the held-out text or our own code does not run them again.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .child_process import ChildFailedError, run
from .contenders import Contender, System

REPOSITORY = Path(__file__).resolve().parents[3]
WORKERS = {
    System.LLM_COMPRESSOR: Path(__file__).with_name("worker_llmcompressor.py"),
    System.AUTO_ROUND: Path(__file__).with_name("worker_autoround.py"),
}
OUR_WORKER = Path(__file__).with_name("worker_ours.py").resolve()
"""For settings of ours that have no name on the command line."""
DISTRIBUTIONS = {System.LLM_COMPRESSOR: "llmcompressor", System.AUTO_ROUND: "auto-round"}
OUR_SOURCES = ("llama4_quant", "cli", "calibration")
PRINT_VERSIONS = """
import sys
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in sys.argv[1:]))
"""
SOURCE_SUFFIXES = frozenset({".py", ".cpp", ".h"})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all conversions of a benchmark share.

    Attributes:
        model: the BF16 checkpoint.
        model_digest: `checkpoint_digest` of it.
        tokens: JSONL of calibration samples.
        tokens_digest: of the samples.
        seed: for whatever a contender draws.
        cache: where conversions are kept.
        pythons: python of each peer's environment; a peer without one does not take part.
        fresh: convert again what is cached, for timings at another load of the machine.
    """

    model: Path
    model_digest: str
    tokens: Path
    tokens_digest: str
    seed: int
    cache: Path
    pythons: Mapping[System, Path]
    fresh: bool = False


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A finished conversion.

    Attributes:
        folder: what is cached of it.
        facts: those of `Finished`, `steps` (seconds by the contender's own clock), `version`, `cpus`, `threads`.
    """

    folder: Path
    facts: Mapping[str, Any]

    @property
    def checkpoint(self) -> Path:
        """What the contender wrote."""
        return self.folder / "checkpoint"


class UnavailableError(RuntimeError):
    """A contender that cannot take part here; the message says why."""


def convert(contender: Contender, setting: Setting) -> Conversion:
    """Run a contender, or take what it wrote last time.

    Raises:
        UnavailableError: it has no environment, or our command lacks an option.
        ChildFailedError: it failed.
    """
    version = _version(contender, setting)
    key = {
        "model": setting.model_digest, "tokens": setting.tokens_digest, "seed": setting.seed, "version": version,
        "system": contender.system, "settings": contender.settings,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = setting.cache / f"{contender.name}-{digest}"
    record = folder / "conversion.json"
    if setting.fresh or not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        facts = (_convert_ours if contender.system is System.OURS else _convert_theirs)(contender, setting, folder)
        (folder / "key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps(facts | {"version": version, "cpus": os.cpu_count()}), encoding="utf-8")
        partial.rename(record)
    return Conversion(folder=folder, facts=json.loads(record.read_text(encoding="utf-8")))


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over config.json and all weights of a checkpoint."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _convert_ours(contender: Contender, setting: Setting, folder: Path) -> dict[str, Any]:
    out = folder / "checkpoint"
    if "job" in contender.settings:
        command = [sys.executable, OUR_WORKER, _write_job(contender, setting, folder)]
    else:
        arguments = our_arguments(contender.settings["arguments"], setting.tokens)
        command = [sys.executable, "-m", "llama4_quant.cli", "convert", setting.model, "-o", out, *arguments]
    # Python puts a script's folder first in its path, not the working directory.
    finished = run(command, log=folder / "log.txt", cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY)})
    report = json.loads((out / "quantization_report.json").read_text(encoding="utf-8"))
    return {
        **asdict(finished), "steps": {"convert": report["seconds"]}, "threads": os.environ.get("OMP_NUM_THREADS"),
    }  # fmt: skip


def _write_job(contender: Contender, setting: Setting, folder: Path) -> Path:
    job = folder / "job.json"
    described = {
        "model": str(setting.model.resolve()), "tokens": str(setting.tokens.resolve()),
        "output": str((folder / "checkpoint").resolve()), **contender.settings["job"],
    }  # fmt: skip
    job.write_text(json.dumps(described), encoding="utf-8")
    return job.resolve()


def our_arguments(arguments: Sequence[str], tokens: Path) -> list[str]:
    """Complete `convert`'s arguments with the calibration tokens.

    Round-to-nearest needs none. Where `convert` has no --algorithm it only rounds to nearest, so `--algorithm rtn` is
    left out.

    Raises:
        UnavailableError: `convert` lacks an option that these arguments need.
    """
    options, chosen = convert_help(), list(arguments)
    algorithm = chosen[chosen.index("--algorithm") + 1]
    if algorithm == "rtn" and "--algorithm" not in options:
        at = chosen.index("--algorithm")
        del chosen[at : at + 2]
    if algorithm != "rtn":
        num_samples = len(tokens.read_text(encoding="utf-8").splitlines())
        chosen += ["--calibration", str(tokens.resolve()), "--num-calibration-samples", str(num_samples)]
    missing = [argument for argument in chosen if argument.startswith("--") and argument.split("=")[0] not in options]
    if missing:
        raise UnavailableError(f"`llama4-quant convert` has no {', '.join(missing)}")
    return chosen


@cache
def convert_help() -> str:
    """What `llama4-quant convert --help-all` says."""
    command = [sys.executable, "-m", "llama4_quant.cli", "convert", "--help-all"]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


def _convert_theirs(contender: Contender, setting: Setting, folder: Path) -> dict[str, Any]:
    job, result = folder / "job.json", folder / "result.json"
    described = {
        "model": str(setting.model.resolve()), "tokens": str(setting.tokens.resolve()), "seed": setting.seed,
        "output": str((folder / "checkpoint").resolve()), **contender.settings,
    }  # fmt: skip
    job.write_text(json.dumps(described), encoding="utf-8")
    command = [setting.pythons[contender.system], WORKERS[contender.system].resolve(), job.resolve(), result.resolve()]
    finished = run(command, log=folder / "log.txt", cwd=folder)  # some write logs where they are started
    if not result.exists():
        raise ChildFailedError(f"{contender.name} ended without a result; its log is {folder / 'log.txt'}")
    answer = json.loads(result.read_text(encoding="utf-8"))
    return {
        **asdict(finished), "steps": answer["seconds"], "threads": answer["threads"],
    }  # fmt: skip


def _version(contender: Contender, setting: Setting) -> str:
    if contender.system is System.OURS:
        return our_version()
    if contender.system not in setting.pythons:
        raise UnavailableError(f"no environment of {contender.system} was named")
    names = tuple(dict.fromkeys([DISTRIBUTIONS[contender.system], "transformers", "compressed-tensors"]))
    return distribution_versions(setting.pythons[contender.system], names)


@cache
def our_version() -> str:
    """A digest of our sources, so that a change of them is another version."""
    digest = hashlib.sha256()
    for folder in OUR_SOURCES:
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.suffix in SOURCE_SUFFIXES:
                digest.update(f"{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def distribution_versions(python: Path, names: tuple[str, ...]) -> str:
    """Versions of distributions in another environment.

    Raises:
        UnavailableError: it has not all of them.
    """
    try:
        done = subprocess.run([python, "-c", PRINT_VERSIONS, *names], check=True, capture_output=True, text=True)
    except (subprocess.CalledProcessError, OSError) as error:
        raise UnavailableError(f"{python}: expected an environment with {', '.join(names)}: {error}") from error
    return done.stdout.strip()
