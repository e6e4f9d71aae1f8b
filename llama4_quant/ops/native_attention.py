"""Attention of single queries to a cache, as a compiled kernel: keys and values are read as they are stored, once.

`torch.ops.llama4_quant.cache_attention` is what a decoding step does with one block of a cache; `reference` says what
it computes. Sums are float32; results do not depend on the number of threads.

Shape letters: B batch, D head dimension, G key-value heads, R query heads that share keys, S columns.
"""

import ctypes
import functools
import math
import struct
from typing import Any

import torch
from torch import Tensor

from llama4_quant.native import compile_and_load
from llama4_quant.ops.native_program import built_or_reason, kernel_program, reason_of, required

SOURCES = ("attention.cpp", "floats.h", "task.h")
DIM_MULTIPLE = 16
_FORMATS = {torch.bfloat16: 0, torch.float8_e4m3fn: 2, torch.int8: 3}
"""As `enum Format` in task.h."""
READS = frozenset(_FORMATS)
"""What the kernel reads."""
_TASK = struct.Struct("@10P10q2i2f")
"""`struct AttentionTask` of attention.cpp."""
_ONE_THREAD = 1 << 17
"""Elements of keys below which one thread is quicker than waking another."""


class AttentionLibrary:
    """kernels/attention.cpp, loaded."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self.attention = functions.llama4_quant_attention
        self.part_floats = functions.llama4_quant_attention_part_floats
        self.scratch_floats = functions.llama4_quant_attention_scratch_floats
        for function in (self.attention, self.part_floats, self.scratch_floats):
            function.argtypes = (ctypes.c_char_p,)
            function.restype = ctypes.c_int64
        self.attention.restype = None


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
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    bias: Tensor | None,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """What `cache_attention` computes, in float32.

    Args:
        q_BGRD: a query for each head.
        keys: [B, G, S, D], bf16, e4m3 or int8.
        values: likewise.
        key_scales: bf16 [B, G, S, 1] for codes that have one for each token; or None.
        value_scales: likewise.
        bias: float32 [B, 1, 1, S], added to the scores; or None.
        key_scale: of all codes.
        value_scale: of all codes.

    Returns:
        softmax(Q K^T / sqrt(D)) V, float32 [B, G, R, D], and the logarithm of the sum of exponentials of the scores,
        float32 [B, G, R].
    """
    k, v = keys.float() * key_scale, values.float() * value_scale
    k = k if key_scales is None else k * key_scales.float()
    v = v if value_scales is None else v * value_scales.float()
    scores = q_BGRD.float() @ k.transpose(2, 3) / math.sqrt(q_BGRD.shape[-1])
    scores = scores if bias is None else scores + bias
    return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)


def cache_attention(
    q_BGRD: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    bias: Tensor | None,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The kernel; as `reference`, of operands that `why_not` has nothing against.

    Raises:
        ValueError: shapes, strides or dtypes do not fit.
        RuntimeError: there is no compiled kernel; `probe` says why.
    """
    library = required(_library())
    _check_codes(q_BGRD, keys, values)
    _check_scales(keys, key_scales, value_scales)
    _check_bias(keys, bias)
    q_BGRD = q_BGRD.contiguous()
    num_rows, num_groups, num_heads, dim = q_BGRD.shape
    outputs = torch.empty(q_BGRD.shape, dtype=torch.float32)
    log_sums = torch.empty(q_BGRD.shape[:3], dtype=torch.float32)
    threads = 1 if keys.numel() < _ONE_THREAD else torch.get_num_threads()
    strides = (keys.stride(0) * keys.element_size(), keys.stride(1) * keys.element_size())
    scale_strides = (0, 0) if key_scales is None else (key_scales.stride(0), key_scales.stride(1))
    bias_stride = 0 if bias is None else bias.stride(0)
    sizes = (num_rows, num_groups, num_heads, dim, keys.shape[2], *strides, *scale_strides, bias_stride)
    settings = (_FORMATS[keys.dtype], threads, key_scale / math.sqrt(dim), value_scale)
    shapes_only = _TASK.pack(*(0,) * 10, *sizes, *settings)
    parts = torch.empty(num_rows * num_groups * library.part_floats(shapes_only))
    scratch = torch.empty(threads * library.scratch_floats(shapes_only))
    operands = (q_BGRD, keys, values, key_scales, value_scales, bias, outputs, log_sums, parts, scratch)
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in operands)
    library.attention(_TASK.pack(*addresses, *sizes, *settings))
    return outputs, log_sums


def _check_codes(q: Tensor, keys: Tensor, values: Tensor) -> None:
    reason = why_not(q.device, q.dtype, keys.dtype, q.shape[-1])
    if reason is not None:
        raise ValueError(reason)
    shape = (*q.shape[:2], keys.shape[2], q.shape[3])
    fits = keys.shape == values.shape == shape and keys.shape[2] > 0 and keys.dtype == values.dtype
    if not fits or keys.stride() != values.stride() or keys.stride()[2:] != (q.shape[3], 1):
        raise ValueError(
            f"queries {list(q.shape)}, keys {list(keys.shape)} and values {list(values.shape)} are not [B, G, R, D] "
            "and twice [B, G, S, D] with the same strides, column after column"
        )


def _check_scales(keys: Tensor, key_scales: Tensor | None, value_scales: Tensor | None) -> None:
    if key_scales is None and value_scales is None:
        return
    if key_scales is None or value_scales is None:
        raise ValueError("keys and values have scales for each token, or neither has")
    shape = (*keys.shape[:3], 1)
    for scales in (key_scales, value_scales):
        if scales.dtype is not torch.bfloat16 or scales.shape != shape:
            raise ValueError(f"scales are {scales.dtype} {list(scales.shape)}, expected bfloat16 {list(shape)}")
    if key_scales.stride() != value_scales.stride() or key_scales.stride(2) != 1:
        raise ValueError("scales of keys and of values do not lie alike, column after column")


def _check_bias(keys: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        return
    shape = (keys.shape[0], 1, 1, keys.shape[2])
    if bias.dtype is not torch.float32 or bias.shape != shape or bias.stride(3) != 1:
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}, expected float32 {list(shape)}, columns together")


def _fake(q_BGRD: Tensor, *_operands: object, **_scales: object) -> tuple[Tensor, Tensor]:
    return (
        q_BGRD.new_empty(q_BGRD.shape, dtype=torch.float32),
        q_BGRD.new_empty(q_BGRD.shape[:3], dtype=torch.float32),
    )


_LIBRARY: Any = torch.library.Library("llama4_quant", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "cache_attention(Tensor q, Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales, Tensor? bias, "
    "*, float key_scale=1.0, float value_scale=1.0) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("cache_attention", cache_attention, "CPU")
torch.library.register_fake("llama4_quant::cache_attention", _fake, lib=_LIBRARY)
