"""The compiled attention of single queries against float64, in every variant and format, and its place in decoding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from ops import native_variants
from runtime.tiny_model import random_ids, random_model, text_config
from torch import Tensor

from llama4_quant.ops import native_attention
from llama4_quant.ops.native_attention import AttentionLibrary, build, cache_attention
from llama4_quant.runtime.cache_formats import CacheFormat, Stored

pytestmark = pytest.mark.skipif(native_attention.probe() is not None, reason=f"no kernel: {native_attention.probe()}")

Pieces = list[Tensor]
Operands = tuple[Tensor, Pieces, Pieces, Pieces, Pieces, Tensor | None]
Scales = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """In float64, from what the codes stand for.

    Attributes:
        result: the mean of the values.
        magnitude: the mean of their magnitudes.
    """

    result: Tensor
    magnitude: Tensor

    def check(self, output: Tensor, dim: int, *, has_tiles: bool) -> None:
        """Scores are below 10 here: sums of `dim` float32 products are off by less than 10 * dim * 2^-24, which is the
        relative error of a weight; 2^-21 more are the exponential's. The matrix unit takes weights rounded to bf16,
        2^-8. Both the sum and what it is divided by may be that much off, and the result is rounded to bf16.
        """
        of_weight = 10 * dim * 2**-24 + 2**-21 + (2**-8 if has_tiles else 0)
        bound = 2 * of_weight * self.magnitude + 2**-8 * self.result.abs()
        excess = (output.double() - self.result).abs() - bound * (1 + 2**-7)  # bounds of the second order
        assert float(excess.max()) <= 0


FORMATS = {
    "bf16": CacheFormat(dtype=torch.bfloat16),
    "fp8": CacheFormat(dtype=torch.float8_e4m3fn),
    "fp8-static": CacheFormat(dtype=torch.float8_e4m3fn, scale=0.013),
    "int8": CacheFormat(dtype=torch.int8),
}


@pytest.fixture(scope="module", params=("native", "native no-amx-tile no-amx-bf16", "x86-64-v3"))
def variant(request: pytest.FixtureRequest) -> Iterator[AttentionLibrary]:
    """The kernel as compiled for a kind of processor."""
    library = native_variants.built_or_skipped(build, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_attention, "_library", lambda: library)
        yield library


@pytest.fixture
def has_tiles(request: pytest.FixtureRequest, variant: AttentionLibrary) -> bool:
    """Whether that goes through the matrix unit."""
    march: str = request.node.callspec.params["variant"]
    return "AMX" in native_variants.variant(march).instructions


def _pieces(stored: Stored, borders: Sequence[int]) -> tuple[Pieces, Pieces]:
    parts = [stored.part(slice(*pair)) for pair in pairwise(borders)]
    return [part.codes for part in parts], [part.scales for part in parts if part.scales is not None]


def _operands(
    layer_format: CacheFormat,
    rows: int,
    heads: int,
    columns: int,
    dim: int,
    *,
    with_bias: bool = False,
    borders: Sequence[int] = (),
) -> tuple[Operands, Scales, Expected]:
    """A part of a larger cache of two groups of heads, around which there is NaN if the format has it."""
    generator = torch.Generator().manual_seed(columns)
    q = torch.randn(rows, 2, heads, dim, generator=generator).bfloat16()
    cached = [torch.randn(rows, 2, columns + 9, dim, generator=generator).bfloat16() for _ in range(2)]
    stored = [layer_format.encode(x) for x in cached]
    for x in stored:
        if x.codes.is_floating_point():
            x.codes[:, :, [3, -5]] = torch.nan
    k, v = (x.part(slice(4, -5)) for x in stored)
    bias = None
    if with_bias:
        is_hidden = torch.rand(rows, 1, 1, columns + 3, generator=generator) < 0.5
        bias = torch.zeros(is_hidden.shape).masked_fill(is_hidden, -60000.0)[..., 3:]
        bias[..., -1] = 0
    scale = layer_format.scale or 1.0
    numbers = [x.codes.double() * (scale if x.scales is None else x.scales.double()) for x in (k, v)]
    scores = q.double() @ numbers[0].transpose(2, 3) / dim**0.5
    scores = scores if bias is None else scores + bias
    (keys, key_scales), (values, value_scales) = (_pieces(x, (0, *borders, columns)) for x in (k, v))
    operands = (q, keys, values, key_scales, value_scales, bias)
    weights = scores.softmax(dim=-1)
    expected = Expected(result=weights @ numbers[1], magnitude=weights @ numbers[1].abs())
    return operands, {"key_scale": scale, "value_scale": scale}, expected


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("layer_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_against_float64(layer_format: CacheFormat, with_bias: bool, has_tiles: bool) -> None:
    for rows, heads, columns, dim in (
        (1, 5, 1, 64),
        (2, 1, 31, 16),
        (1, 2, 33, 48),
        (3, 5, 1024, 128),
        (1, 8, 2500, 112),
        (1, 12, 95, 96),
        (1, 37, 70, 32),
    ):
        operands, scales, expected = _operands(layer_format, rows, heads, columns, dim, with_bias=with_bias)
        expected.check(cache_attention(*operands, **scales), dim, has_tiles=has_tiles)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("layer_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("borders", [(1,), (40, 41, 1100), (1300, 2400)])
def test_a_cache_in_pieces(layer_format: CacheFormat, borders: tuple[int, ...], has_tiles: bool) -> None:
    """With a bias, whose columns count through all pieces."""
    operands, scales, expected = _operands(layer_format, 2, 3, 2500, 64, with_bias=True, borders=borders)
    expected.check(cache_attention(*operands, **scales), 64, has_tiles=has_tiles)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_every_code_is_exact(dtype: torch.dtype) -> None:
    """Of a value: a single column has all of the weight. Of a key: its score beside one of 0 says how large it is."""
    codes = torch.arange(256).to(torch.uint8).view(dtype).float()
    codes = torch.where(codes.isnan(), 0, codes).to(dtype)
    v = codes.view(1, 1, 1, 256)
    q = torch.ones(1, 1, 2, 256).bfloat16()
    assert torch.equal(cache_attention(q, [v], [v], [], [], None)[0, 0, 1].float(), codes.float())
    k, v = torch.zeros(256, 1, 2, 16), torch.zeros(256, 1, 2, 16)
    k[:, 0, 0, 3], v[:, 0, 0, 3] = codes.float(), 1
    q = torch.eye(16)[[3]].expand(256, 1, 1, 16).bfloat16()
    output = cache_attention(q, [k.to(dtype)], [v.to(dtype)], [], [], None)
    expected = (codes.double() / 4).sigmoid()
    torch.testing.assert_close(output[:, 0, 0, 3].double(), expected, rtol=2**-7, atol=2**-100)


@pytest.mark.usefixtures("variant")
def test_results_do_not_depend_on_threads() -> None:
    operands, scales, _ = _operands(FORMATS["int8"], 2, 5, 5000, 64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cache_attention(*operands, **scales))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.usefixtures("variant")
def test_far_apart_scores_and_nan() -> None:
    """One key has all of the weight, wherever it is; a NaN stays one, of its row alone."""
    places = [1, 2999]
    q, k = torch.ones(2, 1, 3, 16).bfloat16(), torch.zeros(2, 1, 3000, 16).bfloat16()
    k[..., 0] = -200
    k[[0, 1], 0, places, 0] = 200
    v = torch.arange(3000.0).view(1, 1, -1, 1).repeat(2, 1, 1, 16).bfloat16()
    output = cache_attention(q, [k], [v], [], [], None)
    for row, place in enumerate(places):
        assert torch.equal(output[row, 0], v[row, 0, place].expand(3, 16))
    k[1, 0, 5, 0] = torch.nan
    output = cache_attention(q, [k], [v], [], [], None)
    assert output[1].isnan().all()
    assert torch.equal(output[0, 0], v[0, 0, 1].expand(3, 16))


@pytest.mark.parametrize("layer_format", FORMATS.values(), ids=FORMATS)
def test_the_reference_and_the_operator(layer_format: CacheFormat) -> None:
    operands, scales, expected = _operands(layer_format, 2, 3, 70, 32, with_bias=True, borders=(30,))
    expected.check(native_attention.reference(*operands, **scales), 32, has_tiles=False)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if layer_format.dtype is not torch.float8_e4m3fn:  # torch cannot multiply these, and this check wants to
        checks.append("test_schema")
    torch.library.opcheck(native_attention.CACHE_ATTENTION, operands, scales, test_utils=checks)


def test_what_does_not_fit_is_refused() -> None:
    (q, [k], [v], *_), *_ = _operands(FORMATS["bf16"], 1, 2, 8, 32)
    for bad, message in (
        ((q.float(), [k], [v]), "dtype float32: the kernel takes bfloat16"),
        ((q[..., :24], [k[..., :24]], [v[..., :24]]), "head_dim 24 is not a multiple of 16"),
        ((q, [k[:, :, :4]], [v]), "the same strides, column after column"),
        ((q, [k, k.float()], [v, v.float()]), "the same strides, column after column"),
        ((q, [k.float()], [v.float()]), "a cache of float32"),
        ((q, [k, k], [v]), "2 pieces of keys and 1 of values"),
        ((q, [], []), "0 pieces"),
    ):
        with pytest.raises(ValueError, match=message):
            cache_attention(*bad, [], [], None)
    with pytest.raises(ValueError, match="or none of them has"):
        cache_attention(q, [k], [v], [torch.ones(1, 2, 8, 1).bfloat16()], [], None)
    with pytest.raises(ValueError, match="expected float32"):
        cache_attention(q, [k], [v], [], [], torch.zeros(1, 1, 1, 7))


@pytest.mark.parametrize("kind", ["auto", "fp8", "int8"])
@torch.inference_mode()
def test_decoding_with_it_and_without(kind: str) -> None:
    """Token by token in a padded batch over chunk borders, beside torch's kernel."""
    found = []
    for kernel in ("auto", "torch"):
        model = random_model(text_config(num_local_experts=1), torch.bfloat16, kernel=kernel)
        assert model.model.layers[0].self_attn.is_native == (kernel == "auto")
        cache = model.new_cache(2, 5, kind)
        ids, mask = random_ids(2, 40), (torch.arange(40) >= torch.tensor([[7], [0]])).long()
        model(ids[:, :20], attention_mask=mask[:, :20], cache=cache)
        tokens = [model(ids[:, column : column + 1], cache=cache, logits="last") for column in range(20, 40)]
        found.append(torch.cat(tokens, dim=1).float())
    # Not a bound of arithmetic: roundings to bf16 (2^-8) through four layers. A wrong key makes one of the order of 1.
    difference = (found[0] - found[1]).norm(dim=-1) / found[1].norm(dim=-1)
    assert float(difference.max()) < 0.1
