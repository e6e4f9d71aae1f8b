"""Schemes and weights that the quantizer tests share."""

import hypothesis.strategies as st
import torch
from torch import Tensor

from llama4_quant.scheme import WeightScheme, preset

SCHEMES = {
    f"{name}-{group_size}-{observer}": preset(name, group_size=group_size, observer=observer).weights
    for name, group_size in (
        ("W4A16", 32),
        ("W4A16", 64),
        ("W4A16", 128),
        ("W4A16", -1),
        ("FP8_DYNAMIC", None),
        ("FP8_BLOCK", None),
    )
    for observer in ("absmax", "mse")
}
scheme_names = st.sampled_from(sorted(SCHEMES))


def heavy_tailed(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16, sigma: float = 0.02) -> Tensor:
    """Normal weights of which every tenth or so is several times larger, as in trained models."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * sigma
    outliers = torch.rand(shape, generator=generator) < 0.1
    return torch.where(outliers, values * 5, values).to(dtype)


def lanes(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Weights [N, K] as [scales, weights that share it], float64; written here in another way than in the package."""
    num_rows, num_columns = weight.shape
    height, width = (128, 128) if scheme.strategy == "block" else (1, scheme.group_size or num_columns)
    padded = torch.zeros(-(-num_rows // height) * height, num_columns, dtype=torch.float64)
    padded[:num_rows] = weight.double()
    tiles = [tile.reshape(-1) for band in padded.split(height) for tile in band.split(width, dim=1)]
    return torch.stack(tiles)


@st.composite
def weights(draw: st.DrawFn, scheme: WeightScheme, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Small matrices that `scheme` can store: odd row counts, zeros, -0, tiny and huge values, outliers."""
    num_rows = draw(st.integers(1, 150 if scheme.strategy == "block" else 9))
    width = 128 if scheme.strategy == "block" else scheme.group_size
    num_columns = draw(st.integers(1, 70)) if width is None else width * draw(st.integers(1, 3))
    weight = heavy_tailed((num_rows, num_columns), draw(st.integers(0, 2**31)), torch.float32)
    weight *= 2.0 ** draw(st.sampled_from([0, 0, 0, -20, -60, 20, 60]))
    special = draw(st.sampled_from(["none", "zero row", "negative zero", "outlier", "equal", "all zero"]))
    if special == "zero row":
        weight[0] = 0.0
    elif special == "negative zero":
        weight[:, 0] = -0.0
    elif special == "outlier":
        weight[-1, -1] = weight.abs().max() * 1000
    elif special == "equal":
        weight[:] = weight[0, 0]
    elif special == "all zero":
        weight[:] = 0.0
    return weight.to(dtype)
