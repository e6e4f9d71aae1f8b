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
from typing import Any

import torch
from torch import Tensor

from llama4_quant.native import compile_and_load
from llama4_quant.ops.native_program import built_or_reason, kernel_program, reason_of, required

SOURCES = (
    "attention.cpp",
    "task.h",
    "instructions.h",
    "floats.h",
    "codes.h",
    "cache_rows.h",
    "matrix_unit.h",
    "attention_tiles.h",
)
DIM_MULTIPLE = 16
_FORMATS = {torch.bfloat16: 0, torch.float8_e4m3fn: 2, torch.int8: 3}
"""As `enum Format` in task.h."""
READS = frozenset(_FORMATS)
"""What the kernel reads."""
_TASK = struct.Struct("@4P6q2i2f")
"""`struct AttentionTask` of attention.cpp."""
_PIECE = struct.Struct("@4P6q")
"""`struct Piece`."""


class AttentionLibrary:
    """kernels/attention.cpp, loaded."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self.attention = functions.llama4_quant_attention
        self.attention.argtypes = (ctypes.c_char_p,)
        self.attention.restype = ctypes.c_int32


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
    library = required(_library())
    _check_codes(q_BGRD, keys, values)
    _check_scales(keys, key_scales, value_scales)
    _check_bias(keys, bias)
    q_BGRD = q_BGRD.contiguous()
    output = torch.empty_like(q_BGRD)
    pieces = pack_pieces(keys, values, key_scales, value_scales)
    buffer = ctypes.create_string_buffer(pieces, len(pieces))
    task = pack_task(
        q_BGRD,
        output,
        bias,
        pieces=(ctypes.addressof(buffer), len(keys)),
        stored=keys[0].dtype,
        scales=(key_scale, value_scale),
    )
    if library.attention(task):
        raise MemoryError("no memory for the scratch space of attention")
    return output


def pack_pieces(
    keys: Sequence[Tensor], values: Sequence[Tensor], key_scales: Sequence[Tensor], value_scales: Sequence[Tensor]
) -> bytes:
    """`struct Piece` of each piece."""
    packed, first = [], 0
    for number, (k, v) in enumerate(zip(keys, values, strict=True)):
        addresses, scale_strides = (0, 0), (0, 0)
        if key_scales:
            scales = key_scales[number]
            addresses = (scales.data_ptr(), value_scales[number].data_ptr())
            scale_strides = (scales.stride(0), scales.stride(1))
        strides = (k.stride(0) * k.element_size(), k.stride(1) * k.element_size(), *scale_strides)
        packed.append(_PIECE.pack(k.data_ptr(), v.data_ptr(), *addresses, k.shape[2], first, *strides))
        first += k.shape[2]
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
    return _TASK.pack(*addresses, *sizes, _FORMATS[stored], torch.get_num_threads(), softmax_scale, value_scale)


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
