"""Source weights piece by piece, each as the [out, in] matrix that quantizers work on.

The unit is an expert slice: one expert of one fused tensor is read once and gives its gate and its up projection (or
its down projection). A large 2-D weight comes in chunks of rows. So what is held at a time does not grow with the
model: Maverick's 21.5 GB `gate_up_proj` passes through as 128 slices of 168 MB.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.errors import QuantizationError
from llama4_quant.formats import meta_fp8
from llama4_quant.formats.compressed_tensors import EncodedRows, encode_packed
from llama4_quant.formats.fbgemm_fp8 import encode_expert
from llama4_quant.planning.plan import Decision, TensorPlan
from llama4_quant.quantizers.backend import Backend
from llama4_quant.quantizers.lanes import CHUNK_ELEMENTS
from llama4_quant.quantizers.packed import PackedWeight
from llama4_quant.work import CHUNK_BYTES, WorkItem, item_decisions, tensor_items

Progress = Callable[[str, int], None]
"""Called after each piece with the weight's name and the source bytes that are now done more than before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Rows `row_start` to `row_start + len(values)` of one weight.

    Attributes:
        values: [rows, in] for linear weights (a view that may be strided: transposed experts), [rows, ...] otherwise.
            Of fused experts that stay as they are: [1, in, out], a row being an expert.
        num_bytes: source bytes that this piece accounts for.
        rank: in Meta's layout, whose part of a weight this is, once it is split.
    """

    decision: Decision
    values: torch.Tensor
    row_start: int
    num_bytes: int
    rank: int | None = None


def read_pieces(reader: CheckpointReader, tensor: TensorPlan, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Piece]:
    """Read one source tensor; pieces come in stored order, and cover every weight exactly once."""
    for item in tensor_items(tensor, chunk_bytes=chunk_bytes):
        yield from read_item(reader, tensor, item)


def read_item(
    reader: CheckpointReader, tensor: TensorPlan, item: WorkItem, buffer: torch.Tensor | None = None
) -> Iterator[Piece]:
    """Read one work item of a tensor.

    Args:
        reader: the source.
        tensor: the tensor.
        item: one of its items.
        buffer: uint8 memory of at least `item.num_bytes` to read into; the pieces are views of it. Default: fresh.
    """
    entry = reader.tensors[tensor.spec.name]
    shape = (item.stop - item.start, *entry.shape[2 if item.expert is not None else 1 :])
    out = None if buffer is None else buffer[: item.num_bytes].view(entry.torch_dtype).view(shape)
    if item.expert is None:
        (decision,) = tensor.decisions
        yield _piece(decision, reader.read_rows(entry.name, item.start, item.stop, out=out), item.start)
        return
    stored_IN = reader.read_slice(entry.name, item.expert, item.start, item.stop, out=out)
    for decision in item_decisions(tensor, item):
        linear = decision.linear
        assert linear is not None
        assert linear.expert == item.expert
        if decision.fused and decision.scheme is None:
            yield _piece(decision, stored_IN.unsqueeze(0), item.expert)
            continue
        columns = stored_IN[:, linear.out_start : linear.out_start + linear.out_features]
        yield _piece(decision, columns.T, 0)


def split_piece(piece: Piece) -> Iterator[Piece]:
    """The pieces that are stored apart: in Meta's layout what each rank has, otherwise the piece itself.

    Of a weight that is kept, they are as they are stored: experts [in, out], and `row_start` counts rows of the tensor
    of the rank.
    """
    spread, linear = piece.decision.spread, piece.decision.linear
    if spread is None:
        yield piece
        return
    for rank in range(spread.num_ranks):
        if linear is not None and linear.expert is not None:
            values = meta_fp8.rank_matrix(spread, rank, piece.values)
            if piece.decision.scheme is not None:
                yield replace(piece, values=values, rank=rank)
            else:
                yield replace(piece, values=values.T, row_start=linear.expert * values.shape[1], rank=rank)
            continue
        part = meta_fp8.rank_rows(spread, rank, piece.values, piece.row_start, piece.decision.shape[0])
        if part is not None:
            yield replace(piece, values=part[0], row_start=part[1], rank=rank)


def encode_kept(piece: Piece) -> EncodedRows:
    """What one of the pieces of `split_piece` that is not quantized contributes to its stored tensor.

    Raises:
        QuantizationError: as of `finite_bf16`.
    """
    decision = piece.decision
    name = decision.outputs[0].name
    if decision.spread is not None:
        assert piece.rank is not None
        name = decision.spread.weights(piece.rank)
    return EncodedRows(name=name, values=finite_bf16(piece), row_start=piece.row_start)


def quantize_piece(piece: Piece, backend: Backend, out: torch.Tensor | None = None) -> PackedWeight:
    """Quantize a piece as its plan says.

    Args:
        piece: rows of a weight that is to be quantized.
        backend: what quantizes; the bytes do not depend on it.
        out: memory for the codes, as for `Backend.quantize`.

    Raises:
        QuantizationError: NaN or Inf; the message names the weight.
    """
    assert piece.decision.scheme is not None
    try:
        return backend.quantize(piece.values, piece.decision.scheme, out)
    except QuantizationError as error:
        raise QuantizationError(f"{piece.decision.name}: {error}") from error


def encode_piece(piece: Piece, quantized: PackedWeight) -> tuple[EncodedRows, ...]:
    """What a quantized piece (of `split_piece`) contributes to the stored tensors of its weight."""
    linear, spread = piece.decision.linear, piece.decision.spread
    if spread is not None:
        assert linear is not None
        assert linear.expert is not None
        assert piece.rank is not None
        return meta_fp8.encode_expert(spread, piece.rank, linear.expert, quantized.codes, quantized.scale)
    if piece.decision.fused:
        assert linear is not None
        assert linear.expert is not None
        return encode_expert(linear.source, quantized.codes, quantized.scale, linear.expert)
    return encode_packed(
        piece.decision.name, quantized, row_start=piece.row_start, out_features=piece.decision.shape[0]
    )


def finite_bf16(piece: Piece) -> torch.Tensor:
    """The values of a kept piece, as they are stored: contiguous bfloat16.

    Raises:
        QuantizationError: NaN or Inf, or a float32 beyond bfloat16; the message names the weight.
    """
    values = piece.values.to(torch.bfloat16).contiguous()
    # In parts, because `isfinite` makes temporaries as large as its argument.
    if not all(bool(torch.isfinite(part).all()) for part in torch.split(values.view(-1), CHUNK_ELEMENTS)):
        raise QuantizationError(
            f"{piece.decision.name}: holds NaN or Inf between rows {piece.row_start} and "
            f"{piece.row_start + len(piece.values)}; the checkpoint is damaged: download it again"
        )
    return values


def _piece(decision: Decision, values: torch.Tensor, row_start: int) -> Piece:
    num_bytes = values.numel() * values.element_size()
    return Piece(decision=decision, values=values, row_start=row_start, num_bytes=num_bytes)
