"""Which backend is chosen, and what is said about those that are not."""

from dataclasses import replace

import pytest
import torch
from ops.op_cases import INT4, INT4_CHANNEL, SCHEME_OF, make_case

from llama4_quant.errors import UsageError
from llama4_quant.ops import Kernel, Operator, Use, choose, count_kernels, explain, native, native_support
from llama4_quant.scheme import Strategy, WeightScheme, WeightType


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a compiler."""
    monkeypatch.setattr(native_support.native, "probe", lambda: "no C++ compiler")


def _use(operator: Operator, **changes: object) -> Use:
    return replace(make_case(operator).use, **changes)


def test_every_operator_is_known_by_its_use() -> None:
    for operator in Operator:
        assert make_case(operator).use.operator is operator


@pytest.mark.parametrize(
    ("operator", "changes", "expected"),
    [
        (Operator.LINEAR_DENSE, {}, Kernel.TORCH),
        (Operator.LINEAR_DENSE, {"dtype": torch.float32}, Kernel.TORCH),
        (Operator.LINEAR_INT4, {}, Kernel.TORCH),
        (Operator.LINEAR_INT4, {"scheme": INT4_CHANNEL}, Kernel.TORCH),
        (Operator.LINEAR_INT4, {"dtype": torch.float32}, Kernel.REFERENCE),
        (Operator.LINEAR_INT4, {"dtype": torch.float16}, Kernel.REFERENCE),
        (Operator.LINEAR_INT4, {"device": torch.device("cuda")}, Kernel.REFERENCE),
        (Operator.LINEAR_INT4, {"out_features": 130}, Kernel.REFERENCE),
        (Operator.LINEAR_INT4, {"scheme": INT4_CHANNEL, "in_features": 40}, Kernel.REFERENCE),
        (Operator.LINEAR_INT8, {}, Kernel.TORCH),
        (Operator.LINEAR_INT8, {"in_features": 40}, Kernel.REFERENCE),
        (Operator.LINEAR_FP8, {}, Kernel.TORCH),
        (Operator.GROUPED_DENSE, {}, Kernel.TORCH),
        (Operator.GROUPED_DENSE, {"dtype": torch.float32}, Kernel.REFERENCE),
        (Operator.GROUPED_INT4, {}, Kernel.TORCH),
        (Operator.GROUPED_FP8, {}, Kernel.TORCH),
    ],
)
@pytest.mark.usefixtures("without_native")
def test_auto_takes_the_first_that_can(operator: Operator, changes: dict[str, object], expected: Kernel) -> None:
    choice = choose("auto", _use(operator, **changes))
    assert choice.kernel is expected
    order = [Kernel.NATIVE, Kernel.TORCH, Kernel.REFERENCE]
    assert [kernel for kernel, _ in choice.rejected] == order[: order.index(expected)]
    if not changes:
        assert choice.rejected[0] == (Kernel.NATIVE, "no C++ compiler")


@pytest.mark.usefixtures("without_native")
def test_a_kernel_that_cannot_is_an_error_with_every_reason() -> None:
    use = _use(Operator.LINEAR_INT4, out_features=70, name="layers.0.q_proj")
    with pytest.raises(UsageError) as error:
        choose("torch", use)
    reasons = "native: no C++ compiler; torch: out_features 70 is not divisible by 16; reference: can run"
    assert str(error.value) == (
        "kernel torch cannot run layers.0.q_proj: linear_int4 of [70, 128] int4 g32, bfloat16 on cpu: "
        f"{reasons}; --kernel auto takes the first that can"
    )
    assert explain(use) == reasons


def test_the_reference_can_do_everything() -> None:
    odd = WeightScheme(type=WeightType.INT4, strategy=Strategy.CHANNEL)
    for operator in Operator:
        use = _use(operator, dtype=torch.float16, device=torch.device("meta"), out_features=7, in_features=9)
        assert choose(Kernel.REFERENCE, use).kernel is Kernel.REFERENCE
    assert choose("reference", _use(Operator.LINEAR_INT4, scheme=odd)).kernel is Kernel.REFERENCE


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown kernel 'cuda'; use one of auto, native, torch, reference"):
        choose("cuda", _use(Operator.LINEAR_DENSE))


@pytest.mark.usefixtures("without_native")
def test_choices_are_counted() -> None:
    odd = _use(Operator.LINEAR_FP8, dtype=torch.float16)
    uses = [_use(Operator.LINEAR_INT4), odd, _use(Operator.LINEAR_INT4)]
    counts = count_kernels(choose("auto", use) for use in uses)
    assert [(count.operator, count.kernel, count.count) for count in counts] == [
        (Operator.LINEAR_INT4, Kernel.TORCH, 2),
        (Operator.LINEAR_FP8, Kernel.REFERENCE, 1),
    ]
    assert str(counts[0]) == "linear_int4: torch x 2 (native: no C++ compiler)"


def test_only_torchs_int4_wants_another_order_of_bytes() -> None:
    for operator, scheme in SCHEME_OF.items():
        for kernel in (Kernel.TORCH, Kernel.REFERENCE):
            choice = choose(kernel, _use(operator))
            assert choice.repacks == (scheme is INT4 and kernel is Kernel.TORCH)
            assert (choice.stored_call is choice.call) != choice.repacks


GROUPS = [(k, g) for k in (96, 128, 192, 384) for g in (32, 48, 64, 96, 128, 192, 384, None) if k % (g or 1) == 0]


@pytest.mark.parametrize(("in_features", "group_size"), GROUPS)
def test_native_support_is_what_the_kernels_check(in_features: int, group_size: int | None) -> None:
    strategy = Strategy.CHANNEL if group_size is None else Strategy.GROUP
    scheme = WeightScheme(type=WeightType.INT4, strategy=strategy, group_size=group_size)
    for operator in (Operator.LINEAR_INT4, Operator.GROUPED_INT4):
        use = _use(operator, scheme=scheme, in_features=in_features)
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in use.stored_tensors().values()]
        said = native.why_not_int4(torch.empty(1, in_features, dtype=torch.bfloat16), *tensors)
        assert (native_support.why_not(use) is None) == (said is None)
