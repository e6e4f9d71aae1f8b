"""Attention of single queries to a cache, as a compiled kernel: keys and values are read as they are stored, once.

`CACHE_ATTENTION` is what a decoding step does with a layer's cache, which lies in one or several pieces; `reference`
says what it computes. Sums are float32; weights are too, or, by the matrix unit, bf16. Results do not depend on the
number of threads.

Shape letters: B batch, D head dimension, G key-value heads, R query heads that share keys, S columns.
"""

import ctypes
import functools
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama4_quant.native import compile_and_load
from llama4_quant.ops.native_program import built_or_reason, kernel_program, reason_of, required, task_function

SOURCES = (
    "attention.cpp",
    "task.h",
    "instructions.h",
    "activations.h",
    "floats.h",
    "codes.h",
    "cache_rows.h",
    "matrix_unit.h",
    "attention_tiles.h",
)
DIM_MULTIPLE = 16
FORMATS = {torch.bfloat16: 0, torch.float8_e4m3fn: 2, torch.int8: 3}
"""As `enum Format` in task.h."""
READS = frozenset(FORMATS)
"""What the kernel reads."""
_TASK = struct.Struct("@4P6q2i2f")
"""`struct AttentionTask` of attention.cpp."""
_PIECE = struct.Struct("@4P6q")
"""`struct Piece`."""
PIECE_BYTES = _PIECE.size
_SCALE_BYTES = 2


class Piece(NamedTuple):
    """Consecutive columns of a cache that lie together; values lie as keys do.

    Attributes:
        keys: address of the codes of the first column in the first group of the first row.
        values: likewise.
        key_scales: address of the first scale; 0 where tokens have none of their own.
        value_scales: likewise.
        columns: how many.
        row_stride: bytes of codes from row to row.
        group_stride: bytes of codes from group to group.
        scale_row_stride: elements.
        scale_group_stride: elements.
    """

    keys: int
    values: int
    key_scales: int
    value_scales: int
    columns: int
    row_stride: int
    group_stride: int
    scale_row_stride: int
    scale_group_stride: int

    @classmethod
    def of(
        cls, keys: Tensor, values: Tensor, key_scales: Tensor | None, value_scales: Tensor | None, start: int, stop: int
    ) -> "Piece":
        """Columns [start, stop) of keys and values [B, G, S, D] and of scales [B, G, S, 1]."""
        size = keys.element_size()
        skipped = start * keys.stride(2) * size
        key_scale_address = value_scale_address = scale_row_stride = scale_group_stride = 0
        if key_scales is not None and value_scales is not None:
            key_scale_address = key_scales.data_ptr() + start * _SCALE_BYTES
            value_scale_address = value_scales.data_ptr() + start * _SCALE_BYTES
            scale_row_stride, scale_group_stride = key_scales.stride(0), key_scales.stride(1)
        return cls(
            keys=keys.data_ptr() + skipped,
            values=values.data_ptr() + skipped,
            key_scales=key_scale_address,
            value_scales=value_scale_address,
            columns=stop - start,
            row_stride=keys.stride(0) * size,
            group_stride=keys.stride(1) * size,
            scale_row_stride=scale_row_stride,
            scale_group_stride=scale_group_stride,
        )

    def addresses_at(self, column: int, column_bytes: int) -> tuple[int, int, int, int]:
        """The first four attributes of what begins with a later column."""
        codes, scales = column * column_bytes, column * _SCALE_BYTES if self.key_scales else 0
        return self.keys + codes, self.values + codes, self.key_scales + scales, self.value_scales + scales


class AttentionLibrary:
    """kernels/attention.cpp, loaded."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self.attention = task_function(functions, "attention")
        self.store = task_function(functions, "cache_store")


def build(march: str = "native") -> AttentionLibrary:
    """Compile the library, or take it from the cache.

    Args:
        march: as of `kernel_program`.

    Raises:
        NativeUnavailableError: no compiler, or it failed.
    """
    program = kernel_program("attention", SOURCES, march)
    return compile_and_load(program, lambda compiled: AttentionLibrary(compiled.functions))


def why_not(device: torch.device, dtype: torch.dtype, stored: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel cannot attend to such a cache, or None if it can; asks for a compiler last."""
    if device.type != "cpu":
        return f"device {device.type}: the kernel is for processors"
    if dtype is not torch.bfloat16:
        return f"dtype {str(dtype).removeprefix('torch.')}: the kernel takes bfloat16"
    if stored not in READS:
        return f"a cache of {str(stored).removeprefix('torch.')}: the kernel reads bfloat16, FP8 and int8"
    if head_dim % DIM_MULTIPLE:
        return f"head_dim {head_dim} is not a multiple of {DIM_MULTIPLE}"
    return probe()


def probe() -> str | None:
    """Why there is no compiled kernel; None if there is one. Compiles it on first use."""
    return reason_of(_library())


def library() -> AttentionLibrary:
    """The kernels.

    Raises:
        RuntimeError: there are none; `probe` says why.
    """
    return required(_library())


@functools.cache
def _library() -> AttentionLibrary | str:
    return built_or_reason(build)


def reference(
    q_BGRD: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_scales: Sequence[Tensor],
    value_scales: Sequence[Tensor],
    bias: Tensor | None,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """What `cache_attention` computes, in float32.

    Args:
        q_BGRD: a query for each head.
        keys: pieces of S columns in all, each [B, G, columns, D], bf16, e4m3 or int8.
        values: likewise.
        key_scales: bf16 [B, G, columns, 1] of each piece for codes that have one for each token; or none.
        value_scales: likewise.
        bias: float32 [B, 1, 1, S], added to the scores; or None.
        key_scale: of all codes.
        value_scale: of all codes.

    Returns:
        softmax(Q K^T / sqrt(D)) V, [B, G, R, D], in the dtype of the queries.
    """
    k, v = torch.cat([part.float() for part in keys], dim=2), torch.cat([part.float() for part in values], dim=2)
    if key_scales:
        k, v = k * torch.cat(list(key_scales), dim=2).float(), v * torch.cat(list(value_scales), dim=2).float()
    scores = q_BGRD.float() @ (k * key_scale).transpose(2, 3) / math.sqrt(q_BGRD.shape[-1])
    scores = scores if bias is None else scores + bias
    return (scores.softmax(dim=-1) @ (v * value_scale)).type_as(q_BGRD)


def cache_attention(
    q_BGRD: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_scales: Sequence[Tensor],
    value_scales: Sequence[Tensor],
    bias: Tensor | None,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """The kernel; as `reference`, of operands that `why_not` has nothing against.

    Raises:
        ValueError: shapes, strides or dtypes do not fit.
        RuntimeError: there is no compiled kernel; `probe` says why.
        MemoryError: none for what a call needs beside its operands.
    """
    kernels = library()
    _check_codes(q_BGRD, keys, values)
    _check_scales(keys, key_scales, value_scales)
    _check_bias(keys, bias)
    q_BGRD = q_BGRD.contiguous()
    output = torch.empty_like(q_BGRD)
    all_scales = zip(key_scales, value_scales, strict=True) if key_scales else [(None, None)] * len(keys)
    pieces = pack_pieces(
        [Piece.of(k, v, *own, 0, k.shape[2]) for k, v, own in zip(keys, values, all_scales, strict=True)]
    )
    buffer = ctypes.create_string_buffer(pieces, len(pieces))
    task = pack_task(
        q_BGRD,
        output,
        bias,
        pieces=(ctypes.addressof(buffer), len(keys)),
        stored=keys[0].dtype,
        scales=(key_scale, value_scale),
    )
    if kernels.attention(task):
        raise MemoryError("no memory for the scratch space of attention")
    return output


def pack_pieces(pieces: Sequence[Piece]) -> bytes:
    """`struct Piece` of each."""
    packed, first = [], 0
    for piece in pieces:
        packed.append(_PIECE.pack(*piece[:5], first, *piece[5:]))
        first += piece.columns
    return b"".join(packed)


def pack_task(
    q_BGRD: Tensor,
    output: Tensor,
    bias: Tensor | None,
    *,
    pieces: tuple[int, int],
    stored: torch.dtype,
    scales: tuple[float, float],
) -> bytes:
    """`struct AttentionTask`; `pieces` are address and number of what `pack_pieces` gave."""
    address, num_pieces = pieces
    addresses = (q_BGRD.data_ptr(), address, 0 if bias is None else bias.data_ptr(), output.data_ptr())
    sizes = (*q_BGRD.shape, num_pieces, 0 if bias is None else bias.stride(0))
    key_scale, value_scale = scales
    softmax_scale = key_scale / math.sqrt(q_BGRD.shape[-1])
    return _TASK.pack(*addresses, *sizes, FORMATS[stored], torch.get_num_threads(), softmax_scale, value_scale)


def _check_codes(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if not keys or len(keys) != len(values):
        raise ValueError(f"{len(keys)} pieces of keys and {len(values)} of values")
    dtype = keys[0].dtype
    reason = why_not(q.device, q.dtype, dtype, q.shape[-1])
    if reason is not None:
        raise ValueError(reason)
    for k, v in zip(keys, values, strict=True):
        shape = (*q.shape[:2], k.shape[2], q.shape[3])
        fits = k.shape == v.shape == shape and k.shape[2] > 0 and k.dtype == v.dtype == dtype
        if not fits or k.stride() != v.stride() or k.stride()[2:] != (q.shape[3], 1):
            raise ValueError(
                f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} are not [B, G, R, D] "
                "and twice [B, G, S, D] with the same strides, column after column"
            )


def _check_scales(keys: Sequence[Tensor], key_scales: Sequence[Tensor], value_scales: Sequence[Tensor]) -> None:
    if not key_scales and not value_scales:
        return
    if not len(keys) == len(key_scales) == len(value_scales):
        raise ValueError("keys and values of every piece have scales for each token, or none of them has")
    for k, *pair in zip(keys, key_scales, value_scales, strict=True):
        shape = (*k.shape[:3], 1)
        for scales in pair:
            if scales.dtype is not torch.bfloat16 or scales.shape != shape:
                raise ValueError(f"scales are {scales.dtype} {list(scales.shape)}, expected bfloat16 {list(shape)}")
        if pair[0].stride() != pair[1].stride() or pair[0].stride(2) != 1:
            raise ValueError("scales of keys and of values do not lie alike, column after column")


def _check_bias(keys: Sequence[Tensor], bias: Tensor | None) -> None:
    if bias is None:
        return
    shape = (keys[0].shape[0], 1, 1, sum(k.shape[2] for k in keys))
    if bias.dtype is not torch.float32 or bias.shape != shape or bias.stride(3) != 1:
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}, expected float32 {list(shape)}, columns together")


def _fake(q_BGRD: Tensor, *_operands: object, **_scales: object) -> Tensor:
    return q_BGRD.new_empty(q_BGRD.shape)


_LIBRARY: Any = torch.library.Library("llama4_quant", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "cache_attention(Tensor q, Tensor[] keys, Tensor[] values, Tensor[] key_scales, Tensor[] value_scales, "
    "Tensor? bias, *, float key_scale=1.0, float value_scale=1.0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("cache_attention", cache_attention, "CPU")
torch.library.register_fake("llama4_quant::cache_attention", _fake, lib=_LIBRARY)

CACHE_ATTENTION: Callable[..., Tensor] = torch.ops.llama4_quant.cache_attention.default
"""What layers call: `cache_attention`, as torch.compile knows it."""
