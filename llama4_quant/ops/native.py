"""The operators of reference.py as compiled CPU kernels: weights are read where they lie, as they are stored.

Nothing is repacked or kept, so a weight may be a view of a memory-mapped file. Activations and results are bf16; for
other operands `why_not_dense`, `why_not_int4`, `why_not_fp8` and `why_not_int8` give the reason, which a caller that
can use another backend asks for first: operators raise it. `probe()` says whether there are kernels at all; they are
compiled on first use (llama4_quant/native.py).

Numbers, with their bounds in docs/kernels-cpu.md: products are summed in float32, and results rounded to bf16 once.
They do not depend on the number of threads, which is torch's. FP8 activations get the codes of reference.py.

Shape letters: E experts, G groups, K in, N out, R rows of expert work, W words of 8 codes; `...` leading dimensions.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from llama4_quant.ops.native_checks import is_per_row, why_not_dense, why_not_fp8, why_not_int4, why_not_int8
from llama4_quant.ops.native_library import Format, Library, build, pack
from llama4_quant.ops.native_program import built_or_reason, reason_of, required
from llama4_quant.ops.native_tape import Tape
from llama4_quant.ops.torch_cpu import spans
from llama4_quant.ops.use import Operator

__all__ = [
    "description",
    "grouped_dense",
    "grouped_fp8",
    "grouped_int4",
    "grouped_int8",
    "linear_dense",
    "linear_fp8",
    "linear_int4",
    "linear_int8",
    "probe",
    "record",
    "why_not_dense",
    "why_not_fp8",
    "why_not_int4",
    "why_not_int8",
]

DENSE_ROWS = 4
"""Rows from which torch's own bf16 product is the quicker one: its weights need no unpacking."""
DENSE_ROWS_IN_TILES = 1024
"""The same where there is a matrix unit."""

THREADED_PRODUCTS = 1 << 20
"""Products of numbers under which one thread does all: waiting for others would take longer than the work, and much
longer on a busy machine."""

_FORMATS = {
    Operator.LINEAR_DENSE: Format.BF16,
    Operator.LINEAR_INT4: Format.INT4,
    Operator.LINEAR_INT8: Format.INT8,
    Operator.LINEAR_FP8: Format.FP8,
    Operator.GROUPED_DENSE: Format.BF16,
    Operator.GROUPED_INT4: Format.INT4,
    Operator.GROUPED_FP8: Format.FP8,
}
_SCALE_TYPES = {torch.bfloat16: 1, torch.float32: 2}


def probe() -> str | None:
    """Why there are no compiled kernels; None if there are. Compiles them on first use, after that it costs nothing."""
    return reason_of(_library())


def description() -> str:
    """For reports: the instructions that are used and the compiler, or why there are no compiled kernels."""
    found = _library()
    return found if isinstance(found, str) else f"{found.instructions}, {found.compiler}"


def linear_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: x [..., K], weight [N, K], bias [N] or None. Returns [..., N].

    Raises:
        ValueError: what `why_not_dense` says; the other operators likewise.
        RuntimeError: there are no compiled kernels; `probe` says why.
    """
    _require(why_not_dense(x, weight, bias), dims=weight.dim() == 2)
    if x.numel() >= _dense_rows() * x.shape[-1]:
        return functional.linear(x, weight, bias)
    return _linear(Format.BF16, x, weight, None, bias)


def linear_int4(x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """reference.linear_int4: weight_packed int32 [N, W], weight_scale bf16 [N, G]. Returns [..., N]."""
    _require(why_not_int4(x, weight_packed, weight_scale, bias), dims=weight_packed.dim() == 2)
    return _linear(Format.INT4, x, weight_packed, weight_scale, bias)


def linear_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """reference.linear_fp8: weight e4m3 [N, K], weight_scale float32 [N, 1] or in blocks. Returns [..., N]."""
    _require(why_not_fp8(x, weight, weight_scale, bias), dims=weight.dim() == 2)
    return _linear(Format.FP8, x, weight, weight_scale, bias)


def linear_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """reference.linear_int8: weight int8 [N, K], weight_scale float32 or bf16 [N, 1]. Returns [..., N]."""
    _require(why_not_int8(x, weight, weight_scale, bias), dims=weight.dim() == 2)
    return _linear(Format.INT8, x, weight, weight_scale, bias)


def grouped_dense(x_RK: Tensor, rows_per_expert: Tensor, weight_ENK: Tensor) -> Tensor:
    """reference.grouped_dense. The weights of an expert without rows are not read.

    Args:
        x_RK: rows sorted by expert.
        rows_per_expert: [E] integers on the CPU that sum to R.
        weight_ENK: stacked weights; the experts themselves may lie apart.

    Returns:
        [R, N].
    """
    _require(why_not_dense(x_RK, weight_ENK), dims=weight_ENK.dim() == 3)
    if x_RK.shape[0] >= _dense_rows():
        y_RN = x_RK.new_empty(x_RK.shape[0], weight_ENK.shape[1])
        for expert, rows in spans(rows_per_expert):
            y_RN[rows] = linear_dense(x_RK[rows], weight_ENK[expert])
        return y_RN
    return _grouped(Format.BF16, x_RK, weight_ENK, None, rows_per_expert)


def grouped_int4(x_RK: Tensor, rows_per_expert: Tensor, packed_ENW: Tensor, scale_ENG: Tensor) -> Tensor:
    """`grouped_dense` for stacks of `linear_int4`'s weights."""
    _require(why_not_int4(x_RK, packed_ENW, scale_ENG), dims=packed_ENW.dim() == 3)
    return _grouped(Format.INT4, x_RK, packed_ENW, scale_ENG, rows_per_expert)


def grouped_fp8(x_RK: Tensor, rows_per_expert: Tensor, weight_ENK: Tensor, scale_E: Tensor) -> Tensor:
    """`grouped_dense` for stacks of `linear_fp8`'s weights; scale_E is [E, N, 1], or in blocks [E, N/128, K/128]."""
    _require(why_not_fp8(x_RK, weight_ENK, scale_E), dims=weight_ENK.dim() == 3)
    return _grouped(Format.FP8, x_RK, weight_ENK, scale_E, rows_per_expert)


def grouped_int8(x_RK: Tensor, rows_per_expert: Tensor, weight_ENK: Tensor, scale_EN1: Tensor) -> Tensor:
    """`grouped_dense` for stacks of `linear_int8`'s weights."""
    _require(why_not_int8(x_RK, weight_ENK, scale_EN1), dims=weight_ENK.dim() == 3)
    return _grouped(Format.INT8, x_RK, weight_ENK, scale_EN1, rows_per_expert)


@functools.cache
def _library() -> Library | str:
    return built_or_reason(build)


def _dense_rows() -> int:
    return DENSE_ROWS_IN_TILES if required(_library()).has_tiles else DENSE_ROWS


def _require(reason: str | None, *, dims: bool) -> None:
    if reason is not None or not dims:
        raise ValueError(reason or "a linear operator takes one weight [N, K], a grouped one a stack [E, N, K]")


def _linear(format_: Format, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """One expert that has all rows."""
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    y, num_rows = x.new_empty((*x.shape[:-1], weight.shape[0])), x.numel() // x.shape[-1]
    task = _task(format_, x, weight, scale, bias, counts=_count(num_rows), y=y)
    required(_library()).matmul(task, num_rows)
    return y


@functools.lru_cache(maxsize=64)
def _count(num_rows: int) -> Tensor:
    return torch.tensor([num_rows])


def _grouped(format_: Format, x: Tensor, weight: Tensor, scale: Tensor | None, rows_per_expert: Tensor) -> Tensor:
    counts = rows_per_expert
    if counts.dtype is not torch.int64 or not counts.is_cpu or not counts.is_contiguous():
        counts = counts.to("cpu", torch.int64).contiguous()
    experts, outputs, _ = weight.shape
    if x.dim() != 2 or counts.shape != (experts,):
        raise ValueError(f"x is {list(x.shape)} and rows_per_expert {list(counts.shape)} for {experts} experts")
    x, y = x.contiguous(), x.new_empty((x.shape[0], outputs))
    required(_library()).matmul(_task(format_, x, weight, scale, None, counts=counts, y=y), x.shape[0])
    return y


def _task(
    format_: Format,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    counts: Tensor,
    y: Tensor,
) -> bytes:
    """Has addresses of contiguous operands, which the caller keeps. Decoding makes hundreds a token: no detours."""
    scale_address, scale_stride, groups, scale_type, is_block = 0, 0, 0, 0, False
    if scale is not None:
        scale_address, groups, scale_type = scale.data_ptr(), scale.shape[-1], _SCALE_TYPES[scale.dtype]
        scale_stride = scale.stride(0) * scale.element_size()  # of one weight it is not used
        is_block = format_ is Format.FP8 and not is_per_row(weight, scale)
    outputs, inputs = y.shape[-1], x.shape[-1]
    num_rows = x.numel() // inputs
    is_small = num_rows * outputs * inputs < THREADED_PRODUCTS
    addresses = (x.data_ptr(), counts.data_ptr(), weight.data_ptr(), scale_address)
    return pack(
        (*addresses, 0 if bias is None else bias.data_ptr(), y.data_ptr()),
        (num_rows, len(counts), outputs, inputs, weight.stride(0) * weight.element_size(), scale_stride, groups),
        (format_, scale_type, is_block, 1 if is_small else torch.get_num_threads()),
    )


def record(
    tape: Tape,
    operator: Operator,
    x_1K: Tensor,
    stored: Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    rows_per_expert: Tensor | None = None,
) -> Tensor:
    """One row's product on a tape.

    Args:
        tape: to add to.
        operator: linear, or grouped.
        x_1K: a buffer of the tape.
        stored: the weight's tensors in the operator's order: weight, then scale if there is one; contiguous.
        bias: [N], or None.
        rows_per_expert: int64 [E] for a grouped operator, a buffer too; one of them is 1, the others 0.

    Returns:
        [1, N], a buffer.
    """
    weight, scale = stored[0], stored[1] if len(stored) > 1 else None
    y = tape.buffer(1, weight.shape[-2])
    counts = _count(1) if rows_per_expert is None else rows_per_expert
    task = _task(_FORMATS[operator], x_1K, weight, scale, bias, counts=counts, y=y)
    tape.call(required(_library()).function, task, [*stored, counts, bias])
    return y
