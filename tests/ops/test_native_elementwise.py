"""The compiled kernels between products, against what the layers do without them."""

from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from ops.native_variants import built_or_skipped
from runtime.tiny_model import random_ids, random_model, text_config
from torch import Tensor
from torch.nn import functional

from llama4_quant.ops import native_attention, native_elementwise
from llama4_quant.ops.native_elementwise import ElementwiseLibrary, build, rms_norm, rotate, silu_mul
from llama4_quant.runtime.model import Llama4Model
from llama4_quant.runtime.rope import Rotation

pytestmark = pytest.mark.skipif(
    native_elementwise.probe() is not None, reason=f"no kernels: {native_elementwise.probe()}"
)

EPS = 1e-5
ULP = 2**-7
"""How far apart neighbours in bf16 are at most, relative to the smaller: a float32 result that is off in its last bits
rounds to the same number or to a neighbour."""


@pytest.fixture(scope="module", params=("native", "x86-64-v3"))
def variant(request: pytest.FixtureRequest) -> Iterator[ElementwiseLibrary]:
    """The kernels as compiled for a kind of processor."""
    library = built_or_skipped(build, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_elementwise, "_library", lambda: library)
        yield library


def _random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).bfloat16()


def _normed(x: Tensor) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + EPS)).bfloat16()


def _assert_neighbours(found: Tensor, expected: Tensor, roundings: int) -> None:
    """Nearly all equal, and the others off by at most one place of bf16 for each rounding on the way."""
    torch.testing.assert_close(found, expected, rtol=roundings * ULP, atol=0, equal_nan=True)
    assert (found != expected).sum() <= 0.01 * found.numel()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("shape", [(1, 1, 3840), (7, 64), (3, 5, 130), (2, 1), (40, 5121), (0, 64)])
@pytest.mark.parametrize("has_weight", [False, True])
def test_rms_norm(shape: tuple[int, ...], has_weight: bool) -> None:
    x, weight = _random(*shape, scale=30.0), _random(shape[-1])
    expected = _normed(x) * weight if has_weight else _normed(x)
    _assert_neighbours(rms_norm(x, weight if has_weight else None, EPS), expected, 2)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(("batch", "positions"), [(1, 1), (3, 3), (3, 1)])
@pytest.mark.parametrize("tokens", [1, 6])
def test_rotate(batch: int, positions: int, tokens: int) -> None:
    x = _random(batch, tokens, 5, 128)
    angles = torch.randn(positions, tokens, 64, generator=torch.Generator().manual_seed(tokens))
    cos, sin = angles.cos(), angles.sin()
    expected = Rotation(cos=cos, sin=sin).apply(x)
    assert torch.equal(rotate(x, cos, sin, None), expected)  # the same float32 operations, one by one
    _assert_neighbours(rotate(x, cos, sin, EPS), _normed(expected), 1)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("shape", [(1, 1, 6144), (5, 100), (3, 1025), (600, 128)])
def test_silu_mul(shape: tuple[int, ...]) -> None:
    gate, up = _random(*shape, scale=20.0), _random(*shape[:-1], shape[-1])
    _assert_neighbours(silu_mul(gate, up), functional.silu(gate) * up, 2)


@pytest.mark.usefixtures("variant")
def test_what_is_not_finite_stays_in_its_row() -> None:
    x = _random(4, 96)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    one = torch.ones_like(x)
    for found, expected in (
        (rms_norm(x, None, EPS), _normed(x)),
        (silu_mul(x, one), functional.silu(x)),
        (silu_mul(-x, one), functional.silu(-x)),
    ):
        assert torch.equal(found.isnan(), expected.isnan())
        torch.testing.assert_close(found, expected, rtol=2 * ULP, atol=0, equal_nan=True)


@pytest.mark.usefixtures("variant")
def test_a_row_does_not_depend_on_others_nor_on_threads() -> None:
    x, up, weight = _random(700, 256), _random(700, 256, scale=2.0), _random(256)
    angles = torch.randn(1, 70, 64, generator=torch.Generator().manual_seed(70))
    heads = x.view(1, 70, 20, 128)
    whole = [rms_norm(x, weight, EPS), silu_mul(x, up), rotate(heads, angles.cos(), angles.sin(), EPS)]
    rows = [0, 1, 8, 70]
    for start, stop in pairwise(rows):
        part = slice(start, stop)
        assert torch.equal(whole[0][part], rms_norm(x[part], weight, EPS))
        assert torch.equal(whole[1][part], silu_mul(x[part], up[part]))
        turned = rotate(heads[:, part], angles[:, part].cos(), angles[:, part].sin(), EPS)
        assert torch.equal(whole[2][:, part], turned)


def test_views_are_taken_as_what_they_show() -> None:
    x, weight = _random(6, 256), _random(512)
    assert torch.equal(rms_norm(x[:, ::2], weight[::4], EPS), rms_norm(x[:, ::2].clone(), weight[::4].clone(), EPS))
    assert torch.equal(silu_mul(x[:, :100], x[:, 100:200]), silu_mul(x[:, :100].clone(), x[:, 100:200].clone()))


def test_other_operands_are_refused() -> None:
    x, angles = _random(2, 3, 4, 8), torch.zeros(2, 3, 4)
    for call in (
        lambda: rms_norm(x.float(), None, EPS),
        lambda: rms_norm(x, _random(9), EPS),
        lambda: silu_mul(x, x[:1]),
        lambda: rotate(x, angles[:, :2], angles[:, :2], None),
        lambda: rotate(x, angles.double(), angles.double(), None),
        lambda: rotate(_random(2, 3, 4, 7), angles[..., :3], angles[..., :3], None),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


def test_opcheck() -> None:
    x, angles = _random(1, 3, 4, 8), torch.zeros(1, 3, 4)
    torch.library.opcheck(torch.ops.llama4_quant.rms_norm.default, (x, _random(8), EPS))
    torch.library.opcheck(torch.ops.llama4_quant.rms_norm.default, (x, None, EPS))
    torch.library.opcheck(torch.ops.llama4_quant.silu_mul.default, (x, x))
    torch.library.opcheck(torch.ops.llama4_quant.rotate.default, (x, angles.cos(), angles.sin(), EPS))


def test_a_model_uses_them_unless_another_kernel_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    library = build()
    for name in ("rms_norm", "rotate", "silu_mul"):

        def spy(task: bytes, name: str = name, real: object = getattr(library, name)) -> None:
            called.append(name)
            real(task)  # type: ignore[operator]

        monkeypatch.setattr(library, name, spy)
    monkeypatch.setattr(native_elementwise, "_library", lambda: library)
    model = random_model(text_config(), dtype=torch.bfloat16)
    with torch.inference_mode():
        model(random_ids(1, 5))
    assert set(called) == {"rms_norm", "rotate", "silu_mul"}
    called.clear()
    reference = random_model(text_config(), dtype=torch.bfloat16, kernel="reference")
    with torch.inference_mode():
        reference(random_ids(1, 5))
    assert not called


@pytest.mark.parametrize("module", [native_elementwise, native_attention])
def test_nothing_is_compiled_for_a_model_without_a_place(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model for another device, or only to be looked at, need not wait for a compiler."""

    def probe() -> str | None:
        raise AssertionError("asked")

    monkeypatch.setattr(module, "probe", probe)
    model = Llama4Model(text_config(), scheme_of=lambda _name: None, dtype=torch.bfloat16)
    assert not model.model.norm.is_native
    with pytest.raises(AssertionError, match="asked"):
        model.materialize("cpu")
