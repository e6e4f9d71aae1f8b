"""What only a tape does, against torch: routing, sums, scaling, storing into a cache; and its buffers."""

import ctypes

import pytest
import torch
from torch import Tensor

from llama4_quant.ops import native_attention, native_elementwise, native_tape
from llama4_quant.ops.native_attention import Piece
from llama4_quant.ops.native_attention_tape import RecordedAttention
from llama4_quant.ops.native_tape import Tape, record_route
from llama4_quant.runtime.cache_formats import CacheFormat, Stored

PROBES = (native_attention, native_elementwise, native_tape)
pytestmark = pytest.mark.skipif(
    any(module.probe() is not None for module in PROBES), reason=f"no compiled kernels: {native_tape.probe()}"
)
NUMBERS = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
"""Every bf16 number, and what is none."""


def _finite(count: int, seed: int) -> Tensor:
    finite = NUMBERS[NUMBERS.isfinite()]
    return finite[torch.randint(0, len(finite), (count,), generator=torch.Generator().manual_seed(seed))]


def _assert_same(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()], expected[~expected.isnan()])


def test_sums_and_scaling_are_those_of_torch() -> None:
    tape, x, y, factor = Tape(), NUMBERS.clone().unsqueeze(0), _finite(2**16, 0).unsqueeze(0), torch.tensor([1.37])
    scaled = native_elementwise.record_multiply(tape, x, factor)
    native_elementwise.record_add(tape, x, y)
    tape.run()
    _assert_same(x, NUMBERS + y)
    _assert_same(scaled[0], (NUMBERS * factor).bfloat16())


@pytest.mark.parametrize("num_experts", [1, 2, 4, 16, 63, 64, 65, 128])
def test_routes(num_experts: int) -> None:
    """Few different logits, so that there are ties; and one that is no number."""
    generator = torch.Generator().manual_seed(num_experts)
    tape, logits, x = Tape(), torch.zeros(1, num_experts).bfloat16(), torch.randn(1, 96, generator=generator).bfloat16()
    counts, scored = record_route(tape, logits, x)
    for turn in range(200):
        logits.copy_(torch.randint(-6, 7, logits.shape, generator=generator))
        if turn % 50 == 40:
            logits[0, num_experts // 2] = torch.nan
        tape.run()
        most, expert = logits.topk(1, dim=-1)
        assert counts.nonzero().flatten().tolist() == [int(expert)]
        assert int(counts.sum()) == 1
        expected = x * most.float().sigmoid().bfloat16()
        _assert_same(scored, expected)


FORMATS = {
    "bf16": CacheFormat(dtype=torch.bfloat16),
    "fp8": CacheFormat(dtype=torch.float8_e4m3fn),
    "fp8-static": CacheFormat(dtype=torch.float8_e4m3fn, scale=0.013),
    "int8": CacheFormat(dtype=torch.int8),
}


def _piece(keys: Stored, values: Stored, start: int, stop: int) -> Piece:
    return Piece.of(keys.codes, values.codes, keys.scales, values.scales, start, stop)


def _bytes(stored: Stored) -> list[Tensor]:
    return [t.contiguous().view(torch.uint8) for t in (stored.codes, stored.scales) if t is not None]


@pytest.mark.parametrize("layer_format", FORMATS.values(), ids=FORMATS)
def test_stores_what_encoding_gives(layer_format: CacheFormat) -> None:
    """Numbers of all sizes, and zeros; what is around the token's place stays."""
    groups, dim, columns = 3, 64, 7
    tape = Tape()
    q, k, v = (torch.zeros(1, groups, *shape).bfloat16() for shape in ((2, dim), (dim,), (dim,)))
    attention = RecordedAttention(
        tape, q, k, v, stored=layer_format.dtype, scales=(layer_format.scale or 1.0, layer_format.scale or 1.0)
    )
    for turn in range(60):
        filled = [layer_format.encode(torch.ones(1, groups, columns, dim).bfloat16()) for _ in range(2)]
        expected = [layer_format.encode(torch.ones(1, groups, columns, dim).bfloat16()) for _ in range(2)]
        place = turn % columns
        for x, side in ((k, expected[0]), (v, expected[1])):
            size = 2.0 ** (turn - 30)
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(turn)) * size)
            if turn % 10 == 3:
                x[:, 1] = 0
                x[:, 2, ::2] = -0.0
            if turn % 10 == 4:
                x.copy_(_finite(x.numel(), turn).view(x.shape))
            side.part(slice(place, place + 1)).copy_(layer_format.encode(x.unsqueeze(2)))
        attention.point([_piece(*filled, 0, place + 1)])
        tape.run()
        for found, wanted in zip(filled, expected, strict=True):
            assert all(map(torch.equal, _bytes(found), _bytes(wanted)))


def test_attends_to_all_pieces() -> None:
    """As the operator does, from anywhere in a block to the token itself."""
    layer_format, dim = FORMATS["int8"], 32
    tape, generator = Tape(), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, *shape, generator=generator).bfloat16() for shape in ((3, dim), (dim,), (dim,)))
    attention = RecordedAttention(tape, q, k, v, stored=layer_format.dtype, scales=(1.0, 1.0))
    blocks = [
        [layer_format.encode(torch.randn(1, 2, columns, dim, generator=generator).bfloat16()) for _ in range(2)]
        for columns in (40, 9)
    ]
    for parts in ([(0, 3, 40), (1, 0, 5)], [(0, 0, 1)], [(1, 2, 9)]):
        attention.point([_piece(*blocks[block], start, stop) for block, start, stop in parts])
        tape.run()
        sides = [[blocks[block][side].part(slice(start, stop)) for block, start, stop in parts] for side in (0, 1)]
        codes, scales = ([[getattr(x, name) for x in side] for side in sides] for name in ("codes", "scales"))
        expected = native_attention.cache_attention(q, *codes, *scales, None)
        assert torch.equal(attention.output, expected)


def test_buffers_are_given_out_again_but_not_while_in_use() -> None:
    tape = Tape()
    first, second = tape.buffer(1, 8), tape.buffer(1, 8)
    assert first.data_ptr() != second.data_ptr()
    tape.reuse_buffers()
    again = [tape.buffer(1, 8), tape.buffer(1, 8), tape.buffer(1, 8)]
    assert {b.data_ptr() for b in again} > {first.data_ptr(), second.data_ptr()}
    assert len({b.data_ptr() for b in again}) == 3
    assert tape.buffer(1, 8, dtype=torch.int64).dtype is torch.int64


def test_an_error_ends_a_run() -> None:
    called = []

    @ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)
    def function(task: int) -> int:
        called.append(ctypes.cast(task, ctypes.POINTER(ctypes.c_char))[0])
        return 1 if called[-1] == b"b" else 0

    tape = Tape()
    for task in (b"a", b"b", b"c"):
        tape.call(function, task)
    with pytest.raises(MemoryError):
        tape.run()
    assert called == [b"a", b"b"]
