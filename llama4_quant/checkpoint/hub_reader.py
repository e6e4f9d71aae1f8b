"""Reading a checkpoint from the Hub with only a few of its shards on disk: download, convert, delete, shard by shard.

All headers come first, by requests for the first bytes of each shard, and are checked against the true file sizes
like those of a local checkpoint: they are written into sparse files that a `CheckpointReader` opens. So a plan is made,
and a bad repository refused, before the first weight arrives. Then a shard is downloaded when it is first read,
compared with the digest that the Hub names, and deleted when all of it has been read. What the Hub's cache has already
is read there and stays.

Fast if tensors are read in the order of `shard_order`; correct in any.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any, Self

import torch

from llama4_quant.checkpoint.download_folder import SCRATCH_PREFIX, claim
from llama4_quant.checkpoint.files import no_space, os_errors
from llama4_quant.checkpoint.header import MAX_HEADER_BYTES, TensorEntry
from llama4_quant.checkpoint.hub import RemoteFile, Repository, shards_in_index
from llama4_quant.checkpoint.json_files import shown
from llama4_quant.checkpoint.paths import CONFIG_NAME, INDEX_NAME, SINGLE_FILE_NAME
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.shard_store import ShardStore
from llama4_quant.errors import CheckpointError, Llama4QuantError, OtherLayoutError, OutputError

_FIRST_REQUEST_BYTES = 128 * 2**10
"""Enough for the header of a shard with a thousand tensors, so that most shards take one request."""
_NUM_REQUESTS_AT_ONCE = 8
PATIENCE_SECONDS = 10.0
"""How long work on another shard waits before one is given up that has not been read to its end."""


def shard_order(entry: TensorEntry) -> tuple[str, int]:
    """Sort key of tensors: work in this order needs every shard once, and reads files from front to back."""
    return entry.path.name, entry.start


class HubReader(CheckpointReader):
    """An open checkpoint on the Hub; see `connect`. Reads are thread-safe, and wait for downloads.

    Attributes:
        path: the download folder, with config.json, tokenizer and so on, and some of the shards.
        repository: which commit of which repository it is.
    """

    def __init__(
        self,
        repository: Repository,
        folder: Path,
        config: dict[str, Any],
        entries: Iterable[TensorEntry],
        *,
        num_shards: int,
        say: Callable[[str], None],
        files: ExitStack,
    ) -> None:
        tensors = {entry.name: replace(entry, path=folder / entry.path.name) for entry in entries}
        super().__init__(path=folder, config=config, tensors=tensors, descriptors={}, files=files)
        self.repository = repository
        self._num_shards, self._say, self._stop = num_shards, say, Event()
        names = {entry.path.name for entry in tensors.values()}
        self._shards = {name: repository.files[name] for name in sorted(names)}
        self._cached = {name: path for name, file in self._shards.items() if (path := repository.cached(file))}
        leftover = [name for name in self._shards if (folder / name).exists()]
        self._store = ShardStore(self._fetch, self._drop, num_shards, leftover, PATIENCE_SECONDS)
        self.expect((entry.name, entry.nbytes) for entry in sorted(tensors.values(), key=shard_order))

    @classmethod
    def connect(
        cls,
        name: str,
        revision: str | None = None,
        *,
        folder: Path,
        num_shards: int = 2,
        say: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Open a repository of the Hub: small files and headers are downloaded, shards are not.

        Args:
            name: such as `meta-llama/Llama-4-Scout-17B-16E-Instruct`.
            revision: branch, tag or commit; the default branch if None.
            folder: where files go; made if need be. Shards of the same commit that an earlier, interrupted process
                has left there are used.
            num_shards: how many shards may be on disk at a time; with 2, one is read while the next one arrives.
            say: called with a line of text for every download.

        Raises:
            CheckpointError: as for `CheckpointReader.open`; or no such repository, no access, no connection.
            OutputError: the folder cannot be used.
        """
        repository = Repository.find(name, revision)
        with ExitStack() as files:
            files.callback(os.close, claim(folder, f"{name} {repository.commit}"))
            repository.download_small(folder)
            with (
                TemporaryDirectory(dir=folder, prefix=SCRATCH_PREFIX) as scratch,
                _outline(repository, folder, Path(scratch)) as outline,
            ):
                config, entries = outline.config, outline.tensors.values()
            return cls(repository, folder, config, entries, num_shards=num_shards, say=say, files=files.pop_all())

    @property
    def max_disk_bytes(self) -> int:
        """The most that shards will ever take on disk at the same time."""
        sizes = sorted(file.size for name, file in self._shards.items() if name not in self._cached)
        return sum(sizes[-self._num_shards :])

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the source is, for fingerprints: its commit, and a digest of every file."""
        used = (*self._shards, *(path.name for path in self.path.iterdir() if path.name in self.repository.files))
        return {name: self.repository.files[name].digest for name in sorted(set(used))}

    def require_space(self, output_bytes: int = 0) -> None:
        """Raise OutputError unless the disk has room for the shards on their way and `output_bytes` more."""
        there = sum((self.path / name).stat().st_size for name in self._shards if (self.path / name).exists())
        needed = output_bytes + max(0, self.max_disk_bytes - there)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise OutputError(
                f"{self.path}: {no_space(needed, free)} ({output_bytes:,} bytes for the output, the others for up to "
                f"{self._num_shards} shards of the source)"
            )

    def expect(self, reads: Iterable[tuple[str, int]]) -> None:
        """Say what will be read, in order: (tensor, bytes). Other shards are not downloaded ahead; deleted when read.

        Without this call, every tensor is expected to be read once. A tensor may occur several times.
        """
        self._store.expect((self._entry(name).path.name, nbytes) for name, nbytes in reads)

    def done(self, shard: str) -> None:
        """Say that the shard of this file name will not be needed any more: it is deleted, or never downloaded."""
        self._store.done(shard)

    def stop_waiting(self) -> None:
        """Let reads that wait for a download fail, now and later; those that have begun are finished."""
        self._stop.set()
        self._store.close(seconds=0)

    def close(self) -> None:
        """Stop downloading and close all files; shards that were not read to the end stay, for the next process."""
        self._stop.set()
        self._store.close()
        for descriptor in list(self._descriptors.values()):
            os.close(descriptor)
        super().close()

    def _fill(self, entry: TensorEntry, offset: int, out: torch.Tensor) -> None:
        with self._store.held(entry.path.name, out.nbytes):
            super()._fill(entry, offset, out)

    def _fetch(self, name: str) -> None:
        path = self._cached.get(name) or self._download(self._shards[name])
        with os_errors(f"{path}: cannot be opened"):
            self._descriptors[self.path / name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _download(self, file: RemoteFile) -> Path:
        number = list(self._shards).index(file.name) + 1
        self._say(f"downloading shard {number} of {len(self._shards)}: {file.name}, {file.size / 1e9:.2f} GB")
        try:
            return self.repository.download(file, self.path, self._stop)
        except CheckpointError as problem:
            raise CheckpointError(f"{problem}\n{self._left_on_disk()}") from problem

    def _left_on_disk(self) -> str:
        there = [name for name in self._shards if (self.path / name).exists()]
        free = shutil.disk_usage(self.path).free
        return (
            f"{self.path} keeps {len(there)} of {len(self._shards)} shards ({', '.join(there) or 'none'}; {free:,} "
            "bytes free on its disk); what was converted is kept too, and the same command continues"
        )

    def _drop(self, name: str) -> None:
        descriptor = self._descriptors.pop(self.path / name, None)
        if descriptor is not None:
            os.close(descriptor)
        (self.path / name).unlink(missing_ok=True)  # never the one in the Hub's cache


def _outline(repository: Repository, small: Path, scratch: Path) -> CheckpointReader:
    """The repository as a checkpoint in `scratch` whose shards have headers and sizes, and no data."""
    for name in (CONFIG_NAME, INDEX_NAME):
        if (small / name).exists():
            shutil.copyfile(small / name, scratch / name)
    try:
        names = shards_in_index(scratch) if (scratch / INDEX_NAME).exists() else frozenset()
        shards = [file for name, file in repository.files.items() if name in {*names, SINGLE_FILE_NAME}]
        if not shards:
            raise OtherLayoutError(
                f"{repository.at()}: expected {CONFIG_NAME} and .safetensors weights (Hugging Face layout), found "
                f"{shown(sorted(repository.files))}; other layouts have to be downloaded whole: `hf download "
                f"{repository.name}`, and then the same command again"
            )
        with ThreadPoolExecutor(_NUM_REQUESTS_AT_ONCE) as pool:
            list(pool.map(lambda file: _write_outline(repository, file, scratch / file.name), shards))
        return CheckpointReader.open(scratch)
    except Llama4QuantError as problem:
        text = str(problem).replace(f"{scratch}{os.sep}", f"{repository.at()}: ").replace(str(scratch), repository.at())
        raise type(problem)(text) from problem


def _write_outline(repository: Repository, file: RemoteFile, path: Path) -> None:
    data = repository.read(file, 0, _FIRST_REQUEST_BYTES)
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < end <= MAX_HEADER_BYTES:
        data += repository.read(file, len(data), end)
    what = f"{repository.at(file.name)}: a sparse file of {file.size:,} bytes cannot be made"
    with os_errors(what), path.open("wb") as outline:
        outline.write(data[:end])
        outline.truncate(file.size)
