"""The number of workers and the cap on memory change the speed and nothing else; memory stays under the cap."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from click.testing import CliRunner
from resilience.resilience_tools import ENVIRONMENT, ROOT, contents

from llama4_quant.cli.convert import convert_command
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.dry_run import dry_run
from llama4_quant.errors import UsageError
from llama4_quant.quantizers.backend import ENVIRONMENT_VARIABLE, BackendName, choose_backend


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("workers") / "bf16")


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_BLOCK"])
def test_same_bytes_whatever_the_workers_and_the_cap(source: Path, tmp_path: Path, scheme: str) -> None:
    smallest = dry_run(source, scheme=scheme).memory.smallest
    found = []
    for number, settings in enumerate(
        ({"workers": 1}, {"workers": 2}, {"workers": 4, "max_memory": "64GiB"}, {"max_memory": smallest})
    ):
        report = convert(source, tmp_path / str(number), scheme=scheme, **settings)
        found.append(contents(tmp_path / str(number)))
        assert report.memory.num_workers <= settings.get("workers", 1)
    assert found[0] == found[1] == found[2] == found[3]


def test_a_cap_that_is_too_small_names_the_smallest_that_works(source: Path, tmp_path: Path) -> None:
    memory = dry_run(source).memory
    assert memory.smallest <= memory.predicted <= memory.limit
    with pytest.raises(UsageError, match=f"give --max-memory {memory.smallest // 2**20}MiB or more"):
        convert(source, tmp_path / "out", max_memory=memory.smallest - 2**20)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", max_memory=f"{memory.smallest // 2**20}MiB")
    with pytest.raises(UsageError, match="--workers 0: expected at least 1"):
        convert(source, tmp_path / "other", workers=0)


def test_a_dry_run_says_what_memory_it_will_use(source: Path) -> None:
    memory = dry_run(source, workers=1).memory
    ran = CliRunner().invoke(convert_command, [str(source), "--dry-run", "--workers", "1"])
    assert f"for 1 worker; the smallest --max-memory is {memory.smallest // 2**20}MiB" in ran.stdout


def test_maverick_is_planned_within_two_gib() -> None:
    config = Path(__file__).parents[1] / "data" / "maverick.json"
    memory = dry_run(config, config_only=True, max_memory="2GiB").memory
    assert memory.num_workers >= 1
    assert memory.predicted <= 2 * 2**30


def test_the_compiled_quantizers_need_less_memory_than_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Maverick's expert slices of 160 MiB, the plain ones make codes of a byte each before they pack them."""
    if choose_backend().name is BackendName.PLAIN:
        pytest.skip("no compiled kernels")
    config = Path(__file__).parents[1] / "data" / "maverick.json"
    compiled = dry_run(config, config_only=True, scheme="W4A16").memory
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, BackendName.PLAIN)
    plain = dry_run(config, config_only=True, scheme="W4A16").memory
    assert compiled.per_worker + 40 * 2**20 < plain.per_worker


@pytest.mark.parametrize("backend", [BackendName.AUTO, BackendName.PLAIN])
@pytest.mark.parametrize(
    ("scheme", "storage"),
    [("W4A16", "compressed-tensors"), ("FP8_DYNAMIC", "compressed-tensors"), ("FP8_DYNAMIC", "meta-fp8")],
)
def test_peak_memory_stays_under_the_cap(tmp_path: Path, scheme: str, storage: str, backend: str) -> None:
    """A tensor of 256 MiB in slices of 16 MiB, in a process of its own, at the smallest cap that works."""
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "memory.py"), "--folder", str(tmp_path)]
    sizes = ["--experts", "16", "--hidden", "1024", "--intermediate", "4096", "--caps", "smallest", "240MiB"]
    output = tmp_path / "result.json"
    done = subprocess.run(
        [*command, *sizes, "--schemes", scheme, "--format", storage, "--observer", "absmax", "--output", str(output)],
        check=False, capture_output=True, text=True, env={**ENVIRONMENT, ENVIRONMENT_VARIABLE: backend},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["largest_tensor_bytes"] == 16 * 1024 * 8192 * 2
    for row in result["rows"]:
        assert row["peak_bytes"] <= row["predicted_bytes"] <= row["cap_bytes"] < result["largest_tensor_bytes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json"]
