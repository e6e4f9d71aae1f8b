"""Continuing an interrupted conversion: by itself if it is the same one, never if it is another."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint.checkpoint_files import tree
from checkpoints import make_checkpoint, text_config
from resilience.resilience_tools import (
    STAGING,
    contents,
    count_items,
    journal_of,
    num_finished,
    start,
    wait_for_items,
)

from llama4_quant.checkpoint import staging as staging_module
from llama4_quant.checkpoint.journal import read_journals
from llama4_quant.checkpoint.manifest import has_self_checksum, read_manifest, sha256
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.run import Conversion
from llama4_quant.errors import CheckpointError, OutputError, QuantizationError, UsageError
from llama4_quant.inspect import inspect
from llama4_quant.scheme import preset
from llama4_quant.work import WorkItem


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "bf16", text_config(num_hidden_layers=2))


@pytest.fixture
def reference(source: Path, tmp_path: Path) -> dict[str, bytes]:
    convert(source, tmp_path / "reference", scheme="FP8_DYNAMIC")
    return contents(tmp_path / "reference")


class Stop(Exception):  # noqa: N818 - it stands for any surprise
    pass


def interrupt(source: Path, out: Path, after: int = 9, error: BaseException | None = None, **settings: object) -> None:
    """Convert until so many items are finished."""
    done = Conversion._do
    count = 0

    def counted(self: Conversion, item: WorkItem, buffer: torch.Tensor) -> None:
        nonlocal count
        if count == after:
            raise error or Stop
        count += 1
        done(self, item, buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Conversion, "_do", counted)
        with pytest.raises(type(error) if error else Stop):
            convert(source, out, workers=1, **({"scheme": "FP8_DYNAMIC"} | settings))


def test_an_interrupted_conversion_continues_by_itself(
    source: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(source, out)
    assert not (out / "config.json").exists()
    with pytest.raises(CheckpointError, match="unfinished output of llama4-quant"):
        inspect(out)
    interrupt(source, out, after=5)
    assert num_finished(out) == 14
    before = read_journals(out / STAGING, journal_of(out))
    items = count_items(monkeypatch)
    done = []
    report = convert(source, out, scheme="FP8_DYNAMIC", resume="required", progress=lambda _, n: done.append(n))
    assert len(before) == 14
    assert sorted([*items, *before]) == list(range(14 + len(items)))  # each once
    assert sum(done) == report.totals.bytes_in
    assert contents(out) == reference
    assert not (out / STAGING).exists()
    # What the interrupted runs measured is in the report of the last one.
    assert all((w.relative_error is None) == (w.scheme == "bf16") for w in report.weights)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scheme": "W4A16"}, r"because the scheme changed \(scheme name was 'FP8_DYNAMIC', is 'W4A16'"),
        ({"scheme": preset("FP8_DYNAMIC", quantize=["attention"])}, r"scheme changed \(scheme quantize was \[\]"),
        ({"scheme": preset("FP8_DYNAMIC", observer="absmax")}, r"scheme weights observer was 'mse', is 'absmax'"),
        ({"max_shard_size": "100kB"}, r"the settings changed \(.*max_shard_size was 5000000000, is 100000"),
    ],
)
def test_another_conversion_is_refused_with_what_differs(
    source: Path, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    out = tmp_path / "out"
    interrupt(source, out)
    before = tree(out)
    for resume in ("auto", "required"):
        with pytest.raises(OutputError, match=named) as caught:
            convert(source, out, **({"scheme": "FP8_DYNAMIC", "resume": resume} | changes))
        assert "--resume never to delete it and start anew" in str(caught.value)
    assert {name: data for name, data in tree(out).items() if not name.endswith("lock")} == {
        name: data for name, data in before.items() if not name.endswith("lock")
    }
    convert(source, out, **({"scheme": "FP8_DYNAMIC", "resume": "never"} | changes))
    convert(source, tmp_path / "fresh", **({"scheme": "FP8_DYNAMIC"} | changes))
    assert contents(out) == contents(tmp_path / "fresh")


def touch_weights(source: Path) -> None:
    path = source / "model-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def touch_config(source: Path) -> None:
    path = source / "config.json"
    path.write_text(path.read_text().replace("1e-05", "1e-06"))


@pytest.mark.parametrize(
    ("change", "file"), [(touch_weights, "model-00001-of-00002.safetensors"), (touch_config, "config.json")]
)
def test_another_source_is_refused(source: Path, tmp_path: Path, change: Callable[[Path], None], file: str) -> None:
    out = tmp_path / "out"
    interrupt(source, out)
    change(source)
    with pytest.raises(OutputError, match=rf"because the source changed \(source {file} changed_ns was \d+, is \d+"):
        convert(source, out, scheme="FP8_DYNAMIC")


def test_required_without_anything_to_resume(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nothing to resume here"):
        convert(source, tmp_path / "out", resume="required")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="use one of auto, required, never"):
        convert(source, tmp_path / "out", resume="always")


def test_a_staging_folder_without_a_fingerprint_is_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / STAGING / "model-00001-of-00001.safetensors").mkdir(parents=True)
    convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / STAGING).exists()


def test_a_weight_that_cannot_be_quantized_keeps_nothing(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", error=QuantizationError("a weight is nan"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_disk_that_fills_up_is_survived(
    source: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    out = tmp_path / "out"
    for calls_before in (40, 0, 3, 17) if call == "pwrite" else (0,):
        left, real = [calls_before], getattr(os, call)

        def full(*arguments: object) -> object:
            left[0] -= 1  # noqa: B023
            if left[0] < 0:  # noqa: B023
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OutputError, match="no space left"):
                convert(source, out, scheme="FP8_DYNAMIC", workers=2)
        assert (out / STAGING).exists()
    convert(source, out, scheme="FP8_DYNAMIC", resume="required")
    assert contents(out) == reference


def test_space_that_is_reserved_already_is_not_asked_for_again(
    source: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(source, tmp_path / "out")
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr(staging_module.shutil, "disk_usage", lambda _: usage)
    convert(source, tmp_path / "out", scheme="FP8_DYNAMIC")
    assert contents(tmp_path / "out") == reference


def test_a_torn_journal_loses_its_last_item_only(
    source: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(source, out)
    journal = out / STAGING / "journal-0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    last = max(n for n, line in enumerate(lines) if b'"item"' in line)
    journal.write_bytes(b"".join(lines[:last]) + lines[last][:-20] + b"\0" * 7)
    finished = read_journals(out / STAGING, journal_of(out))
    assert len(finished) == 8
    items = count_items(monkeypatch)
    convert(source, out, scheme="FP8_DYNAMIC", workers=1)
    assert sorted([*items, *finished]) == list(range(8 + len(items)))
    assert contents(out) == reference


def test_after_a_crash_of_the_machine_only_synced_items_count(
    source: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(source, out)  # nothing was synced in so short a time
    monkeypatch.setattr("llama4_quant.checkpoint.journal.boot_id", lambda: "another boot")
    for path in (out / STAGING).glob("*.safetensors"):
        with path.open("r+b") as file:  # the crash has lost the bytes
            file.write(bytes(path.stat().st_size))
    items = count_items(monkeypatch)
    convert(source, out, scheme="FP8_DYNAMIC")
    assert len(items) == len(set(items)) > 9
    assert contents(out) == reference


@pytest.mark.parametrize("step", range(6))
def test_a_failure_while_publishing_is_continued(
    source: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    out, real, left = tmp_path / "out", Path.replace, [step]

    def fail(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OutputError, match="Input/output error"):
            convert(source, out, scheme="FP8_DYNAMIC")
    assert not (out / "config.json").exists()
    items = count_items(monkeypatch)
    convert(source, out, scheme="FP8_DYNAMIC", resume="required")
    assert items == []
    assert contents(out) == reference


def test_overwriting_is_resumed_too(source: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    convert(source, out, scheme="W4A16")
    old = contents(out)
    interrupt(source, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name in old} == old
    assert num_finished(out) == 9
    convert(source, out, scheme="FP8_DYNAMIC", overwrite=True, resume="required")
    assert contents(out) == reference


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_items_in_hand(
    source: Path, tmp_path: Path, reference: dict[str, bytes], number: signal.Signals
) -> None:
    out = tmp_path / "out"
    arguments = ("--scheme", "FP8_DYNAMIC", "--workers", 1)
    process = start("run", source, out, 0.3, *arguments)
    wait_for_items(process, out, 2)
    before = num_finished(out)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert ("interrupted" if number == signal.SIGINT else "terminated") in err
    assert f"what is finished is kept in {out}; the same command continues it" in err
    assert "Traceback" not in err
    # The item in hand when the signal came was finished; 0.3 s an item leave no time for many more.
    assert before + 1 <= num_finished(out) <= before + 3
    convert(source, out, scheme="FP8_DYNAMIC", resume="required")
    assert contents(out) == reference


def test_the_lock_of_a_live_process_is_respected_and_that_of_a_dead_one_is_not(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("run", source, out, 0.3, "--scheme", "FP8_DYNAMIC", "--workers", 1)
    wait_for_items(process, out, 1)
    for resume in ("auto", "never"):
        with pytest.raises(OutputError, match=rf"another process is writing .* \(process {process.pid} on "):
            convert(source, out, scheme="FP8_DYNAMIC", resume=resume)
    process.kill()
    process.communicate()
    convert(source, out, scheme="FP8_DYNAMIC", resume="required")


def test_the_manifest_tiles_every_file(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, max_shard_size="200kB")
    files = {file.name: file for file in read_manifest(out)}
    assert {*files, "manifest.json", "quantization_report.json"} == {path.name for path in out.iterdir()}
    for name, file in files.items():
        data = (out / name).read_bytes()
        assert file.size == len(data)
        assert all(sha256(data[part.start : part.stop]) == part.sha256 for part in file.ranges)
    assert has_self_checksum(json.loads((out / "quantization_report.json").read_bytes()))
    manifest = (out / "manifest.json").read_bytes()
    for position in range(0, len(manifest), 97):
        damaged = bytearray(manifest)
        damaged[position] ^= 1
        (out / "manifest.json").write_bytes(damaged)
        try:
            changed = {file.name: file for file in read_manifest(out)} != files
        except CheckpointError:
            changed = True
        assert changed, position
