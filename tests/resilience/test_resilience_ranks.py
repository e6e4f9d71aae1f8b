"""Several processes under torchrun: the bytes of one process, whatever happens to any of them."""

import os
import signal
from pathlib import Path

import pytest
from checkpoints import make_checkpoint, text_config
from resilience.resilience_tools import (
    STAGING,
    contents,
    count_items,
    journal_of,
    num_finished,
    run,
    start,
    wait_for_items,
)

from llama4_quant.checkpoint.journal import read_journals
from llama4_quant.conversion.convert import convert
from llama4_quant.errors import OutputError

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
SCHEME = ("--scheme", "FP8_DYNAMIC", "--max-shard-size", "200kB", "--workers", 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ranks") / "bf16", text_config(num_hidden_layers=2))


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("ranks") / "reference"
    convert(source, out, scheme="FP8_DYNAMIC", max_shard_size="200kB")
    return contents(out)


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_share_the_work(source: Path, tmp_path: Path, reference: dict[str, bytes], world_size: int) -> None:
    out = tmp_path / "out"
    done = run("run", source, out, 0.01, *SCHEME, launcher=(*TORCHRUN, "--nproc-per-node", str(world_size)))
    assert done.returncode == 0, done.stderr
    assert contents(out) == reference
    assert done.stdout.count("wrote ") == 1  # one of them talks


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_lost_process_loses_its_items_in_hand_only(
    source: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends the others when one is killed; the next launch has another number of processes."""
    out = tmp_path / "out"
    process = start("run", source, out, 0.15, *SCHEME, launcher=(*TORCHRUN, "--nproc-per-node", "2"))
    wait_for_items(process, out, 4)
    finished = num_finished(out)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (out / "config.json").exists()
    assert {path.name for path in (out / STAGING).glob("journal-*")} == {"journal-0.jsonl", "journal-1.jsonl"}
    assert num_finished(out) >= finished
    with pytest.raises(OutputError, match="the settings changed"):
        convert(source, out, scheme="FP8_DYNAMIC", resume="required")
    finished = read_journals(out / STAGING, journal_of(out)).keys()
    items = count_items(monkeypatch)
    convert(source, out, scheme="FP8_DYNAMIC", max_shard_size="200kB", resume="required")
    assert contents(out) == reference
    assert sorted([*items, *finished]) == list(range(len(items) + len(finished)))  # each once


def test_another_conversion_is_kept_out_while_processes_share_a_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("run", source, out, 0.2, *SCHEME, launcher=(*TORCHRUN, "--nproc-per-node", "2"))
    wait_for_items(process, out, 2)
    with pytest.raises(OutputError, match="another process is writing to this folder"):
        convert(source, out, scheme="FP8_DYNAMIC", resume="never")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    convert(source, out, scheme="FP8_DYNAMIC", max_shard_size="200kB", resume="required")
