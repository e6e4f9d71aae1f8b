"""Who sees whom against the definition, and the ways to compute attention against each other."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama4_quant.runtime import attention, flex, partial
from llama4_quant.runtime.attention import Attention, attend, query_temperature
from llama4_quant.runtime.cache import KeyValues, LayerCache
from llama4_quant.runtime.cache_formats import CacheDtype, LayerFormat
from llama4_quant.runtime.visibility import HIDDEN, Segment, plan_segments

CPU = torch.device("cpu")
PADDINGS = st.lists(st.integers(0, 12), min_size=1, max_size=4)
CHUNKS = st.one_of(st.none(), st.integers(1, 9))


def _defined(padding: Sequence[int], past: int, new: int, chunk: int | None) -> Tensor:
    """visible[row, query, key] straight from the definition; queries that are padding see nothing."""
    visible = torch.zeros(len(padding), new, past + new, dtype=torch.bool)
    for row, pad in enumerate(padding):
        for query in range(max(past, pad), past + new):
            for key in range(pad, query + 1):
                visible[row, query - past, key] = chunk is None or (query - pad) // chunk == (key - pad) // chunk
    return visible


def _from_segments(segments: Sequence[Segment], rows: int, past: int, new: int) -> Tensor:
    visible = torch.zeros(rows, new, past + new, dtype=torch.bool)
    for segment in segments:
        queries = torch.arange(segment.start, segment.stop)[:, None]
        keys = torch.arange(segment.key_start, segment.stop)
        part = (keys <= queries).expand(segment.rows.stop - segment.rows.start, -1, -1)
        if segment.bias is not None:
            assert set(segment.bias.unique().tolist()) <= {0.0, HIDDEN}
            part = part & (segment.bias.squeeze(1) == 0)
        columns = slice(segment.start - past, segment.stop - past)
        assert not visible[segment.rows, columns].any()  # each query once
        visible[segment.rows, columns, segment.key_start : segment.stop] = part
    return visible


@given(PADDINGS, st.integers(0, 20), st.integers(1, 20), CHUNKS)
@settings(max_examples=300, deadline=None)
def test_segments_say_what_the_definition_says(padding: list[int], past: int, new: int, chunk: int | None) -> None:
    segments = plan_segments(padding, past, new, chunk, CPU)
    expected = _defined(padding, past, new, chunk)
    if new == 1:
        expected[:, 0, past] = True  # a single query that is padding sees itself
    assert torch.equal(_from_segments(segments, len(padding), past, new), expected)


@given(PADDINGS, st.integers(0, 300), st.integers(1, 300), st.one_of(st.none(), st.integers(1, 200)))
@settings(max_examples=60, deadline=None)
def test_blocks_of_flex_attention(padding: list[int], past: int, new: int, chunk: int | None) -> None:
    visible = flex.plan(padding, past, new, chunk, CPU)
    keys = torch.arange(visible.key_start, past + new)
    sees = visible.mask.mask_mod(
        torch.arange(len(padding)).view(-1, 1, 1), None, torch.arange(new).view(1, -1, 1), torch.arange(keys.numel())
    )
    expected = _defined(padding, past, new, chunk)
    expected |= torch.arange(past + new) == torch.arange(past, past + new)[:, None]  # padding sees itself
    assert not expected[:, :, : visible.key_start].any()
    assert torch.equal(sees, expected[:, :, visible.key_start :])
    for row in range(len(padding)):
        for i, queries in enumerate(sees[row].split(128, dim=0)):
            partly = _listed(visible.mask.kv_num_blocks, visible.mask.kv_indices, row, i)
            fully = _listed(visible.mask.full_kv_num_blocks, visible.mask.full_kv_indices, row, i)
            for j, block in enumerate(queries.split(128, dim=1)):
                is_padding = past + 128 * i < padding[row]  # sees itself: for one, that may be all there is
                assert (j in fully) == bool(block.all() and not is_padding)
                assert (j in partly) == bool(block.any() and j not in fully)


def _listed(count: Tensor | None, indices: Tensor | None, row: int, i: int) -> list[int]:
    assert count is not None
    assert indices is not None
    return indices[row, 0, i, : count[row, 0, i]].tolist()


class Case:
    """A cache of some columns and the queries, keys and values of new ones."""

    def __init__(
        self,
        padding: Sequence[int],
        past: int,
        new: int,
        chunk: int | None,
        *,
        dtype: torch.dtype = torch.float32,
        kind: CacheDtype = CacheDtype.AUTO,
        reserved: int = 3,
    ) -> None:
        generator = torch.Generator().manual_seed(past + 100 * new)
        rows = len(padding)
        self.padding, self.past, self.new, self.chunk = padding, past, new, chunk
        self.q = torch.randn(rows, 4, new, 16, generator=generator).to(dtype)
        self.k, self.v = (torch.randn(rows, 2, past + new, 16, generator=generator).to(dtype) for _ in range(2))
        self._format = LayerFormat.choose(kind, dtype, None)
        self._reserved = reserved

    def attend(self, kind: Attention) -> Tensor:
        """As the layer does it: [B, T, H, D]."""
        return self.on(self.cache(), kind)

    def cache(self) -> LayerCache:
        """Of the columns before the new ones."""
        shape = (len(self.padding), 2, 16)
        cache = LayerCache(shape, self._format, CPU, reserved=self._reserved, window=self.chunk)
        if self.past:
            cache.store(0, cache.encode(self.k[:, :, : self.past], self.v[:, :, : self.past]))
        return cache

    def on(self, cache: LayerCache, kind: Attention) -> Tensor:
        """What the layer does with a cache: [B, T, H, D]."""
        new = cache.encode(self.k[:, :, self.past :], self.v[:, :, self.past :])
        plan = flex.plan if kind is Attention.FLEX else plan_segments
        visible = plan(self.padding, self.past, self.new, self.chunk, CPU)
        if self.new > 1:
            return attend(self.q, cache.decode(self.past, new, self.q.dtype), cache, visible, kind)
        cache.store(self.past, new)
        return attend(self.q, None, cache, visible, kind)

    def defined(self) -> Tensor:
        """In float64 from the definition, with keys and values as the format rounds them."""
        k, v = (
            kind.decode(kind.encode(x), x.dtype).double().repeat_interleave(2, dim=1)
            for kind, x in ((self._format.key, self.k), (self._format.value, self.v))
        )
        visible = _defined(self.padding, self.past, self.new, self.chunk).unsqueeze(1)
        scores = (self.q.double() @ k.transpose(2, 3) / 4).masked_fill(~visible, -torch.inf)
        return (scores.softmax(dim=-1).nan_to_num(0.0) @ v).transpose(1, 2)

    def is_real(self) -> Tensor:
        """[B, T]: not padding."""
        return torch.arange(self.past, self.past + self.new) >= torch.tensor(self.padding).unsqueeze(1)


# Averages of values below 6, in float32: scores below 30 whose 16 products and their sums are off by some 20 * 2^-24 of
# that, twice that in the weights, and some hundred roundings of the average itself.
BOUND = (2 * 20 * 30 + 100) * 2**-24 * 6


@pytest.mark.parametrize("kind", [Attention.SDPA, Attention.EAGER])
@given(PADDINGS, st.integers(0, 40), st.integers(1, 20), CHUNKS, st.integers(1, 30), st.sampled_from(CacheDtype))
@settings(max_examples=60, deadline=None)
def test_attention_is_what_the_definition_says(
    kind: Attention, padding: list[int], past: int, new: int, chunk: int | None, reserved: int, stored: CacheDtype
) -> None:
    case = Case(padding, past, new, chunk, kind=stored, reserved=reserved)
    with pytest.MonkeyPatch.context() as patch:  # several pieces, several blocks of queries
        patch.setattr(attention, "DECODED_BYTES", 1 << 10)
        patch.setattr(partial, "SCORE_ELEMENTS", 1 << 8)
        found = case.attend(kind)
    assert torch.isfinite(found).all()
    real = case.is_real()
    torch.testing.assert_close(found[real].double(), case.defined()[real], atol=BOUND, rtol=0)


ROWS = [
    ((3, 0), 0, 150, 64),
    ((5, 140, 0), 130, 20, None),
    ((9, 0, 300), 140, 170, 100),
    ((2, 70), 150, 1, 64),
    ((200, 0), 150, 1, None),
]
ONE_ROW = [((0,), 0, 200, None), ((0,), 150, 140, 64), ((7,), 150, 1, 64), ((0,), 150, 1, None)]
"""Each list takes two kernels, for one query and for more, and a kernel several seconds to compile."""


@pytest.mark.parametrize(
    ("cases", "dtype"),
    [
        (ROWS, torch.float32),
        pytest.param(ONE_ROW, torch.float32, marks=pytest.mark.slow),
        pytest.param(ROWS + ONE_ROW, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_flex_attention_is_what_the_definition_says(
    cases: list[tuple[tuple[int, ...], int, int, int | None]], dtype: torch.dtype
) -> None:
    try:
        flex.require(CPU, dtype)
    except flex.UsageError as error:
        pytest.skip(str(error))
    # In bf16 scores and sums are float32; weights are rounded to bf16 (2^-8), and so are results.
    bound = BOUND if dtype is torch.float32 else 4 * 2**-8 * 6
    for padding, past, new, chunk in cases:
        case = Case(padding, past, new, chunk, dtype=dtype)
        found = case.attend(Attention.FLEX)
        real = case.is_real()
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found[real].double(), case.defined()[real], atol=bound, rtol=0)


def test_why_flex_attention_does_not_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(flex, "_compiled", broken)
    flex._why_not.cache_clear()
    try:
        with pytest.raises(
            flex.UsageError, match=r"'flex' does not work on cpu in float16: RuntimeError: no C\+\+ compiler;"
        ):
            flex.require(CPU, torch.float16)
    finally:
        flex._why_not.cache_clear()


@pytest.mark.parametrize("second", [False, True])
def test_other_devices_use_the_whole_kernel_or_products(second: bool) -> None:
    """The way that attention takes where the kernel for processors is not to be had, taken here."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 16), torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 16)
    calls: list[partial.Arguments] = [
        {"q": q, "k": k[:, :, :7], "v": v[:, :, :7], "bias": None, "is_causal": False},
        {"q": q, "k": k[:, :, 7:], "v": v[:, :, 7:], "bias": None, "is_causal": True},
    ]
    expected = partial.merged(partial.products(**call) for call in calls[: 1 + second])
    found = attention._on_device(iter(calls[: 1 + second]))
    torch.testing.assert_close(found, expected, atol=BOUND, rtol=0)


@pytest.mark.parametrize("kind", [Attention.SDPA, Attention.EAGER])
@pytest.mark.parametrize("stored", [CacheDtype.AUTO, CacheDtype.INT8])
@pytest.mark.parametrize("padding", [(0,), (100, 0)])
def test_no_tensor_has_a_number_for_each_query_and_key(
    kind: Attention, stored: CacheDtype, padding: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 1 << 16
    monkeypatch.setattr(partial, "SCORE_ELEMENTS", most)
    monkeypatch.setattr(attention, "DECODED_BYTES", 4 * most)
    past, new = 6000, 256
    case = Case(padding, past, new, None, kind=stored, reserved=past + new)
    cache = case.cache()
    with _Largest() as seen:
        case.on(cache, kind)
    assert 0 < seen.num_elements <= most
    assert most < new * past / 20


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator gives, views of its arguments apart."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors(args)}
        for tensor in _tensors(result if isinstance(result, tuple) else (result,)):
            if tensor.untyped_storage().data_ptr() not in known:
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def _tensors(values: Sequence[object]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


@pytest.mark.parametrize(("position", "steps"), [(0, 0), (2, 0), (3, 1), (6, 1), (7, 2), (39, 10)])
def test_temperature(position: int, steps: int) -> None:
    scale = query_temperature(torch.tensor([[position]]), floor_scale=4, attn_scale=0.3)
    expected = 1 + 0.3 * torch.log(torch.tensor(1.0 + steps))
    torch.testing.assert_close(scale, expected.view(1, 1, 1, 1))


def test_new_keys_alone() -> None:
    """Without a cache, as in calibration: a causal square."""
    case = Case((0, 0), 0, 20, None)
    visible = plan_segments((0, 0), 0, 20, None, CPU)
    found = attend(case.q, KeyValues(start=0, keys=case.k, values=case.v), None, visible, Attention.SDPA)
    torch.testing.assert_close(found.double(), case.defined(), atol=BOUND, rtol=0)
