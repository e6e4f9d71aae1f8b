"""kill -9 at random moments: however often, the output that is finished at last has the same bytes."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint, text_config
from resilience.resilience_tools import ENVIRONMENT, ROOT, STAGING, contents

from llama4_quant.conversion.convert import convert
from llama4_quant.errors import OutputError

NUM_FULL = 30


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("kill") / "bf16", text_config(num_hidden_layers=2))


@pytest.mark.parametrize(
    ("kind", "num_failures", "storage"),
    [
        ("kill", 20, "compressed-tensors"),
        (
            "kill",
            10,
            "meta-fp8",
        ),  # checksums of archives are combined from those of pieces that several processes wrote
        pytest.param("torchrun", 4, "compressed-tensors", marks=pytest.mark.slow),
        ("full-disk", 20, "compressed-tensors"),
    ],
)
def test_storms(kind: str, num_failures: int, storage: str, tmp_path: Path) -> None:
    """A few of each kind; `python tests/resilience/storm.py` does a hundred."""
    if kind == "full-disk" and subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no private namespace, so no small file system; the test below injects the error instead")
    command = [sys.executable, ROOT / "tests" / "resilience" / "storm.py", "--only", kind, "--json"]
    done = subprocess.run(
        [*command, "--num-failures", str(num_failures), "--format", storage, "--folder", str(tmp_path)],
        check=False, capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["failures"] == sum(result["hits"].values()) == num_failures
    assert result["compared"] >= 1
    in_the_work = sum(number for phase, number in result["hits"].items() if phase.startswith("to "))
    assert in_the_work >= num_failures // 2
    assert result["resumed"] >= num_failures // 3


def test_a_disk_that_is_full_at_random_moments(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Injected: every time another write fails, from there on; then some space is free again, until the next time."""
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
    while failures < NUM_FULL:
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
    assert resumed > NUM_FULL // 2
