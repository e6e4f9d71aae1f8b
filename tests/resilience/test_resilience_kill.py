"""kill -9 at random moments: however often, the output that is finished at last has the same bytes."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from checkpoints import make_checkpoint, text_config
from resilience.resilience_tools import STAGING, contents, run

from llama4_quant.convert import convert
from llama4_quant.errors import OutputError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("kill") / "bf16", text_config(num_hidden_layers=2))


def storm(
    source: Path,
    out: Path,
    num_kills: int,
    world_size: int,
    seconds_per_item: float,
    storage: str = "compressed-tensors",
) -> dict[str, int]:
    done = run("storm", source, out, num_kills, 17, world_size, seconds_per_item, storage)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] >= num_kills
    assert counts["finished"] >= 1
    assert counts["resumed"] > counts["kills"] // 4  # most of them had something to continue
    return counts


def test_a_few_kills(source: Path, tmp_path: Path) -> None:
    storm(source, tmp_path / "out", 8, 1, 0.02)


@pytest.mark.slow
def test_a_hundred_kills(source: Path, tmp_path: Path) -> None:
    storm(source, tmp_path / "out", 110, 1, 0.03)


@pytest.mark.parametrize("num_kills", [6, pytest.param(110, marks=pytest.mark.slow)])
def test_kills_while_metas_layout_is_written(tmp_path: Path, num_kills: int) -> None:
    """Archives have checksums of tensors that were written in pieces, by several processes one after another."""
    source = make_checkpoint(tmp_path / "bf16", text_config(num_hidden_layers=3))
    storm(source, tmp_path / "out", num_kills, 1, 0.02, "meta-fp8")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_kills_of_one_of_several_processes(source: Path, tmp_path: Path) -> None:
    storm(source, tmp_path / "out", 100, 2, 0.06)


@pytest.mark.parametrize("num_times", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_random_moments(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_times: int
) -> None:
    """Every time another write fails, from there on; then some space is free again, until the next time."""
    convert(source, tmp_path / "reference", max_shard_size="200kB")
    expected, out = contents(tmp_path / "reference"), tmp_path / "out"
    rng, real, left = random.Random(3), os.pwrite, [0]

    def pwrite(*arguments: object) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    failures = resumed = 0
    while failures < num_times:
        left[0] = rng.randrange(60)
        resumed += (out / STAGING).exists()
        try:
            convert(source, out, max_shard_size="200kB", workers=2)
        except OutputError as error:
            assert "no space left" in str(error)  # noqa: PT017 - either outcome is right
            failures += 1
            assert not (out / "config.json").exists()
        else:
            assert contents(out) == expected
            shutil.rmtree(out)
    left[0] = 10**6
    convert(source, out, max_shard_size="200kB")
    assert contents(out) == expected
    assert resumed > num_times // 2
