"""Choosing between the compiled kernels and the plain path, and compiling them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama4_quant.errors import UsageError
from llama4_quant.quantizers.backend import ENVIRONMENT_VARIABLE, BackendName, choose_backend
from llama4_quant.quantizers.native import Library, NativeUnavailableError, build
from llama4_quant.scheme import preset

CHOOSE = "from llama4_quant.quantizers.backend import choose_backend as c; b = c(); print(b.name, '|', b.detail)"


def chosen(**environment: str) -> str:
    """What a fresh process chooses."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", CHOOSE], env=variables, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_plain_path_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("plain").name is BackendName.PLAIN
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "plain")
    assert choose_backend().name is BackendName.PLAIN
    assert choose_backend().library is None


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(UsageError, match="'fastest'; use one of auto, compiled, plain"):
        choose_backend()


def test_without_a_compiler_the_plain_path_runs_and_says_why(tmp_path: Path) -> None:
    found = chosen(CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert found == "plain | no C++ compiler found (looked for no-such-compiler)"


def script(path: Path, body: str) -> Path:
    """A stand-in for a compiler; `body` runs when it is asked to compile."""
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {path.name} 1.0 && exit 0\n{body}\n')
    path.chmod(0o700)
    return path


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        return build()
    except NativeUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def calls(tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Compile by copying `library` into an empty cache under `tmp_path`; the file that is returned counts, in bytes."""
    log = tmp_path / "calls"
    body = f'while [ "$1" != -o ]; do shift; done\nprintf x >> {log}\ncp {library.path} "$2"'
    monkeypatch.setenv("CXX", str(script(tmp_path / "copy", body)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return log


def test_a_compiler_that_fails_leaves_the_plain_path(tmp_path: Path) -> None:
    compiler = script(tmp_path / "broken", 'echo "error: no memory" >&2; exit 1')
    found = chosen(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    assert found == f"plain | {compiler} failed with status 1: error: no memory"


def test_a_compiler_that_makes_other_arithmetic_is_found_out(tmp_path: Path, library: Library) -> None:
    """Scales divided by 7 instead of 7.5: the library loads and runs, but its bytes are not ours."""
    real = os.environ.get("CXX", "c++")
    edit = 'case "$f" in */kernels.cpp) sed -i "s/7[.]5f/7.0f/" "${f%.cpp}.h";; esac'
    body = f'for f; do {edit}; done\nexec {real} "$@" -O0'
    found = chosen(CXX=str(script(tmp_path / "wrong", body)), XDG_CACHE_HOME=str(tmp_path))
    assert found == "plain | compiled kernels give other bytes than the plain path for int4 g32 (wrong 1.0)"


def test_a_library_is_compiled_once(tmp_path: Path, calls: Path) -> None:
    first, second = build(), build()
    assert first.path == second.path
    assert list((tmp_path / "llama4-quant").iterdir()) == [first.path]
    assert calls.stat().st_size == 1


def test_other_flags_make_another_library(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build()
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -mavx2")
    assert build().path != first.path
    assert calls.stat().st_size == 2


@pytest.mark.usefixtures("calls")
def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "llama4-quant"
    folder.mkdir()
    folder.chmod(0o777)
    assert build().path.parent != folder
    assert list(folder.iterdir()) == []


def test_a_damaged_library_leaves_the_plain_path(tmp_path: Path, calls: Path) -> None:
    library = build().path
    library.unlink()  # a new file: this process may have the old one mapped, and must not see it shrink
    library.write_bytes(b"not a library")
    found = chosen(CXX=os.environ["CXX"], XDG_CACHE_HOME=str(tmp_path))
    assert found.startswith("plain | cannot load the compiled kernels: ")


def test_the_plain_backend_packs_and_measures() -> None:
    scheme = preset("W4A16").weights
    weight = torch.linspace(-1, 1, 256).view(2, 128).to(torch.bfloat16)
    packed = choose_backend("plain").quantize(weight, scheme)
    assert packed.codes.shape == (2, 16)
    assert packed.codes.dtype is torch.int32
    assert packed.scale.dtype is torch.bfloat16
    assert packed.error.squared_weight == float(weight.double().square().sum())
