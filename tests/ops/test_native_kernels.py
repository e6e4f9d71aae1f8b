"""Compiled kernels against float64, with bounds from arithmetic, in every variant that this machine can run.

What a result may be off, of products x_k * w_k with the exact weights: half a step of bf16 when it is stored (2^-8 of
it), and what each way of summing adds, relative to the sum of |x_k * w_k|:

- few rows: sums of float32, and for integers activations in fixed point: far below 2^-12 for the sizes here;
- many rows of int4 in groups: code times scale is rounded to bf16 first (as in reference.py): 2^-8;
- FP8: activations have the codes of the reference, whose products with their scale are rounded there but not here.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from llama4_quant.native import NativeUnavailableError
from llama4_quant.ops import native, reference
from llama4_quant.ops.native_library import Library, build

STORED, SUMMED, SCALED = 2**-8, 2**-12, 2**-8
VARIANTS = ("native", "x86-64-v3")
ROWS = (1, 2, 3, 4, 7, 16, 17, 33, 70)

pytestmark = pytest.mark.skipif(native.probe() is not None, reason=f"no compiled kernels: {native.probe()}")


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The kernels as compiled for a kind of processor."""
    try:
        library = build(request.param)
    except NativeUnavailableError as error:
        pytest.skip(f"{request.param}: {error}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", lambda: library)
        yield library


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(num_rows: int, num_inputs: int) -> Tensor:
    """With an outlier, as layers have them."""
    x = torch.randn(num_rows, num_inputs, generator=generator(num_rows))
    x[:, num_inputs // 3] *= 100
    return x.bfloat16()


def int4(num_outputs: int, num_inputs: int, group_size: int) -> tuple[Tensor, Tensor]:
    shape = (num_outputs, -(-num_inputs // 8))
    packed = torch.randint(-(2**31), 2**31, shape, generator=generator()).to(torch.int32)
    scale = torch.rand(num_outputs, num_inputs // group_size, generator=generator(1)) * 0.02 + 0.001
    return packed, scale.bfloat16()


def fp8(num_outputs: int, num_inputs: int) -> Tensor:
    """All numbers, subnormal ones too, but NaN."""
    codes = torch.randint(0, 256, (num_outputs, num_inputs), generator=generator()).to(torch.uint8)
    codes[(codes & 127) == 127] = 0
    return codes.view(torch.float8_e4m3fn)


def check(y: Tensor, x: Tensor, weight: Tensor, added: float, bias: Tensor | None = None) -> None:
    """`y` against x @ weight.T in float64."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    sizes = x.double().abs() @ weight.double().abs().T
    off = (y.double() - exact).abs() - STORED * exact.abs() - added * sizes
    assert off.max() <= 0, f"{off.max():.3g} over the bound at {divmod(int(off.argmax()), off.shape[1])}"


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 768])
@pytest.mark.parametrize("num_outputs", [1, 16, 33, 100])
def test_int4_in_groups(variant: Library, group_size: int, num_outputs: int) -> None:
    for num_inputs in {group_size, 3 * group_size, 768}:
        if num_inputs % group_size:
            continue
        packed, scale = int4(num_outputs, num_inputs, group_size)
        weight = reference.dequantize_int4(packed, scale, num_inputs, torch.float64)
        for num_rows in ROWS:
            x = activations(num_rows, num_inputs)
            check(native.linear_int4(x, packed, scale), x, weight, SUMMED + SCALED)


@pytest.mark.parametrize("num_inputs", [8, 40, 96, 136, 1000, 5120])
def test_int4_with_one_scale_for_a_row(variant: Library, num_inputs: int) -> None:
    packed, scale = int4(33, num_inputs, num_inputs)
    weight = reference.dequantize_int4(packed, scale, num_inputs, torch.float64)
    bias = torch.randn(33, generator=generator(3)).bfloat16()
    for num_rows in ROWS:
        x = activations(num_rows, num_inputs)
        check(native.linear_int4(x, packed, scale, bias), x, weight, SUMMED, bias)


@pytest.mark.parametrize("num_inputs", [5, 40, 96, 1000, 5120])
def test_int8(variant: Library, num_inputs: int) -> None:
    weight = torch.randint(-128, 128, (33, num_inputs), generator=generator()).to(torch.int8)
    scale = torch.rand(33, 1, generator=generator(1)) * 0.01 + 0.001
    for num_rows in ROWS:
        x = activations(num_rows, num_inputs)
        check(native.linear_int8(x, weight, scale), x, weight.double() * scale.double(), SUMMED)


@pytest.mark.parametrize("num_inputs", [5, 40, 96, 1000, 5120])
def test_bf16(variant: Library, num_inputs: int) -> None:
    weight = torch.randn(33, num_inputs, generator=generator()).bfloat16()
    for num_rows in ROWS:
        x = activations(num_rows, num_inputs)
        check(native.linear_dense(x, weight), x, weight, SUMMED)


@pytest.mark.parametrize("num_inputs", [40, 128, 1000, 5120])
def test_fp8_with_a_scale_for_a_row(variant: Library, num_inputs: int) -> None:
    weight, scale = fp8(33, num_inputs), torch.rand(33, 1, generator=generator(1)) * 0.01 + 0.001
    for num_rows in ROWS:
        x = activations(num_rows, num_inputs)
        rounded = reference.round_activations_fp8(x)
        # The reference rounds code times scale to bf16: that much of each activation is not an error of the kernel.
        check(native.linear_fp8(x, weight, scale), rounded, weight.double() * scale.double(), SUMMED + SCALED)


@pytest.mark.parametrize("num_outputs", [1, 128, 200])
def test_fp8_in_blocks(variant: Library, num_outputs: int) -> None:
    weight = fp8(num_outputs, 384)
    scale = torch.rand(-(-num_outputs // 128), 3, generator=generator(1)) * 0.01 + 0.001
    exact = reference.dequantize_fp8(weight, scale, torch.float64)
    for num_rows in ROWS:
        x = activations(num_rows, 384)
        rounded = reference.round_activations_fp8(x, group_size=128)
        check(native.linear_fp8(x, weight, scale), rounded, exact, SUMMED + SCALED)


def test_nan_in_a_weight_or_an_activation_is_not_lost(variant: Library) -> None:
    weight, scale = fp8(40, 64), torch.ones(40, 1)
    weight.view(torch.uint8)[7, 9] = 0x7F
    packed, scale4 = int4(40, 64, 32)
    for num_rows in (1, 3, 20):
        x = activations(num_rows, 64)
        found = native.linear_fp8(x, weight, scale).isnan()
        assert found[:, 7].all()
        assert found.sum() == num_rows
        x[num_rows - 1, 3] = torch.nan
        for y in (
            native.linear_int4(x, packed, scale4),
            native.linear_int8(x, packed.view(torch.int8)[:, :32].repeat(1, 2), scale),
        ):
            assert y[-1].isnan().all()
            assert y[:-1].isfinite().all()


def test_zeros_give_zeros(variant: Library) -> None:
    packed, scale = int4(40, 128, 32)
    for num_rows in (1, 20):
        assert not native.linear_int4(torch.zeros(num_rows, 128, dtype=torch.bfloat16), packed, scale).any()


def operators() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]]:
    """By name: for one weight, for a stack, and stacks of 5 experts."""
    packed, scale = zip(*(int4(48, 256, 64) for _ in range(5)), strict=True)
    codes = torch.stack([fp8(48, 256)] * 5)
    return {
        "int4": (native.linear_int4, native.grouped_int4, (torch.stack(packed), torch.stack(scale))),
        "fp8": (native.linear_fp8, native.grouped_fp8, (codes, torch.full((5, 48, 1), 0.01))),
        "bf16": (
            native.linear_dense,
            native.grouped_dense,
            (torch.randn(5, 48, 256, generator=generator()).bfloat16(),),
        ),
    }


@pytest.mark.parametrize("name", ["int4", "fp8", "bf16"])
@pytest.mark.parametrize("counts", [(0, 1, 0, 0, 0), (3, 0, 20, 1, 2), (1, 1, 1, 1, 1), (0, 0, 0, 0, 40)])
def test_an_expert_of_a_stack_gives_what_it_gives_alone(variant: Library, name: str, counts: tuple[int, ...]) -> None:
    linear, grouped, stacks = operators()[name]
    x = activations(sum(counts), 256)
    parts = x.split(list(counts))
    alone = [linear(part, *(stack[e] for stack in stacks)) for e, part in enumerate(parts) if len(part)]
    assert torch.equal(grouped(x, torch.tensor(counts), *stacks), torch.cat(alone))


@pytest.mark.parametrize("name", ["int4", "fp8", "bf16"])
@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_threads_do_not_change_a_bit(
    variant: Library, name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, _, stacks = operators()[name]
    weights, x, before = [stack[0] for stack in stacks], activations(num_rows, 256), torch.get_num_threads()
    monkeypatch.setattr(native, "THREADED_PRODUCTS", 0)
    try:
        found = []
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            found.append(linear(x, *weights))
    finally:
        torch.set_num_threads(before)
    if name != "bf16" or num_rows < native.DENSE_ROWS:  # above, it is torch's own product
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_variants_are_what_they_say() -> None:
    assert "portable" in build("x86-64-v3").instructions
    flags = {flag for line in open("/proc/cpuinfo") if line.startswith("flags") for flag in line.split()}  # noqa: SIM115, PTH123
    if {"avx512_vnni", "avx512_bf16", "avx512_vbmi"} <= {flag.replace("avx512vbmi", "avx512_vbmi") for flag in flags}:
        assert "AVX-512" in build().instructions
        assert ("AMX" in build().instructions) == ("amx_bf16" in flags)
