"""Writing a laid-out checkpoint: rows in any order, from any thread, to fixed offsets; complete at the end or absent.

    with CheckpointWriter(out, layout_shards(tensors, parse_size("5GB"))) as writer:
        writer.write("model.embed_tokens.weight", rows, row_start=0)
        ...
        writer.finish({"config.json": config}, {path.name: path for path in side_files(source)})

Leaving the block without `finish`, by an exception or otherwise, leaves nothing behind. How the files become visible
is described in staging.py.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from llama4_quant.checkpoint.buffers import byte_view, write_from
from llama4_quant.checkpoint.coverage import Coverage
from llama4_quant.checkpoint.json_files import dump_json
from llama4_quant.checkpoint.layout import Layout, Placement, index_json
from llama4_quant.checkpoint.paths import CONFIG_NAME, INDEX_NAME, is_plain_name
from llama4_quant.checkpoint.staging import Staging, os_errors
from llama4_quant.errors import OutputError


class CheckpointWriter:
    """Writes one checkpoint; a context manager, used once."""

    def __init__(self, out: Path, layout: Layout, overwrite: bool = False, *, source: Path | None = None) -> None:
        """Nothing is touched before the `with` block is entered.

        Args:
            out: the output folder; new, empty, or an unfinished output of ours.
            layout: what will be written where.
            overwrite: replace the checkpoint that is in `out`.
            source: the folder that is being read; refused as output.
        """
        self._out = out
        self._layout = layout
        self._overwrite = overwrite
        self._source = source
        self._descriptors: list[int] = []
        self._files = ExitStack()
        self._coverage = Coverage({name: placement.tensor.nbytes for name, placement in layout.placements.items()})
        self._staging: Staging | None = None

    def __enter__(self) -> Self:
        """Take the output folder and reserve the space of all shards.

        Raises:
            OutputError: the folder cannot be used (see `Staging`), or the disk is too small.
        """
        staging = Staging(self._out, overwrite=self._overwrite, source=self._source)
        self._staging = staging
        try:
            staging.require_space(self._layout.nbytes)
            for shard in self._layout.shards:
                descriptor = staging.allocate(shard.filename, shard.nbytes)
                self._files.callback(os.close, descriptor)
                self._descriptors.append(descriptor)
                with os_errors(f"{self._out / shard.filename}: cannot be written", staging.folder, shard.nbytes):
                    write_from(descriptor, memoryview(shard.header), 0)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def write(self, name: str, tensor: torch.Tensor, row_start: int = 0) -> None:
        """Write rows of dimension 0 of an output tensor. Thread-safe; no copy if `tensor` is contiguous and on the CPU.

        Args:
            name: an output tensor of the layout.
            tensor: its rows `row_start` to `row_start + len(tensor)`, in its dtype; a scalar is written whole.
            row_start: the first of them.

        Raises:
            OutputError: dtype, shape or rows are not those of the layout, or the disk is full.
        """
        assert self._descriptors, "used outside its `with` block"
        placement = self._placement(name, tensor, row_start)
        offset = row_start * placement.tensor.row_nbytes
        view = byte_view(tensor.detach().cpu().contiguous())
        path = self._out / self._layout.shards[placement.shard].filename
        with os_errors(f"{path}: {name} cannot be written", self._out, len(view)):
            write_from(self._descriptors[placement.shard], view, placement.start + offset)
        self._coverage.add(name, offset, offset + len(view))

    def finish(self, json_files: Mapping[str, Mapping[str, Any]], copies: Mapping[str, Path]) -> None:
        """Make the checkpoint visible, config.json last.

        Args:
            json_files: by file name; config.json must be among them. The index is added from the layout.
            copies: by file name, the files to copy.

        Raises:
            OutputError: bytes of a tensor were never written, or the disk is full; nothing is visible then.
        """
        staging = self._staging
        assert staging is not None
        _check_names(json_files, copies)
        self._check_complete()
        for name, origin in copies.items():
            staging.copy(name, origin)
        for name, content in {**json_files, INDEX_NAME: index_json(self._layout)}.items():
            staging.put(name, dump_json(content))
        with os_errors(f"{self._out}: cannot be written", staging.folder, self._layout.nbytes):
            for descriptor in self._descriptors:
                os.fsync(descriptor)
        others = sorted({*json_files, *copies} - {CONFIG_NAME})
        staging.publish([shard.filename for shard in self._layout.shards], others)
        self._staging = None

    def _placement(self, name: str, tensor: torch.Tensor, row_start: int) -> Placement:
        placement = self._layout.placements.get(name)
        if placement is None:
            raise OutputError(f"{name}: not in the layout of {self._out}")
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
        missing = self._coverage.missing()
        if missing:
            first = next(iter(missing))
            raise OutputError(
                f"{self._out}: {len(missing)} of {len(self._layout.placements)} tensors not complete, first {first}, "
                f"of which {missing[first]:,} bytes were never written; the output is discarded"
            )

    def _discard(self) -> None:
        self._files.close()
        self._descriptors = []
        if self._staging is not None:
            self._staging.discard()
            self._staging = None


def _check_names(json_files: Mapping[str, object], copies: Mapping[str, object]) -> None:
    assert CONFIG_NAME in json_files
    assert not json_files.keys() & copies.keys()
    assert not {CONFIG_NAME, INDEX_NAME} & copies.keys()
    for name in (*json_files, *copies):
        assert is_plain_name(name) and name != INDEX_NAME and not name.endswith(".safetensors"), name  # noqa: PT018
