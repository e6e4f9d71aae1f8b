"""Who sees whom: segments against the definition, and the two ways to compute attention against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama4_quant.runtime import attention
from llama4_quant.runtime.attention import Attention, Segment, attend, plan_segments, query_temperature

CPU = torch.device("cpu")
PADDINGS = st.lists(st.integers(0, 12), min_size=1, max_size=4)


def _defined(padding: list[int], past: int, new: int, chunk: int | None) -> Tensor:
    """visible[row, query, key] for real queries, straight from the definition; padding queries see themselves."""
    visible = torch.zeros(len(padding), new, past + new, dtype=torch.bool)
    for row, pad in enumerate(padding):
        for query in range(past, past + new):
            for key in range(pad, query + 1):
                same = chunk is None or (query - pad) // chunk == (key - pad) // chunk
                visible[row, query - past, key] = same
            visible[row, query - past, query] = True
    return visible


def _from_segments(segments: tuple[Segment, ...], rows: int, past: int, new: int) -> Tensor:
    visible = torch.zeros(rows, new, past + new, dtype=torch.bool)
    for segment in segments:
        num_queries, num_keys = segment.stop - segment.start, segment.stop - segment.key_start
        part = torch.ones(rows, num_queries, num_keys, dtype=torch.bool)
        if segment.is_causal:
            assert num_queries == num_keys
            part = part.tril()
        if segment.visible is not None:
            part &= segment.visible().squeeze(1)
        visible[:, segment.start - past : segment.stop - past, segment.key_start : segment.stop] = part
    return visible


@given(PADDINGS, st.integers(0, 20), st.integers(1, 20), st.one_of(st.none(), st.integers(1, 9)))
@settings(max_examples=300, deadline=None)
def test_segments_say_what_the_definition_says(padding: list[int], past: int, new: int, chunk: int | None) -> None:
    padding = [min(pad, past + new) for pad in padding]
    segments = plan_segments(padding, past, new, chunk, CPU)
    assert [segment.start for segment in segments] == [past, *(segment.stop for segment in segments[:-1])]
    assert segments[-1].stop == past + new
    assert torch.equal(_from_segments(segments, len(padding), past, new), _defined(padding, past, new, chunk))


@given(PADDINGS, st.integers(0, 20), st.integers(1, 20), st.one_of(st.none(), st.integers(1, 9)), st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_masks_come_in_blocks_of_a_bounded_size(
    padding: list[int], past: int, new: int, chunk: int | None, most: int
) -> None:
    padding = [min(pad, past + new) for pad in padding]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MASK_ELEMENTS", most)
        segments = plan_segments(padding, past, new, chunk, CPU)
    assert torch.equal(_from_segments(segments, len(padding), past, new), _defined(padding, past, new, chunk))
    for segment in segments:
        if segment.visible is not None and not segment.follows:
            assert segment.visible()[0].numel() <= max(most, past + new)  # a query at least


def test_unpadded_prefill_and_decode_need_no_mask() -> None:
    for chunk in (None, 8):
        for past, new in ((0, 40), (13, 1), (16, 24)):
            if chunk is None and past and new > 1:
                continue
            assert all(segment.visible is None for segment in plan_segments([0, 0], past, new, chunk, CPU))


@given(
    PADDINGS,
    st.integers(0, 9),
    st.integers(1, 12),
    st.one_of(st.none(), st.integers(1, 5)),
    st.integers(0, 99),
    st.sampled_from([1 << 24, 20]),
)
@settings(max_examples=120, deadline=None)
def test_sdpa_equals_eager(padding: list[int], past: int, new: int, chunk: int | None, seed: int, most: int) -> None:
    padding = [min(pad, past) for pad in padding]
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(len(padding), 6, new, 16, generator=generator)
    k, v = (torch.randn(len(padding), 2, past + new, 16, generator=generator) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MASK_ELEMENTS", most)
        segments = plan_segments(padding, past, new, chunk, CPU)
        fused = attend(q, k, v, segments, 0, Attention.SDPA)
        eager = attend(q, k, v, segments, 0, Attention.EAGER)
    assert torch.isfinite(fused).all()
    # Averages of at most 21 values below 6: a few dozen fp32 roundings of 2^-24 * 6.
    torch.testing.assert_close(fused, eager, atol=50 * 2**-24 * 6, rtol=0)


def test_keys_may_start_at_a_later_column() -> None:
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)
    segments = plan_segments([0], 11, 1, 4, CPU)
    whole = attend(q, k, v, segments, 0, Attention.EAGER)
    assert torch.equal(attend(q, k[:, :, 8:], v[:, :, 8:], segments, 8, Attention.EAGER), whole)


@pytest.mark.parametrize(("position", "steps"), [(0, 0), (2, 0), (3, 1), (6, 1), (7, 2), (39, 10)])
def test_temperature(position: int, steps: int) -> None:
    scale = query_temperature(torch.tensor([[position]]), floor_scale=4, attn_scale=0.3)
    expected = 1 + 0.3 * torch.log(torch.tensor(1.0 + steps))
    torch.testing.assert_close(scale, expected.view(1, 1, 1, 1))
