"""Weights that the Hub keeps in Xet storage, with the real `hf_xet` against a local server: the same bytes.

In processes of their own: hf_xet reads its settings from the environment when it starts.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint.checkpoint_files import tree
from checkpoint.hub_server import LocalHub, running_hub, whole
from checkpoint.xet_server import XetStorage, running_xet
from checkpoints import random_tensors, text_config, write_checkpoint
from huggingface_hub import constants

from llama4_quant.conversion.convert import convert

pytest.importorskip("hf_xet")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = text_config(vocab_size=4096)
    return write_checkpoint(tmp_path_factory.mktemp("xet") / "model", config, random_tensors(config), 4)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("xet") / "local"
    convert(model, out)
    return (out / "manifest.json").read_bytes()


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with running_hub(tree(model), tmp_path / "home", monkeypatch) as served:
        yield served


@pytest.fixture
def xet(hub: LocalHub) -> Iterator[XetStorage]:
    with running_xet() as storage:
        hub.xet = storage
        yield storage


def start(tmp_path: Path, *flags: str, **changes: str) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    home = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "user"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "llama4_quant.cli", "convert", "org/model", "-o", str(tmp_path / "out"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=kept | home | {"OMP_NUM_THREADS": "1"} | changes,
    )


def run(tmp_path: Path, *flags: str, **changes: str) -> None:
    process = start(tmp_path, *flags, **changes)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def names(model: Path) -> list[str]:
    return sorted(path.name for path in model.glob("*.safetensors"))


@pytest.mark.parametrize("flags", [[], ["--delete-source-shards"]])
def test_weights_come_from_xet_storage(
    hub: LocalHub, xet: XetStorage, model: Path, tmp_path: Path, expected: bytes, flags: list[str]
) -> None:
    xet.cuts = [1000, 50_000]  # and connections that are cut are no matter
    run(tmp_path, *flags)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == expected
    assert whole(hub) == []
    assert xet.cuts == []
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert weights <= xet.num_sent < 2 * weights
    if flags:  # nor does hf_xet keep a copy: shard by shard means that the disk holds a few shards
        kept = sum(path.stat().st_size for path in (tmp_path / "user").rglob("*") if path.is_file())
        assert kept < weights / 10


def test_xet_can_be_switched_off(hub: LocalHub, xet: XetStorage, model: Path, tmp_path: Path, expected: bytes) -> None:
    run(tmp_path, HF_HUB_DISABLE_XET="1")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == expected
    assert sorted(whole(hub)) == names(model)
    assert xet.asked == []


def test_without_xet_headers_weights_come_over_http(
    hub: LocalHub, model: Path, tmp_path: Path, expected: bytes
) -> None:
    """As from a mirror: hf_xet is installed, and not used."""
    run(tmp_path)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == expected
    assert sorted(whole(hub)) == names(model)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_download_from_xet_storage(
    xet: XetStorage, tmp_path: Path, expected: bytes, number: signal.Signals
) -> None:
    xet.stalled.set()
    process = start(tmp_path, "--delete-source-shards")
    deadline = time.monotonic() + 100
    while not any("content" in path for path in xet.asked):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        os.sched_yield()  # `time.sleep` does nothing in these tests
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    xet.stalled.clear()
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    run(tmp_path, "--delete-source-shards")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == expected
