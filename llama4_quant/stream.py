"""Source weights piece by piece, each as the [out, in] matrix that quantizers work on.

The unit is an expert slice: one expert of one fused tensor is read once and gives its gate and its up projection (or
its down projection). A large 2-D weight comes in chunks of rows. So what is held at a time does not grow with the
model: Maverick's 21.5 GB `gate_up_proj` passes through as 128 slices of 168 MB.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.errors import QuantizationError
from llama4_quant.formats.compressed_tensors import EncodedRows, encode_rows
from llama4_quant.plan import SOURCE_DTYPES, Decision, TensorPlan
from llama4_quant.quantizers.quantize import QuantizedWeight, quantize_weight
from llama4_quant.scheme import FP8_BLOCK_SIZE

CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Rows `row_start` to `row_start + len(values)` of one weight.

    Attributes:
        values: [rows, in] for linear weights (a view that may be strided: transposed experts), [rows, ...] otherwise.
        num_bytes: source bytes that this piece accounts for.
    """

    decision: Decision
    values: torch.Tensor
    row_start: int
    num_bytes: int


def read_pieces(reader: CheckpointReader, tensor: TensorPlan, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Piece]:
    """Read one source tensor; pieces come in stored order, and cover every weight exactly once."""
    if len(tensor.spec.shape) == 3:
        yield from _expert_pieces(reader, tensor)
        return
    (decision,) = tensor.decisions
    num_rows = tensor.spec.shape[0]
    step = _rows_per_chunk(tensor, chunk_bytes)
    for start in range(0, num_rows, step):
        values = reader.read_rows(tensor.spec.name, start, min(start + step, num_rows))
        yield _piece(decision, values, start)


def quantize_piece(piece: Piece) -> QuantizedWeight:
    """Quantize a piece as its plan says.

    Raises:
        QuantizationError: NaN or Inf; the message names the weight.
    """
    assert piece.decision.scheme is not None
    try:
        return quantize_weight(piece.values, piece.decision.scheme)
    except QuantizationError as error:
        raise QuantizationError(f"{piece.decision.name}: {error}") from error


def encode_piece(piece: Piece, quantized: QuantizedWeight) -> tuple[EncodedRows, ...]:
    """What a quantized piece contributes to the stored tensors of its weight."""
    return encode_rows(piece.decision.name, quantized, row_start=piece.row_start, out_features=piece.decision.shape[0])


def finite_bf16(piece: Piece) -> torch.Tensor:
    """The values of a kept piece, as they are stored: contiguous bfloat16.

    Raises:
        QuantizationError: NaN or Inf; the message names the weight.
    """
    if not bool(torch.isfinite(piece.values).all()):
        raise QuantizationError(
            f"{piece.decision.name}: holds NaN or Inf between rows {piece.row_start} and "
            f"{piece.row_start + len(piece.values)}; the checkpoint is damaged: download it again"
        )
    return piece.values.to(torch.bfloat16).contiguous()


def _rows_per_chunk(tensor: TensorPlan, chunk_bytes: int) -> int:
    """A multiple of 128 rows, so that chunks never cut an FP8 block."""
    row_bytes = SOURCE_DTYPES[tensor.dtype] * max(1, tensor.spec.num_weights // tensor.spec.shape[0])
    return max(1, chunk_bytes // (row_bytes * FP8_BLOCK_SIZE)) * FP8_BLOCK_SIZE


def _expert_pieces(reader: CheckpointReader, tensor: TensorPlan) -> Iterator[Piece]:
    num_experts, num_inputs, _ = tensor.spec.shape
    parts = len(tensor.decisions) // num_experts
    for expert in range(num_experts):
        stored_IN = reader.read_slice(tensor.spec.name, expert, 0, num_inputs)
        for decision in tensor.decisions[expert * parts : (expert + 1) * parts]:
            linear = decision.linear
            assert linear is not None
            assert linear.expert == expert
            columns = stored_IN[:, linear.out_start : linear.out_start + linear.out_features]
            yield _piece(decision, columns.T, 0)


def _piece(decision: Decision, values: torch.Tensor, row_start: int) -> Piece:
    num_bytes = values.numel() * values.element_size()
    return Piece(decision=decision, values=values, row_start=row_start, num_bytes=num_bytes)
