"""Tensors of the Hugging Face layout as mosaics of what the files of Meta's layout hold.

A mosaic is made of blocks, and a block of whole rows of one stored matrix. Everything here follows from the tables of
contents of the files; see meta_names.py for names and splits.

Shape letters: E experts, R rows, C columns.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from llama4_quant.checkpoint.json_files import shown
from llama4_quant.checkpoint.meta_names import DECODER_PREFIX, Part, Split, Target, targets_of
from llama4_quant.checkpoint.meta_params import Params, Widths
from llama4_quant.checkpoint.pickles import StoredTensor
from llama4_quant.errors import CheckpointError

_EXPERTS = frozenset({Split.EXPERT_COLUMNS, Split.EXPERT_ROWS})


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Rows of a stored matrix, and where they belong in a tensor [R, C], or [E, R, C] for routed experts.

    Attributes:
        stored: the tensor in the file; all dimensions but the last count as rows.
        num_rows: rows of the block; of each expert, for routed experts.
        stored_start: its first row in the stored matrix (of expert 0).
        stored_stride: rows from one expert to the next in the stored matrix.
        row_start: its first row in the tensor (or in each expert).
        column_start: its first column there.
        transposed: the stored matrix is [C, R].
    """

    stored: StoredTensor
    num_rows: int
    stored_start: int = 0
    stored_stride: int = 0
    row_start: int = 0
    column_start: int = 0
    transposed: bool = False

    @property
    def num_columns(self) -> int:
        """Columns of the block: all that a stored row has."""
        return self.stored.shape[0] if self.transposed else _matrix_shape(self.stored.shape)[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mosaic:
    """A tensor of the Hugging Face layout and the blocks that cover it, each weight once."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def first(self) -> StoredTensor:
        """The stored tensor of its first block; all have the same dtype."""
        return self.blocks[0].stored


def mosaics_of(ranks: Sequence[Mapping[str, StoredTensor]], params: Params) -> dict[str, Mosaic]:
    """All tensors of the model, by their Hugging Face names.

    Args:
        ranks: the tensors of each model-parallel rank; all have the same names, shapes and dtypes.
        params: params.json.

    Raises:
        CheckpointError: a tensor that Llama 4 does not have, or tensors that do not fit each other or params.json.
    """
    blocks: dict[str, list[Block]] = {}
    origins: dict[tuple[str, Part | None], str] = {}
    num_experts: dict[str, int] = {}
    for name, first in ranks[0].items():
        for target in _known_targets(name, first):
            is_expert = target.split in _EXPERTS
            other = origins.setdefault((target.name, target.part if is_expert else None), name)
            if other != name:
                raise CheckpointError(f"{first.path}: {other} and {name} hold the same weight; only one may be there")
            if is_expert:
                num_experts[target.name] = params.num_experts
            blocks.setdefault(target.name, []).extend(_blocks(target, [rank[name] for rank in ranks], params))
    return {_full_name(name, params): _mosaic(name, found, num_experts.get(name)) for name, found in blocks.items()}


def widths_of(mosaics: Mapping[str, Mosaic]) -> Widths:
    """Sizes that params.json does not say outright."""
    return Widths(
        vocab_size=_size(mosaics, "model.embed_tokens.weight", 0),
        intermediate_size=_size(mosaics, ".feed_forward.experts.down_proj", 1),
        intermediate_size_mlp=_size(mosaics, ".feed_forward.gate_proj.weight", 0),
    )


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of a tensor, or of one of its experts; a vector is a column."""
    return (shape[0], 1) if len(shape) == 1 else (shape[-2], shape[-1])


def _known_targets(name: str, stored: StoredTensor) -> tuple[Target, ...]:
    targets = targets_of(name)
    if targets is None:
        raise CheckpointError(f"{stored.path}: tensor {shown(name)} is not part of a Llama 4 in Meta's layout")
    if targets and not math.prod(stored.shape or (0,)):
        raise CheckpointError(f"{stored.path}: {name}: expected a weight, found shape {list(stored.shape)}")
    return targets


def _full_name(name: str, params: Params) -> str:
    is_decoder = name.startswith(("model.", "lm_head."))
    return f"{DECODER_PREFIX}{name}" if is_decoder and params.has_vision else name


def _size(mosaics: Mapping[str, Mosaic], suffix: str, dim: int) -> int | None:
    """Size of the first tensor whose name ends in `suffix`."""
    return next((mosaic.shape[dim] for name, mosaic in mosaics.items() if name.endswith(suffix)), None)


def _blocks(target: Target, stored: Sequence[StoredTensor], params: Params) -> Iterator[Block]:
    """The blocks that the tensors of all ranks contribute to `target`."""
    rows, columns = _matrix_shape(stored[0].shape)
    if target.split is Split.TRANSPOSED:
        yield Block(stored=stored[0], num_rows=columns, transposed=True)
    elif target.split is Split.NONE:
        yield Block(stored=stored[0], num_rows=rows)
    elif target.split in {Split.EXPERT_ROWS, Split.EXPERT_COLUMNS}:
        yield from _expert_blocks(target, stored, params.num_experts)
    elif target.split is Split.COLUMNS:
        for rank, tensor in enumerate(stored):
            yield Block(stored=tensor, num_rows=rows, column_start=rank * columns)
    else:
        start, stop = _part_rows(target.part, stored[0], rows, params)
        size = stop - start
        for rank, tensor in enumerate(stored):
            yield Block(stored=tensor, num_rows=size, stored_start=start, row_start=rank * size)


def _expert_blocks(target: Target, stored: Sequence[StoredTensor], num_experts: int) -> Iterator[Block]:
    rows, columns = _matrix_shape(stored[0].shape)
    num_rows = _divide(rows, num_experts, stored[0], "num_experts in params.json")
    offset = len(stored) * columns if target.part is Part.SECOND_HALF else 0
    for rank, tensor in enumerate(stored):
        if target.split is Split.EXPERT_ROWS:
            yield Block(stored=tensor, num_rows=num_rows, stored_stride=num_rows, row_start=rank * num_rows)
        else:
            yield Block(stored=tensor, num_rows=num_rows, stored_stride=num_rows, column_start=offset + rank * columns)


def _part_rows(part: Part, stored: StoredTensor, rows: int, params: Params) -> tuple[int, int]:
    """Rows of a fused tensor that belong to one of its parts."""
    if part is Part.WHOLE:
        return 0, rows
    if part in {Part.FIRST_HALF, Part.SECOND_HALF}:
        half = _divide(rows, 2, stored, "gate and up")
        return (0, half) if part is Part.FIRST_HALF else (half, rows)
    heads, kv_heads = params.num_heads, params.num_kv_heads
    unit = _divide(rows, heads + 2 * kv_heads, stored, "the number of heads in params.json")
    query, key = heads * unit, (heads + kv_heads) * unit
    return {Part.QUERY: (0, query), Part.KEY: (query, key)}.get(part, (key, rows))


def _divide(rows: int, parts: int, stored: StoredTensor, what: str) -> int:
    if not parts or rows % parts:
        raise CheckpointError(
            f"{stored.path}: {stored.name}: {rows} rows do not fit {what} ({parts}); params.json and the weights do "
            "not belong together"
        )
    return rows // parts


def _mosaic(name: str, blocks: Sequence[Block], num_experts: int | None) -> Mosaic:
    num_rows = max(block.row_start + block.num_rows for block in blocks)
    num_columns = max(block.column_start + block.num_columns for block in blocks)
    covered = sum(block.num_rows * block.num_columns for block in blocks)
    if covered != num_rows * num_columns or len({block.stored.dtype for block in blocks}) > 1:
        raise CheckpointError(
            f"{blocks[0].stored.path}: {name}: {blocks[0].stored.name} covers {covered:,} of "
            f"{num_rows * num_columns:,} weights; a tensor that belongs to it is missing, or has another size or dtype"
        )
    if num_experts is not None:
        return Mosaic(shape=(num_experts, num_rows, num_columns), blocks=tuple(blocks))
    is_vector = len(blocks[0].stored.shape) == 1
    return Mosaic(shape=(num_rows,) if is_vector else (num_rows, num_columns), blocks=tuple(blocks))


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A stored tensor as a matrix: experts may be stacked on an axis of their own."""
    return (shape[0], 1) if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1])
