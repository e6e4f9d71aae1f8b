"""Every overload is what torch.library says an operator has to be, and its fake result is like the real one."""

import pytest
import torch
from ops.op_cases import make_case

from llama4_quant.ops import Kernel, Operator, choose, repack_int4
from llama4_quant.ops.library import OPERATORS

OVERLOADS = [
    (operator, kernel)
    for operator, overloads in OPERATORS.items()
    for kernel in overloads
    if operator is not Operator.LINEAR_DENSE or kernel is Kernel.NATIVE  # else torch's own
]


@pytest.mark.parametrize(("operator", "kernel"), OVERLOADS)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(operator: Operator, kernel: Kernel, bias: bool) -> None:
    case = make_case(operator, bias=bias)
    choice = choose(kernel, case.use)
    arguments = list(case.arguments)
    if choice.repacks:
        first = 2 if operator.is_grouped else 1
        arguments[first : first + 2] = repack_int4(*case.tensors)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if operator in {Operator.LINEAR_FP8, Operator.GROUPED_FP8}:
        checks = checks[1:]  # the first multiplies FP8 tensors to compare them, which torch cannot
    found = torch.library.opcheck(choice.call, tuple(arguments), test_utils=checks)
    assert found == dict.fromkeys(checks, "SUCCESS")


def test_overloads_are_found_by_name() -> None:
    assert OPERATORS[Operator.GROUPED_INT4][Kernel.REFERENCE] is torch.ops.llama4_quant.grouped_int4.reference


def test_gradients_at_the_inputs_of_dense_experts() -> None:
    case = make_case(Operator.GROUPED_DENSE, dtype=torch.float64)
    call = choose(Kernel.REFERENCE, case.use).call
    x, rows, weight = case.arguments
    assert x is not None
    assert torch.autograd.gradcheck(lambda inputs: call(inputs, rows, weight), (x.requires_grad_(),))
