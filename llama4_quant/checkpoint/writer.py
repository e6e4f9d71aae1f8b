"""Writing a laid-out checkpoint: rows in any order, from any thread, to fixed offsets; complete at the end or absent.

    with CheckpointWriter(out, layout_shards(tensors, parse_size("5GB"))) as writer:
        writer.write("model.embed_tokens.weight", rows, row_start=0)
        ...
        writer.finish({"config.json": config}, {path.name: path for path in side_files(source)})

Leaving the block without `finish`, by an exception or otherwise, leaves nothing behind; unless the writer was given a
`Job`. Then finished items are journalled, what is staged is kept, and a later writer with the same job continues:

    with CheckpointWriter(out, layout, job=Job(fingerprint=...)) as writer:
        for item in items:
            if item.id not in writer.records():
                writer.record(item.id, [writer.write(...), ...], notes)

How the files become visible is described in staging.py.
"""

import threading
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from llama4_quant.checkpoint.buffers import byte_view
from llama4_quant.checkpoint.coverage import Coverage
from llama4_quant.checkpoint.files import os_errors
from llama4_quant.checkpoint.journal import Journal, Record, WrittenRange, others_alive, read_journals
from llama4_quant.checkpoint.json_files import dump_json
from llama4_quant.checkpoint.layout import Layout, Placement, index_json
from llama4_quant.checkpoint.locks import Turn
from llama4_quant.checkpoint.manifest import MANIFEST_NAME, has_self_checksum, make_manifest, sha256
from llama4_quant.checkpoint.paths import CONFIG_NAME, INDEX_NAME, PARAMS_NAME, SCRATCH_NAME, is_plain_name
from llama4_quant.checkpoint.resume import FINGERPRINT_NAME, Job, can_continue, canonical_json, digest
from llama4_quant.checkpoint.shards import DIRECT_BYTES, ShardFiles
from llama4_quant.checkpoint.staging import Staging
from llama4_quant.errors import OutputError


class CheckpointWriter:
    """Writes one checkpoint; a context manager, used once.

    Attributes:
        out: the output folder.
    """

    def __init__(
        self,
        out: Path,
        layout: Layout,
        overwrite: bool = False,
        *,
        source: Path | None = None,
        job: Job | None = None,
    ) -> None:
        """Nothing is touched before the `with` block is entered.

        Args:
            out: the output folder; new, empty, or an unfinished output of ours.
            layout: what will be written where.
            overwrite: replace the checkpoint that is in `out`.
            source: the folder that is being read; refused as output.
            job: what makes the work resumable; without it nothing is kept of an unfinished output.
        """
        self.out = out
        self._layout = layout
        self._overwrite = overwrite
        self._source = source
        self._job = job
        self._sync_lock = threading.Lock()
        self._coverage = Coverage({name: placement.tensor.nbytes for name, placement in layout.placements.items()})
        self._staging: Staging | None = None
        self._shards: ShardFiles | None = None
        self._journal: Journal | None = None
        self._helpers = ThreadPoolExecutor(thread_name_prefix="shard-write")

    def __enter__(self) -> Self:
        """Take the output folder and reserve the space of all shards, or reopen those of an interrupted job.

        Raises:
            OutputError: the folder cannot be used (see `Staging`), the disk is too small, or what is there belongs to
                another job.
        """
        job = self._job
        together = job is not None and job.world_size > 1
        staging = Staging(self.out, overwrite=self._overwrite, source=self._source, together=together)
        self._staging, self._shards = staging, ShardFiles(self._layout, staging)
        resuming = (staging.folder / FINGERPRINT_NAME).exists()  # and must not be removed when this is refused
        try:
            resuming = job is not None and can_continue(staging.folder, job, alone=staging.alone)
            if resuming:
                self._shards.reopen()
            else:
                self._begin(staging, self._shards)
            if job is not None:
                self._open_journal(staging, job)
            staging.ready()
        except BaseException:
            self._leave(discard=not resuming)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(discard=self._job is None or isinstance(error, self._job.hopeless))

    def write(self, name: str, tensor: torch.Tensor, row_start: int = 0) -> WrittenRange:
        """Write rows of dimension 0 of an output tensor. Thread-safe; no copy if `tensor` is contiguous and on the CPU.

        Args:
            name: an output tensor of the layout.
            tensor: its rows `row_start` to `row_start + len(tensor)`, in its dtype; a scalar is written whole.
            row_start: the first of them.

        Raises:
            OutputError: dtype, shape or rows are not those of the layout, or the disk is full.
        """
        assert self._shards is not None, "used outside its `with` block"
        placement = self._placement(name, tensor, row_start)
        offset = row_start * placement.tensor.row_nbytes
        view = byte_view(tensor.detach().cpu().contiguous())
        place = (placement.shard, view, placement.start + offset, name)
        is_archive = self._layout.shards[placement.shard].archive is not None
        if len(view) < DIRECT_BYTES:
            self._shards.write(*place)
            checksum, crc32 = _checksums(view, is_archive=is_archive)
        else:
            written = self._helpers.submit(self._shards.write, *place)  # the disk works while we compute
            checksum, crc32 = _checksums(view, is_archive=is_archive)
            written.result()
        part = WrittenRange(name=name, start=offset, stop=offset + len(view), sha256=checksum, crc32=crc32)
        self._coverage.add(part)
        return part

    def position(self, name: str, row_start: int = 0) -> int:
        """Byte of its file where a row of an output tensor lies.

        Large rows are written fastest from memory whose address leaves the same remainder by PAGE_BYTES.
        """
        placement = self._layout.placements[name]
        return placement.start + row_start * placement.tensor.row_nbytes

    def read(self, name: str) -> torch.Tensor:
        """Read an output tensor back, all of whose rows were written, by this process or an interrupted one."""
        assert self._shards is not None, "used outside its `with` block"
        placement = self._layout.placements[name]
        tensor = torch.empty(placement.tensor.shape, dtype=placement.tensor.dtype)
        self._shards.read(placement.shard, byte_view(tensor), placement.start)
        return tensor

    @property
    def scratch(self) -> Path:
        """A folder for files that are needed until the output is complete; it goes when the output is complete."""
        assert self._staging is not None
        folder = self._staging.folder / SCRATCH_NAME
        with os_errors(f"{folder}: cannot be created"):
            folder.mkdir(exist_ok=True)
        return folder

    def records(self) -> dict[int, Record]:
        """Finished items by number: of interrupted runs, of this process and of those that work together with it."""
        assert self._staging is not None
        assert self._job is not None
        with os_errors(f"{self._staging.folder}: the journal cannot be read"):
            return read_journals(self._staging.folder, digest(self._job.fingerprint))

    def record(self, item: int, ranges: Sequence[WrittenRange], notes: object = None) -> None:
        """Note that an item is finished. Thread-safe.

        Args:
            item: its number.
            ranges: what `write` returned for it.
            notes: JSON data to remember with it.

        Raises:
            OutputError: the disk is full.
        """
        assert self._journal is not None
        with os_errors(f"{self.out}: the journal cannot be written", self.out, 1):
            self._journal.append(Record(item=item, ranges=tuple(ranges), notes=notes))

    def sync(self) -> None:
        """Bring to the disk what was written, and then note that this was done. Thread-safe.

        Raises:
            OutputError: the disk is full or fails.
        """
        assert self._shards is not None
        with self._sync_lock, os_errors(f"{self.out}: the journal cannot be written", self.out, 1):
            num_records = 0 if self._journal is None else self._journal.num_records()
            self._shards.sync()  # after counting: the bytes of what is counted have been written
            if self._journal is not None:
                self._journal.mark_synced(num_records)

    def turn(self) -> Turn:
        """Wait until no other process of this job publishes; `here` of the result is False if one has done it."""
        assert self._staging is not None
        return Turn(self._staging.folder)

    def others_alive(self) -> bool:
        """Whether other processes of this job are at work."""
        assert self._staging is not None
        assert self._job is not None
        with os_errors(f"{self._staging.folder}: the journal cannot be read"):
            return others_alive(self._staging.folder, self._job.rank)

    def finish(self, json_files: Mapping[str, Mapping[str, Any]], copies: Mapping[str, Path]) -> None:
        """Make the checkpoint visible, config.json (in Meta's layout: params.json) last.

        Args:
            json_files: by file name; that file must be among them. The index is added from the layout, and a manifest
                that lists all files but those with a checksum of their own (see manifest.py).
            copies: by file name, the files to copy.

        Raises:
            OutputError: bytes of a tensor were never written, or the disk is full; nothing is visible then.
        """
        staging = self._staging
        assert staging is not None
        assert self._shards is not None
        last = self._layout.last_file
        _check_names(json_files, copies, last)
        self._check_complete()
        frames = self._frames()
        self._shards.write_frames(frames)
        listed = {name: staging.copy(name, origin) for name, origin in copies.items()}
        index = {INDEX_NAME: index_json(self._layout)} if self._layout.has_index else {}
        for name, content in {**json_files, **index}.items():
            data = dump_json(content)
            staging.put(name, data)
            if not has_self_checksum(content):
                listed[name] = (len(data), sha256(data))
        staging.put(MANIFEST_NAME, make_manifest(self._layout, self._coverage, frames, listed))
        self._shards.sync_all()
        others = [*sorted({*json_files, *copies, MANIFEST_NAME} - {last}), *index]
        staging.publish([shard.filename for shard in self._layout.shards], others, last)
        self._leave()

    def _frames(self) -> list[tuple[tuple[int, bytes], ...]]:
        """What stands around the tensors, of each shard; all tensors must be complete."""
        crc32s: list[dict[str, int]] = [{} for _ in self._layout.shards]
        for name, placement in self._layout.placements.items():
            if self._layout.shards[placement.shard].archive is not None:
                crc32s[placement.shard][name] = self._coverage.crc32(name)
        return [shard.frame(checks) for shard, checks in zip(self._layout.shards, crc32s, strict=True)]

    def _begin(self, staging: Staging, shards: ShardFiles) -> None:
        """Begin anew: reserve the shards, and only then say what they are for."""
        staging.empty()
        shards.allocate()
        if self._job is not None:
            staging.sync()
            staging.put(FINGERPRINT_NAME, canonical_json(self._job.fingerprint))
            staging.sync()

    def _open_journal(self, staging: Staging, job: Job) -> None:
        with os_errors(f"{staging.folder}: the journal of process {job.rank} cannot be used", self.out, 1):
            self._journal = Journal(staging.folder, job.rank, digest(job.fingerprint))
        staging.sync()

    def _placement(self, name: str, tensor: torch.Tensor, row_start: int) -> Placement:
        placement = self._layout.placements.get(name)
        if placement is None:
            raise OutputError(f"{name}: not in the layout of {self.out}")
        expected = placement.tensor
        num_rows = expected.shape[0] if expected.shape else 1
        rows = tensor.shape[0] if tensor.dim() else 1
        same = tensor.dtype == expected.dtype and tuple(tensor.shape[1:]) == expected.shape[1:]
        if not same or tensor.dim() != len(expected.shape) or not 0 <= row_start <= row_start + rows <= num_rows:
            raise OutputError(
                f"{name}: expected rows of {expected.dtype} {list(expected.shape)}, found {tensor.dtype} "
                f"{list(tensor.shape)} for row {row_start}"
            )
        return placement

    def _check_complete(self) -> None:
        if self._job is not None:
            for record in self.records().values():
                for part in record.ranges:
                    self._coverage.add(part)
        missing = self._coverage.missing()
        if missing:
            first = next(iter(missing))
            raise OutputError(
                f"{self.out}: {len(missing)} of {len(self._layout.placements)} tensors not complete, first {first}, "
                f"of which {missing[first]:,} bytes were never written"
            )

    def _leave(self, *, discard: bool = False) -> None:
        """Close everything; what is staged stays, unless it is to be discarded."""
        self._helpers.shutdown()
        shards, self._shards = self._shards, None
        journal, self._journal = self._journal, None
        staging, self._staging = self._staging, None
        if shards is not None:
            shards.close()
        if journal is not None:
            journal.close()
        if staging is not None:
            staging.discard() if discard else staging.leave()


def _checksums(view: memoryview, *, is_archive: bool) -> tuple[str, int | None]:
    """SHA-256 of some bytes, and their CRC-32 where a zip archive will need it."""
    return sha256(view), zlib.crc32(view) if is_archive else None


def _check_names(json_files: Mapping[str, object], copies: Mapping[str, object], last_file: str) -> None:
    assert last_file in json_files
    assert not json_files.keys() & copies.keys()
    assert not {CONFIG_NAME, PARAMS_NAME, INDEX_NAME} & copies.keys()
    for name in (*json_files, *copies):
        assert is_plain_name(name), name
        assert name not in {INDEX_NAME, MANIFEST_NAME}, name
        assert not name.endswith((".safetensors", ".pth", ".pt")), name
