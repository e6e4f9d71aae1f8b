"""The output folder: what may be replaced, what an interruption leaves, and when the old checkpoint goes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from checkpoint.checkpoint_files import num_descriptors, same_bits, tree, two_shards

from llama4_quant.checkpoint.layout import Layout, OutputTensor, layout_shards
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.errors import CheckpointError, OutputError

STAGING = ".llama4-quant-partial"
VALUES = torch.arange(100, dtype=torch.int32)
CONFIG = {"config.json": {"model_type": "llama4", "note": "é"}}


def small_layout(max_shard_size: int = 10**6) -> Layout:
    return layout_shards((OutputTensor(name=name, dtype=torch.int32, shape=(100,)) for name in "ab"), max_shard_size)


def convert(out: Path, *, overwrite: bool = False, source: Path | None = None, max_shard_size: int = 10**6) -> None:
    with CheckpointWriter(out, small_layout(max_shard_size), overwrite, source=source) as writer:
        writer.write("a", VALUES)
        writer.write("b", -VALUES)
        writer.finish(CONFIG, {})


def is_converted(out: Path) -> bool:
    with CheckpointReader.open(out) as reader:
        return same_bits(reader.read("a"), VALUES) and same_bits(reader.read("b"), -VALUES) and len(reader.tensors) == 2


def test_a_finished_output(tmp_path: Path) -> None:
    side = tmp_path / "tokenizer.json"
    side.write_bytes(b"tokens")
    out = tmp_path / "deep" / "out"
    with CheckpointWriter(out, small_layout()) as writer:
        writer.write("a", VALUES)
        writer.write("b", -VALUES)
        assert [path.name for path in out.iterdir()] == [STAGING]
        writer.finish({**CONFIG, "quantization_report.json": {"b": 1, "a": 2}}, {"tokenizer.json": side})
    files = tree(out)
    assert sorted(files) == [
        "config.json",
        "manifest.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "quantization_report.json",
        "tokenizer.json",
    ]
    assert files["tokenizer.json"] == b"tokens"
    assert files["quantization_report.json"] == b'{\n  "b": 1,\n  "a": 2\n}\n'
    assert json.loads(files["config.json"]) == CONFIG["config.json"]
    assert is_converted(out)
    modes = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert modes == {0o666 & ~_umask()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_files_appear_in_order_with_config_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    real = Path.replace

    def spy(self: Path, target: Path) -> Path:
        assert not (target.parent / "config.json").exists()
        moved.append(target.name)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    convert(tmp_path / "out", max_shard_size=600)
    assert moved == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "manifest.json",
        "model.safetensors.index.json",
        "config.json",
    ]


def test_every_file_is_synced_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        assert self.stat().st_ino in synced, f"{target.name} was not synced"
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    convert(tmp_path / "out", max_shard_size=600)
    assert {path.stat().st_ino for path in (tmp_path / "out").iterdir()} | {(tmp_path / "out").stat().st_ino} <= synced


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_leaving_early_leaves_nothing(tmp_path: Path, error: type[BaseException] | None) -> None:
    out = tmp_path / "out"

    def interrupted() -> None:
        with CheckpointWriter(out, small_layout()) as writer:
            writer.write("a", VALUES)
            if error is not None:
                raise error

    if error is None:
        interrupted()
    else:
        with pytest.raises(error):
            interrupted()
    assert not out.exists()
    out.mkdir()  # an empty folder of the user's stays
    with pytest.raises(ZeroDivisionError), CheckpointWriter(out, small_layout()):
        raise ZeroDivisionError
    assert list(out.iterdir()) == []


def test_descriptors_are_closed(tmp_path: Path) -> None:
    before = num_descriptors()
    convert(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path / "out2", small_layout()):
        raise ZeroDivisionError
    assert num_descriptors() == before


def test_existing_things_are_not_overwritten_unasked(tmp_path: Path) -> None:
    out = two_shards(tmp_path / "out")
    before = tree(out)
    with pytest.raises(OutputError, match="a checkpoint exists here; give --overwrite"):
        convert(out)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.jpg").write_bytes(b"1")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not empty, and not a checkpoint"):
            convert(other, overwrite=overwrite)
    file = tmp_path / "file"
    file.write_bytes(b"1")
    with pytest.raises(OutputError, match="expected a folder, found a file"):
        convert(file, overwrite=True)
    assert tree(out) == before
    assert tree(other) == {"holiday.jpg": b"1"}


def test_the_source_is_never_the_output(tmp_path: Path) -> None:
    source = two_shards(tmp_path / "source")
    before = tree(source)
    link = tmp_path / "link"
    link.symlink_to(source)
    for out in (source, link, tmp_path / "x" / ".." / "source"):
        with pytest.raises(OutputError, match="this is the source itself; choose another"):
            convert(out, overwrite=True, source=source)
    assert tree(source) == before


def test_overwrite_replaces_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    out = two_shards(tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    convert(out, overwrite=True, max_shard_size=600)
    assert is_converted(out)
    convert(out, overwrite=True)
    assert is_converted(out)
    assert {path.name for path in out.glob("model*")} == {
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    }
    assert (out / "notes.txt").read_text() == "mine"


def test_a_single_file_checkpoint_is_replaced_by_shards(tmp_path: Path) -> None:
    """transformers prefers model.safetensors to the index: a stale one would win."""
    out = tmp_path / "out"
    convert(out)
    (out / "model-00001-of-00001.safetensors").rename(out / "model.safetensors")
    (out / "model.safetensors.index.json").unlink()
    convert(out, overwrite=True)
    assert is_converted(out)
    assert not (out / "model.safetensors").exists()


def test_the_old_checkpoint_stays_whole_until_the_new_one_is_ready(tmp_path: Path) -> None:
    out = two_shards(tmp_path / "out")
    before = tree(out)
    with CheckpointWriter(out, small_layout(), overwrite=True) as writer:
        writer.write("a", VALUES)
        CheckpointReader.open(out).close()
        with pytest.raises(OutputError, match="not complete"):
            writer.finish(CONFIG, {})
    assert tree(out) == before
    with CheckpointWriter(out, small_layout(), overwrite=True) as writer:
        writer.write("a", VALUES)
        writer.write("b", VALUES)
        with pytest.raises(OutputError, match=r"missing\.model: cannot be read"):
            writer.finish(CONFIG, {"missing.model": tmp_path / "missing.model"})
    assert tree(out) == before


def test_a_failure_while_replacing_is_an_unfinished_output_that_the_next_run_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = two_shards(tmp_path / "out")
    real = Path.replace

    def fail_at_index(self: Path, target: Path) -> Path:
        if target.name == "model.safetensors.index.json":
            raise OSError(5, "Input/output error")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail_at_index)
        with pytest.raises(OutputError, match="cannot be completed: Input/output error"):
            convert(out, overwrite=True)
    assert not (out / "config.json").exists()
    with pytest.raises(CheckpointError, match="unfinished output of llama4-quant"):
        CheckpointReader.open(out)
    convert(out)
    assert is_converted(out)


def test_an_output_folder_that_is_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real"
    link = tmp_path / "link"
    link.symlink_to(real)  # dangling: the folder it names is made
    convert(link)
    assert is_converted(real)
    convert(link, overwrite=True)
    assert link.is_symlink()
    assert is_converted(link)


def test_links_in_an_old_output_are_replaced_not_followed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(out)
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    for name in ("config.json", "model-00001-of-00001.safetensors"):
        (out / name).unlink()
        (out / name).symlink_to(precious)
    convert(out, overwrite=True)
    assert is_converted(out)
    assert precious.read_bytes() == b"mine"


def test_a_staging_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(b"mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / STAGING).symlink_to(precious)
    with pytest.raises(OutputError, match="found a link or file; remove it"):
        convert(out)
    assert tree(precious) == {"file": b"mine"}


def test_two_processes_cannot_write_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with CheckpointWriter(out, small_layout()) as writer:
        writer.write("a", VALUES)
        with pytest.raises(OutputError, match="another process is writing to this folder"):
            convert(out)
        writer.write("b", -VALUES)
        writer.finish(CONFIG, {})
    assert is_converted(out)


KILLED = """
    import os, signal, sys
    import torch
    from pathlib import Path
    from llama4_quant.checkpoint.layout import OutputTensor, layout_shards
    from llama4_quant.checkpoint.writer import CheckpointWriter
    layout = layout_shards((OutputTensor(name=n, dtype=torch.int32, shape=(100,)) for n in "ab"), 10**6)
    with CheckpointWriter(Path(sys.argv[1]), layout, overwrite=True) as writer:
        writer.write("a", torch.zeros(100, dtype=torch.int32))
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("old", [False, True])
def test_a_killed_process_leaves_staging_only_and_the_next_run_works(tmp_path: Path, old: bool) -> None:
    out = tmp_path / "out"
    if old:
        convert(out)
    before = tree(out) if old else {}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    after = tree(out)
    assert {name: data for name, data in after.items() if not name.startswith(STAGING)} == before
    assert any(name.startswith(STAGING) for name in after)
    if old:
        assert is_converted(out)
    else:
        with pytest.raises(CheckpointError, match="unfinished output of llama4-quant"):
            CheckpointReader.open(out)
    convert(out, overwrite=old)
    assert is_converted(out)
    assert not (out / STAGING).exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"cannot be created|expected a folder"):
        convert(tmp_path / "file" / "out")


SMALL_DISK = """
    import pathlib, sys
    import torch
    from llama4_quant.checkpoint.layout import OutputTensor, layout_shards
    from llama4_quant.checkpoint.writer import CheckpointWriter
    from llama4_quant.errors import OutputError
    disk = pathlib.Path(sys.argv[1])
    config, values = {"config.json": {}}, torch.zeros(2**18, dtype=torch.uint8)

    def convert(num_tensors, before_finish=lambda: None, copies={}):
        names = [f"t{n}" for n in range(num_tensors)]
        layout = layout_shards([OutputTensor(name=n, dtype=torch.uint8, shape=(2**18,)) for n in names], 2**18)
        with CheckpointWriter(disk / "out", layout) as writer:
            for name in names:
                writer.write(name, values)
            before_finish()
            writer.finish(config, copies)

    def refused(*args):
        try:
            convert(*args)
        except OutputError as error:
            assert "no space left" in str(error) and "bytes needed" in str(error), error
        else:
            raise AssertionError("the disk is not full")
        assert not (disk / "out").exists()

    def fill():
        with (disk / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    refused(5)  # 1.25 MiB on a disk of 1 MiB
    refused(2, fill)  # the weights are reserved, and then nothing is left for JSON files
    (disk / "filler").unlink()
    convert(2)
    assert (disk / "out" / "config.json").exists()
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"', str(tmp_path)]
    try:
        subprocess.run([*mount, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system in a private namespace cannot be mounted here")
    script = [sys.executable, "-c", textwrap.dedent(SMALL_DISK), str(tmp_path)]
    done = subprocess.run([*mount, *script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
