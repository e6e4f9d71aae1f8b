"""Large writes go past the kernel's cache where they can, and the bytes of the file never depend on whether they do."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint.checkpoint_files import same_bits

from llama4_quant.checkpoint.buffers import PAGE_BYTES
from llama4_quant.checkpoint.layout import OutputTensor, layout_shards
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.shards import DIRECT_BYTES
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.errors import OutputError

Pwrite = Callable[[int, memoryview, int], int]
CONFIG = {"config.json": {"model_type": "llama4"}}
NUM_BYTES = DIRECT_BYTES + 2 * PAGE_BYTES + 13


def is_direct(fd: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """On a file system that takes direct writes."""
    probe = tmp_path / "probe"
    probe.write_bytes(b"")
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_DIRECT))
    except (OSError, AttributeError):
        pytest.skip("no direct writes here")
    return tmp_path


def bytes_at(remainder: int) -> torch.Tensor:
    """Random bytes in memory whose address leaves this remainder by PAGE_BYTES."""
    memory = torch.randint(
        256, (NUM_BYTES + PAGE_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    first = (remainder - memory.data_ptr()) % PAGE_BYTES
    return memory[first : first + NUM_BYTES]


def written(folder: Path, pwrite: Pwrite, monkeypatch: pytest.MonkeyPatch, shift: int = 0) -> list[tuple[int, int]]:
    """Write and check a tensor among others; returns (position, bytes) of the calls that were direct.

    Args:
        folder: where.
        pwrite: stands in for the system's.
        shift: bytes by which the memory lies otherwise than the file.
    """
    names = ("before", "t", "after")
    sizes = {"before": 5, "t": NUM_BYTES, "after": 7}
    outputs = [OutputTensor(name=name, dtype=torch.uint8, shape=(sizes[name],)) for name in names]
    calls: list[tuple[int, int]] = []

    def spy(fd: int, view: memoryview, position: int) -> int:
        count = pwrite(fd, view, position)
        if is_direct(fd):
            calls.append((position, count))
        return count

    with CheckpointWriter(folder / "out", layout_shards(outputs, 10**9)) as writer, monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", spy)
        values = {name: torch.full((sizes[name],), 255, dtype=torch.uint8) for name in names}
        values["t"] = bytes_at(writer.position("t") + shift)
        for name in names:
            writer.write(name, values[name])
        writer.finish(CONFIG, {})
    with CheckpointReader.open(folder / "out") as reader:
        assert all(same_bits(reader.read(name), expected) for name, expected in values.items())
    return calls


def test_whole_pages_go_directly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (call,) = written(folder, os.pwrite, monkeypatch)
    assert call[0] % PAGE_BYTES == 0
    assert NUM_BYTES // PAGE_BYTES * PAGE_BYTES - PAGE_BYTES <= call[1] <= NUM_BYTES
    assert call[1] % PAGE_BYTES == 0


def test_memory_that_lies_otherwise_goes_through_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(folder, os.pwrite, monkeypatch, shift=1) == []


@pytest.mark.parametrize("step", [PAGE_BYTES, 3 * PAGE_BYTES, PAGE_BYTES + 512, 512])
def test_direct_writes_that_are_cut_short_are_continued(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    real = os.pwrite

    def short(fd: int, view: memoryview, position: int) -> int:
        return real(fd, view[:step] if is_direct(fd) else view, position)

    calls = written(folder, short, monkeypatch)
    assert {count for _, count in calls[:-1]} <= {step}
    assert len(calls) == 1 or step % PAGE_BYTES == 0


def test_a_file_system_that_refuses_direct_writes_gets_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def refuse(fd: int, view: memoryview, position: int) -> int:
        if is_direct(fd):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, view, position)

    assert written(folder, refuse, monkeypatch) == []
    shutil.rmtree(folder / "out")
    monkeypatch.delattr(os, "O_DIRECT")
    outputs = [OutputTensor(name="t", dtype=torch.uint8, shape=(NUM_BYTES,))]
    with CheckpointWriter(folder / "out", layout_shards(outputs, 10**9)) as writer:
        writer.write("t", values := bytes_at(writer.position("t")))
        writer.finish(CONFIG, {})
    with CheckpointReader.open(folder / "out") as reader:
        assert same_bits(reader.read("t"), values)


def test_a_full_disk_is_an_error_and_not_a_reason_to_try_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def full(fd: int, view: memoryview, position: int) -> int:
        if is_direct(fd):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, view, position)

    with pytest.raises(OutputError, match="t cannot be written: no space left"):
        written(folder, full, monkeypatch)
    assert not (folder / "out").exists()
