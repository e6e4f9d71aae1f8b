"""Views of a weight by scale: which weights share one, and which scale belongs to which weight.

    N out, K in, R rows of one chunk, S weights that share a scale, L scales ("lanes") of one chunk

The search works on float32 [S, L]: one column per scale. Every step of it is then a long contiguous elementwise
operation, which is what makes its result independent of chunk size, thread count and vector width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llama4_quant.scheme import FP8_BLOCK_SIZE, Strategy, WeightScheme

# 1 MiB in float32: the few buffers of a search stay in cache, and calling torch costs little next to the work.
CHUNK_ELEMENTS = 1 << 18


def row_chunks(num_rows: int, in_features: int, multiple: int = 1) -> Iterator[slice]:
    """Cut `num_rows` rows of `in_features` elements into slices of about CHUNK_ELEMENTS elements.

    Every slice starts at a multiple of `multiple`, and only the last one may be shorter than a multiple.
    """
    rows = max(1, CHUNK_ELEMENTS // (in_features * multiple)) * multiple
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def scheme_chunks(num_rows: int, in_features: int, scheme: WeightScheme) -> Iterator[slice]:
    """`row_chunks` that never cut through a block of `scheme`."""
    return row_chunks(num_rows, in_features, rows_per_scale(scheme))


def rows_per_scale(scheme: WeightScheme) -> int:
    """Number of consecutive output rows that share a scale: 128 for blocks, else 1."""
    return FP8_BLOCK_SIZE if scheme.strategy is Strategy.BLOCK else 1


def to_lanes(rows_RK: Tensor, scheme: WeightScheme) -> Tensor:
    """Copy rows [R, K] of any float dtype and stride to float32 [S, L], lanes in row-major order of the scales.

    The last block of rows is filled up with zeros, which change neither a maximum nor a sum of squares.
    """
    num_rows, in_features = rows_RK.shape
    if scheme.strategy is Strategy.BLOCK:
        missing_rows = -num_rows % FP8_BLOCK_SIZE
        if missing_rows:
            rows_RK = torch.cat([rows_RK, rows_RK.new_zeros(missing_rows, in_features)])
        block = FP8_BLOCK_SIZE
        tiles = rows_RK.view(-1, block, in_features // block, block).permute(1, 3, 0, 2)
    else:
        tiles = rows_RK.view(num_rows, -1, scheme.group_size or in_features).permute(2, 0, 1)
    lanes = torch.empty(tiles.shape, dtype=torch.float32, device=rows_RK.device)
    return lanes.copy_(tiles).view(-1, tiles.shape[-2] * tiles.shape[-1])


def spread_scale(scale: Tensor, shape: tuple[int, int], scheme: WeightScheme) -> Tensor:
    """Expand the scales of rows of `shape` (R, K), in any dtype, to something that broadcasts to [R, K]."""
    num_rows, in_features = shape
    if scheme.strategy is Strategy.CHANNEL:
        return scale
    if scheme.strategy is Strategy.GROUP:
        return scale.unsqueeze(2).expand(-1, -1, scheme.group_size or 0).reshape(num_rows, in_features)
    tiles = scale[:, None, :, None].expand(-1, FP8_BLOCK_SIZE, -1, FP8_BLOCK_SIZE)
    return tiles.reshape(scale.shape[0] * FP8_BLOCK_SIZE, -1)[:num_rows, :in_features]
