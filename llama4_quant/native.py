"""C++ sources of this package as loaded libraries: compiled on first use with the machine's compiler, kept on disk.

A library is kept under `$XDG_CACHE_HOME/llama4-quant` (else `~/.cache/llama4-quant`), named by a digest of everything
that it depends on: sources, compiler and flags, and the CPU, whose instructions `-march=native` uses. Processes that
compile at once do the same work and the last rename wins. Without a place to keep it, it lives as long as the process.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeVar

Interface = TypeVar("Interface")
COMPILERS = ("c++", "g++", "clang++")
# The two -fno-... only let comparisons and square roots be vectorised; fast-math would change results.
FLAGS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti", "-Wno-psabi"),
    *("-shared", "-fPIC"),
)
_COMPILE_SECONDS = 180


class NativeUnavailableError(Exception):
    """There is no compiled library; the message says why, for the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """What is compiled into one library with a plain C interface.

    Attributes:
        name: the library's file name, before the digest.
        package: where the sources lie; they are found by its name, also in a zip file.
        sources: file names; the first is compiled, and includes the others.
        flags: added to FLAGS. `-march=native` is fine: the digest covers the CPU.
    """

    name: str
    package: str
    sources: tuple[str, ...]
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A loaded library.

    Attributes:
        path: where it lies.
        compiler: what compiled it: the first line of its --version.
        functions: its symbols. Calls release the GIL.
    """

    path: Path
    compiler: str
    functions: ctypes.CDLL


def compile_and_load(program: Program, interface: Callable[[Compiled], Interface]) -> Interface:
    """Compile `program`, or take it from the cache.

    Args:
        program: what to compile.
        interface: makes what is returned of the loaded library.

    Raises:
        NativeUnavailableError: no compiler, or it failed, or this machine is not little-endian.
    """
    if sys.byteorder != "little":
        raise NativeUnavailableError("the machine is big-endian")
    command = _compiler()
    version = _run([command[0], "--version"]).splitlines()[0]
    command += [*FLAGS, *program.flags]
    sources = _sources(program)
    key = hashlib.sha256("\0".join([version, *command, _cpu()]).encode() + b"\0".join(sources.values())).hexdigest()
    path = _folder() / f"{program.name}-{key[:24]}.so"
    try:
        if not path.exists():
            _compile(command, sources, path)
        return interface(Compiled(path, version, ctypes.CDLL(str(path))))
    except (OSError, AttributeError) as error:  # the latter: a function is not in it
        raise NativeUnavailableError(f"cannot load the compiled kernels: {error}") from error


def _sources(program: Program) -> dict[str, bytes]:
    package = resources.files(program.package)
    try:
        return {name: package.joinpath(name).read_bytes() for name in program.sources}
    except OSError as error:
        raise NativeUnavailableError(f"the installation lacks the source of the kernels: {error}") from error


def _compiler() -> list[str]:
    """The command in $CXX, else the first compiler found."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    names = (wanted[0],) if wanted else COMPILERS
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise NativeUnavailableError(f"no C++ compiler found (looked for {', '.join(names)})")
    return [found, *wanted[1:]]


def _compile(command: list[str], sources: dict[str, bytes], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for name, source in sources.items():
            Path(folder, name).write_bytes(source)
        built = Path(folder, "kernels.so")
        _run([*command, str(Path(folder, next(iter(sources)))), "-o", str(built)])
        built.replace(path)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise NativeUnavailableError(f"{command[0]} failed with status {done.returncode}: {first}")
    return done.stdout


def _cpu() -> str:
    """What -march=native looks at."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    first = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    kept = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU ")
    return "\n".join([platform.machine(), *(line for line in first if line.startswith(kept) and "MHz" not in line)])


def _folder() -> Path:
    """A folder that nobody else can write to, since what lies in it is executed."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama4-quant"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if (
            found.st_uid == os.getuid()
            and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            and os.access(folder, os.W_OK)
        ):
            return folder
    except (OSError, RuntimeError):
        pass
    return Path(_process_folder().name)


@functools.cache
def _process_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="llama4-quant-")
