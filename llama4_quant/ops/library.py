"""The operators as torch knows them: `torch.ops.llama4_quant.<operator>.<backend>`.

Every backend's function is an overload of one operator, with the operator's schema, so torch.compile puts a layer's
product into its graph as one node: what happens inside (one product per expert, as many as have rows) never breaks the
graph. `fake` results say shapes and dtypes without computing.

Calling an overload costs about 2 microseconds, against 4 to 10 of `torch.library.custom_op`, and a decoding step makes
a few hundred such calls. Registration with torch is global by nature; nothing else here is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama4_quant.ops import native, reference, torch_cpu
from llama4_quant.ops.use import Kernel, Operator

Function = Callable[..., Tensor]

_LINEAR = "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None) -> Tensor"
_SCHEMAS = {
    Operator.LINEAR_DENSE: "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    Operator.LINEAR_INT4: _LINEAR.replace("Tensor weight,", "Tensor weight_packed,"),
    Operator.LINEAR_INT8: _LINEAR,
    Operator.LINEAR_FP8: _LINEAR,
    Operator.GROUPED_DENSE: "(Tensor x_RK, Tensor rows_per_expert, Tensor weight_ENK) -> Tensor",
    Operator.GROUPED_INT4: "(Tensor x_RK, Tensor rows_per_expert, Tensor packed_ENW, Tensor scale_ENG) -> Tensor",
    Operator.GROUPED_FP8: "(Tensor x_RK, Tensor rows_per_expert, Tensor weight_ENK, Tensor scale_E) -> Tensor",
}
_LIBRARY = torch.library.Library("llama4_quant", "FRAGMENT")  # type: ignore[no-untyped-call]


def _register(operator: Operator, kernel: Kernel, function: Function) -> Function:
    name = f"{operator}.{kernel}"
    # Where a backend does not run its function says so; the choice (dispatch.py) keeps layers from asking it.
    library: Any = _LIBRARY  # its methods have no types
    library.define(name + _SCHEMAS[operator], tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, function, "CompositeExplicitAutograd" if kernel is Kernel.REFERENCE else "CPU")
    fake = _fake_grouped if operator.is_grouped else _fake_linear
    torch.library.register_fake(f"llama4_quant::{name}", fake, lib=_LIBRARY)
    overload: Function = getattr(getattr(torch.ops.llama4_quant, operator), kernel)
    return overload


def _fake_linear(x: Tensor, weight: Tensor, *_: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_grouped(x_RK: Tensor, _rows_per_expert: Tensor, weight_ENK: Tensor, *_: Tensor) -> Tensor:
    return x_RK.new_empty((x_RK.shape[0], weight_ENK.shape[1]))


def _differentiate_grouped_dense() -> None:
    """Gradients at the inputs: the same product with transposed weights. Weights have none, as they are not trained."""

    def remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001 - torch's signature
        ctx.save_for_backward(*inputs[1:])

    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor, None, None]:
        rows_per_expert, weight_ENK = ctx.saved_tensors
        return grouped_dense(grad_RN, rows_per_expert, weight_ENK.transpose(1, 2)), None, None

    grouped_dense = OPERATORS[Operator.GROUPED_DENSE][Kernel.REFERENCE]
    name = f"llama4_quant::{Operator.GROUPED_DENSE}.{Kernel.REFERENCE}"
    torch.library.register_autograd(name, backward, setup_context=remember, lib=_LIBRARY)


_FUNCTIONS: dict[Operator, dict[Kernel, Function]] = {
    Operator.LINEAR_DENSE: {Kernel.NATIVE: native.linear_dense},
    Operator.LINEAR_INT4: {
        Kernel.NATIVE: native.linear_int4,
        Kernel.TORCH: torch_cpu.linear_int4,
        Kernel.REFERENCE: reference.linear_int4,
    },
    Operator.LINEAR_INT8: {
        Kernel.NATIVE: native.linear_int8,
        Kernel.TORCH: torch_cpu.linear_int8,
        Kernel.REFERENCE: reference.linear_int8,
    },
    Operator.LINEAR_FP8: {
        Kernel.NATIVE: native.linear_fp8,
        Kernel.TORCH: torch_cpu.linear_fp8,
        Kernel.REFERENCE: reference.linear_fp8,
    },
    Operator.GROUPED_DENSE: {
        Kernel.NATIVE: native.grouped_dense,
        Kernel.TORCH: torch_cpu.grouped_dense,
        Kernel.REFERENCE: reference.grouped_dense,
    },
    Operator.GROUPED_INT4: {
        Kernel.NATIVE: native.grouped_int4,
        Kernel.TORCH: torch_cpu.grouped_int4,
        Kernel.REFERENCE: reference.grouped_int4,
    },
    Operator.GROUPED_FP8: {
        Kernel.NATIVE: native.grouped_fp8,
        Kernel.TORCH: torch_cpu.grouped_fp8,
        Kernel.REFERENCE: reference.grouped_fp8,
    },
}
OPERATORS: dict[Operator, dict[Kernel, Function]] = {
    operator: {kernel: _register(operator, kernel, function) for kernel, function in functions.items()}
    for operator, functions in _FUNCTIONS.items()
}
"""Every operator's overloads, by backend."""
# A dense product is an operator of torch already, with everything that torch knows about it.
OPERATORS[Operator.LINEAR_DENSE][Kernel.REFERENCE] = reference.linear_dense
_differentiate_grouped_dense()
