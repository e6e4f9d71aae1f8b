"""The loops of calibration that go column by column, in solver.h: the same bytes as the plain ones, many times faster.

Large blocks are shared by as many threads as torch has; every output goes its own way, so this changes no byte.

Shape letters: G scale groups, K in, N out, S columns of one block.
"""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from llama4_quant.quantizers import int4
from llama4_quant.quantizers.grid import CodeGrid
from llama4_quant.quantizers.native import Block, Library
from llama4_quant.quantizers.quantize import grid_of
from llama4_quant.scheme import WeightScheme, WeightType

MAX_COLUMNS = 128
"""Of one block: kMaxColumns in solver.h."""
_LANES = 16
_SHARED = 1 << 25
"""Elements of work from which threads share it: a millisecond or more."""


def fix_block(
    library: Library,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    cost_N: Tensor,
    feed_SS: Tensor,
    curvature_S: Tensor,
    grid: CodeGrid,
) -> None:
    """GPTQ for one block; `tensors` are weight, target, scale, codes (out) and error (out), each [S, N] float32."""
    _run(library.fix_block, tensors, cost_N, feed_SS, curvature_S, grid)


def descend_block(
    library: Library,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    feed_SS: Tensor,
    curvature_S: Tensor,
    grid: CodeGrid,
) -> None:
    """Coordinate descent in one block; `tensors` as for `fix_block`, the target being H times the error."""
    _run(library.descend_block, tensors, tensors[1], feed_SS, curvature_S, grid)


def _run(
    function: Callable[..., None],
    tensors: Sequence[Tensor],
    cost_N: Tensor,
    feed_SS: Tensor,
    curvature_S: Tensor,
    grid: CodeGrid,
) -> None:
    num_columns, num_outputs = tensors[0].shape
    assert num_columns <= MAX_COLUMNS
    assert all(tensor.is_contiguous() and tensor.dtype is torch.float32 for tensor in (*tensors, feed_SS, curvature_S))
    addresses = [tensor.data_ptr() for tensor in (*tensors, cost_N, feed_SS, curvature_S)]

    def part(first: int, last: int) -> None:
        number = 0 if grid is int4.GRID else 1
        function(ctypes.byref(Block(*addresses, num_columns, num_outputs, first, last, number)))

    in_parts(part, num_outputs, num_columns * num_columns)


def in_parts(function: Callable[[int, int], None], count: int, work: int) -> None:
    """Call `function` for all of `count`, on several threads if that is much; each of them is `work` elements."""
    num_threads = min(torch.get_num_threads(), max(1, count * work // _SHARED))
    if num_threads == 1:
        function(0, count)
        return
    step = -(-count // (num_threads * 64)) * 64  # whole cache lines
    with ThreadPoolExecutor(num_threads) as pool:
        for done in [pool.submit(function, first, min(first + step, count)) for first in range(0, count, step)]:
            done.result()


def search(library: Library, weight_NK: Tensor, scheme: WeightScheme, importance_K: Tensor, size: int) -> Tensor:
    """Scales [N, K / size] of a finite float32 weight, as `choose_scales` finds them with this importance."""
    num_rows, num_inputs = weight_NK.shape
    factors = torch.tensor(grid_of(scheme).factors[scheme.strategy], dtype=torch.float32)
    weight_NK = weight_NK.contiguous()
    importance = torch.cat([importance_K.to(torch.float32), torch.zeros(_LANES)])
    scales = torch.empty(num_rows, num_inputs // size)

    def part(first: int, last: int) -> None:
        scratch = torch.zeros(2 * (size + _LANES))
        library.search(
            weight_NK.data_ptr() + 4 * first * num_inputs,
            importance.data_ptr(),
            factors.data_ptr(),
            len(factors),
            scratch.data_ptr(),
            scales.data_ptr() + 4 * first * (num_inputs // size),
            last - first,
            num_inputs,
            size,
            0 if scheme.type is WeightType.INT4 else 1,
        )

    in_parts(part, num_rows, num_inputs * len(factors))
    return scales
