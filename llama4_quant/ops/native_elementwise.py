"""What happens to activations between matrix products, in bf16 on processors, as compiled kernels.

`RMS_NORM`, `ROTATE`, `SILU_MUL`, and on a tape (native_tape.py) sums and scaling too: each is one pass over memory and
one call, where torch makes ten of either. In decoding it is the calls that count: after a product has streamed tens of
megabytes through the caches, each of them starts cold. runtime/elementwise.py has what they compute in torch, which
runs anywhere else.

Shape letters: B batch, D head dimension, P = D/2 pairs, T tokens, X heads; `...` leading dimensions.
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama4_quant.native import compile_and_load
from llama4_quant.ops.native_program import built_or_reason, kernel_program, reason_of, required, task_function
from llama4_quant.ops.native_tape import Tape

SOURCES = ("elementwise.cpp", "floats.h", "task.h")
_TASK = struct.Struct("@5P4qdi")
"""`struct ElementwiseTask` of elementwise.cpp."""
_ONE_THREAD = 1 << 16
"""Elements below which one thread is quicker than waking another."""


class ElementwiseLibrary:
    """kernels/elementwise.cpp, loaded."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self.rms_norm = task_function(functions, "rms_norm")
        self.rotate = task_function(functions, "rotate")
        self.silu_mul = task_function(functions, "silu_mul")
        self.add = task_function(functions, "add")
        self.multiply = task_function(functions, "multiply")


def build(march: str = "native") -> ElementwiseLibrary:
    """Compile the library, or take it from the cache.

    Args:
        march: as of `kernel_program`.

    Raises:
        NativeUnavailableError: no compiler, or it failed.
    """
    program = kernel_program("elementwise", SOURCES, march, "-ffp-contract=off")
    return compile_and_load(program, lambda compiled: ElementwiseLibrary(compiled.functions))


def probe() -> str | None:
    """Why there are no compiled kernels; None if there are. Compiles them on first use."""
    return reason_of(_library())


@functools.cache
def _library() -> ElementwiseLibrary | str:
    return built_or_reason(build)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Rows divided by their root mean square and rounded, then times the weight.

    Args:
        x: [..., H], bf16 on the CPU.
        weight: [H], likewise; or None.
        eps: added to the mean square, not negative.

    Returns:
        [..., H].

    Raises:
        ValueError: other dtypes or shapes; the other operators likewise.
        RuntimeError: there are no compiled kernels; `probe` says why.
    """
    size = x.shape[-1]
    if not _is_plain(x) or (weight is not None and not (_is_plain(weight) and weight.shape == (size,))):
        raise ValueError(_refusal("x [..., H] and a weight [H]", x, weight))
    x, weight, y = x.contiguous(), None if weight is None else weight.contiguous(), x.new_empty(x.shape)
    required(_library()).rms_norm(_task(x, weight, y, eps))
    return y


def rotate(x_BTXD: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, eps: float | None) -> Tensor:
    """Adjacent pairs of every head rotated; then, with `eps`, each head divided by its root mean square.

    Args:
        x_BTXD: bf16 on the CPU.
        cos_BTP: float32 [B, T, P], or [1, T, P] for rows that have the same positions.
        sin_BTP: likewise.
        eps: of the norm, not negative; None for no norm.

    Returns:
        [B, T, X, D].
    """
    batch, tokens, _, dim = x_BTXD.shape
    fits = cos_BTP.shape in {(batch, tokens, dim // 2), (1, tokens, dim // 2)} and sin_BTP.shape == cos_BTP.shape
    if not _is_plain(x_BTXD) or not fits or dim % 2 or not cos_BTP.dtype == sin_BTP.dtype == torch.float32:
        raise ValueError(_refusal("x [B, T, X, D] and float32 cosines and sines [B or 1, T, D / 2]", x_BTXD, cos_BTP))
    x, cos, sin = x_BTXD.contiguous(), cos_BTP.contiguous(), sin_BTP.contiguous()
    y = x.new_empty(x.shape)
    required(_library()).rotate(_rotation_task(x, cos, sin, y, eps))
    return y


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` of the same shape [..., I], bf16 on the CPU."""
    if not _is_plain(gate) or not _is_plain(up) or gate.shape != up.shape:
        raise ValueError(_refusal("two operands of one shape", gate, up))
    gate, up = gate.contiguous(), up.contiguous()
    y = gate.new_empty(gate.shape)
    required(_library()).silu_mul(_task(gate, up, y))
    return y


def record_rms_norm(tape: Tape, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` on a tape; x is a buffer, and so is the result."""
    y = tape.buffer(*x.shape)
    tape.call(required(_library()).rms_norm, _task(x, weight, y, eps), [weight])
    return y


def record_rotate(tape: Tape, x_BTXD: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, eps: float | None) -> Tensor:
    """`rotate` on a tape."""
    y = tape.buffer(*x_BTXD.shape)
    tape.call(required(_library()).rotate, _rotation_task(x_BTXD, cos_BTP, sin_BTP, y, eps), [cos_BTP, sin_BTP])
    return y


def record_silu_mul(tape: Tape, gate: Tensor, up: Tensor) -> Tensor:
    """`silu_mul` on a tape."""
    y = tape.buffer(*gate.shape)
    tape.call(required(_library()).silu_mul, _task(gate, up, y))
    return y


def record_add(tape: Tape, x: Tensor, other: Tensor) -> None:
    """`x += other` on a tape, rounded as torch rounds it."""
    tape.call(required(_library()).add, _task(x, other, x))


def record_multiply(tape: Tape, x: Tensor, factor: Tensor) -> Tensor:
    """`x * factor`, rounded to bf16, on a tape; the factor is one float32, read when the tape runs."""
    y, size = tape.buffer(*x.shape), x.shape[-1]
    addresses = (x.data_ptr(), 0, factor.data_ptr(), 0, y.data_ptr())
    task = _TASK.pack(*addresses, x.numel() // size, size, 1, 1, 0.0, _threads(x))
    tape.call(required(_library()).multiply, task, [factor])
    return y


def _task(x: Tensor, other: Tensor | None, y: Tensor, eps: float = 0.0) -> bytes:
    """Has addresses: the caller keeps the operands."""
    size = x.shape[-1]
    addresses = (x.data_ptr(), 0 if other is None else other.data_ptr(), 0, 0, y.data_ptr())
    return _TASK.pack(*addresses, x.numel() // max(size, 1), size, 1, 1, eps, _threads(x))


def _rotation_task(x_BTXD: Tensor, cos: Tensor, sin: Tensor, y: Tensor, eps: float | None) -> bytes:
    batch, tokens, heads, dim = x_BTXD.shape
    addresses = (x_BTXD.data_ptr(), 0, cos.data_ptr(), sin.data_ptr(), y.data_ptr())
    sizes = (batch * tokens * heads, dim, max(heads, 1), max(cos.shape[0] * tokens, 1))
    return _TASK.pack(*addresses, *sizes, -1.0 if eps is None else eps, _threads(x_BTXD))


def _is_plain(x: Tensor) -> bool:
    return x.dtype is torch.bfloat16 and x.is_cpu and x.dim() > 0


def _threads(x: Tensor) -> int:
    return 1 if x.numel() < _ONE_THREAD else torch.get_num_threads()


def _refusal(expected: str, x: Tensor, other: Tensor | None) -> str:
    found = " and ".join(f"{t.dtype} {list(t.shape)} on {t.device}" for t in (x, other) if t is not None)
    return f"expected {expected}, bfloat16 on the CPU; found {found}"


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


_LIBRARY: Any = torch.library.Library("llama4_quant", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, _function in (
    ("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor", rms_norm),
    ("rotate(Tensor x, Tensor cos, Tensor sin, float? eps) -> Tensor", rotate),
    ("silu_mul(Tensor gate, Tensor up) -> Tensor", silu_mul),
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_function.__name__, _function, "CPU")
    torch.library.register_fake(f"llama4_quant::{_function.__name__}", _fake, lib=_LIBRARY)

Function = Callable[..., Tensor]
RMS_NORM: Function = torch.ops.llama4_quant.rms_norm.default
ROTATE: Function = torch.ops.llama4_quant.rotate.default
SILU_MUL: Function = torch.ops.llama4_quant.silu_mul.default
"""What layers call: the functions above, as torch.compile knows them."""
