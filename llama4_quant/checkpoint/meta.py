"""Meta's original layout (`consolidated.NN.pth` of every model-parallel rank, and params.json) read as Hugging Face's.

Asking for rows, or for one expert, reads what these rows need from the files of all ranks and nothing else, so what is
held never depends on the number or size of the files. meta_blocks.py says what lies where.

Shape letters: R rows, C columns.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch

from llama4_quant.checkpoint.buffers import byte_view
from llama4_quant.checkpoint.header import DTYPE_NAMES, TensorEntry
from llama4_quant.checkpoint.json_files import read_json
from llama4_quant.checkpoint.meta_blocks import Block, Mosaic, mosaics_of, rows_and_columns, widths_of
from llama4_quant.checkpoint.meta_params import Params
from llama4_quant.checkpoint.paths import PARAMS_NAME, STAGING_NAME, locate
from llama4_quant.checkpoint.pickles import StoredTensor, read_contents
from llama4_quant.checkpoint.reader import CheckpointReader, open_file
from llama4_quant.errors import CheckpointError

SCRATCH_BYTES = 4 * 2**20
"""What reading holds at a time besides its result, where the stored rows are only parts of the rows asked for."""

_SHARD_NAME = re.compile(r"consolidated(\.(\d\d+))?\.pth")
_SCALES_NAME = re.compile(r"(fp8|int4)_scales_\d+\.pt")


class MetaReader(CheckpointReader):
    """An open checkpoint in Meta's layout; config and tensors are those of the Hugging Face layout.

    Attributes:
        params: params.json, as it was read.
        num_ranks: how many model-parallel ranks it was made for.
    """

    params: Mapping[str, Any]
    num_ranks: int
    _mosaics: Mapping[str, Mosaic]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the checkpoint in folder `path`; reads params.json and the table of contents of every file.

        Raises:
            CheckpointError: files missing, damaged, or contradicting each other; a pickle that holds more than tensors.
            ConfigError: params.json is not usable.
        """
        check_finished(path)
        shards = _shards_of(path)
        where = locate(path, PARAMS_NAME)
        params = Params(read_json(where), str(where))
        with ExitStack() as files:
            descriptors = {shard: open_file(shard, files) for shard in shards}
            ranks = [read_contents(descriptor, shard) for shard, descriptor in descriptors.items()]
            _check_ranks_agree(ranks, shards)
            mosaics = mosaics_of(ranks, params)
            reader = cls(
                path=path,
                config=params.config(widths_of(mosaics)),
                tensors={name: _entry(name, mosaic) for name, mosaic in mosaics.items()},
                descriptors=descriptors,
                files=files.pop_all(),
            )
        reader._mosaics, reader.params, reader.num_ranks = mosaics, params.values, len(shards)
        return reader

    @property
    def files(self) -> tuple[Path, ...]:
        """params.json and the files of all ranks; `tensors` name only one of those that hold a tensor."""
        return (self.path / PARAMS_NAME, *self._descriptors)

    def _fill(self, entry: TensorEntry, offset: int, out: torch.Tensor) -> None:
        mosaic = self._mosaics[entry.name]
        num_rows, num_columns = rows_and_columns(mosaic.shape)
        first = offset // (num_columns * out.element_size())
        out_RC = out.view(-1, num_columns)
        done = 0
        while done < len(out_RC):
            expert, start = divmod(first + done, num_rows)
            stop = min(num_rows, start + len(out_RC) - done)
            for block in mosaic.blocks:
                self._fill_block(block, expert, start, stop, out_RC[done : done + stop - start], entry.name)
            done += stop - start

    def _fill_block(self, block: Block, expert: int, start: int, stop: int, out_RC: torch.Tensor, name: str) -> None:
        """Copy what `block` has of rows `start` to `stop` of one expert to its place in `out_RC`."""
        first, last = max(start, block.row_start), min(stop, block.row_start + block.num_rows)
        if first >= last:
            return
        target_RC = out_RC[first - start : last - start, block.column_start : block.column_start + block.num_columns]
        if block.transposed:
            whole = torch.empty(block.stored.shape, dtype=block.stored.dtype)
            self._read_bytes(block.stored.path, block.stored.start, byte_view(whole), name)
            target_RC.copy_(whole.T[first - block.row_start : last - block.row_start])
            return
        row = block.stored_start + expert * block.stored_stride + first - block.row_start
        row_nbytes = block.num_columns * block.stored.dtype.itemsize
        step = last - first if target_RC.is_contiguous() else max(1, SCRATCH_BYTES // row_nbytes)
        for done in range(0, last - first, step):
            rows_RC = target_RC[done : done + step]
            buffer = rows_RC if rows_RC.is_contiguous() else torch.empty(rows_RC.shape, dtype=rows_RC.dtype)
            start_byte = block.stored.start + (row + done) * row_nbytes
            self._read_bytes(block.stored.path, start_byte, byte_view(buffer), name)
            if buffer is not rows_RC:
                rows_RC.copy_(buffer)


def is_meta_layout(path: Path) -> bool:
    """Whether the folder holds Meta's files, and none in Hugging Face layout."""
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError:
        return False
    has_shards = any(_SHARD_NAME.fullmatch(name) for name in names)
    return has_shards and not any(name.endswith(".safetensors") for name in names)


def check_finished(path: Path) -> None:
    """Raise CheckpointError if the folder is an output of ours that was interrupted."""
    if (path / STAGING_NAME).exists() and not (path / PARAMS_NAME).exists():
        raise CheckpointError(
            f"{path}: an unfinished output of llama4-quant (it has {STAGING_NAME} and no {PARAMS_NAME}); run the same "
            "conversion again, or delete the folder"
        )


def _shards_of(path: Path) -> list[Path]:
    """The files of ranks 0, 1, ..."""
    names = {entry.name for entry in path.iterdir()}
    scales = sorted(name for name in names if _SCALES_NAME.fullmatch(name))
    if scales:
        raise CheckpointError(
            f"{path}: already quantized (it has {scales[0]}): Meta's own loader runs it, and `llama4-quant verify` "
            "checks it; convert from the BF16 checkpoint instead"
        )
    found = {int(match[2] or 0): name for name in names if (match := _SHARD_NAME.fullmatch(name))}
    missing = set(range(len(found))) - set(found)
    if missing:
        raise CheckpointError(
            f"{path}: expected consolidated.00.pth to consolidated.{max(found):02d}.pth without a gap, but "
            f"consolidated.{min(missing):02d}.pth is missing; download it again"
        )
    return [locate(path, found[rank]) for rank in sorted(found)]


def _check_ranks_agree(ranks: Sequence[Mapping[str, StoredTensor]], shards: Sequence[Path]) -> None:
    """Every rank must have the same tensors with the same shapes and dtypes."""
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in ranks[0].items()}
    for tensors, path in zip(ranks[1:], shards[1:], strict=True):
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        if found == expected:
            continue
        name = min(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"{path}: tensor {name}: expected {_said(expected.get(name))} as in {shards[0].name}, found "
            f"{_said(found.get(name))}; the files are not of one checkpoint, or one is damaged"
        )


def _said(tensor: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "nothing" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def _entry(name: str, mosaic: Mosaic) -> TensorEntry:
    """The tensor as a reader of the Hugging Face layout sees it; path and start are those of its first block."""
    first = mosaic.first
    return TensorEntry(
        name=name,
        dtype=DTYPE_NAMES[first.dtype],
        shape=mosaic.shape,
        path=first.path,
        start=first.start,
        nbytes=math.prod(mosaic.shape) * first.dtype.itemsize,
    )
