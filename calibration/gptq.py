"""Choosing codes for a layer's output instead of for its weights: GPTQ, and coordinate descent after it.

A linear weight W [N, K] meets inputs with Gram matrix H = X^T X [K, K]. Storing Q instead costs
`tr((W - Q) H (W - Q)^T)`, the squared error of the layer's output on X. Both methods lower that cost, every output row
for itself:

- **GPTQ** (arXiv 2210.17323) fixes one column after the other and spreads each column's error over those that are
  still free, by the triangular factor U of H^-1 = U^T U. Columns go by falling diag(H) ("static activation ordering":
  groups and their scales stay those of the original order, so nothing but the codes changes on disk).
- **Coordinate descent** (as in QuantEase, arXiv 2309.01885) then visits the columns again: given all others, a
  column's best codes are the rounding of one closed expression. The cost never rises.

Work is on transposed weights [K, N], so that a column of W is contiguous memory.

Shape letters: G scale groups, K in, N out, S columns of one block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.quantizers.grid import CodeGrid

BLOCK = 64
"""Columns between two matrix products with all the rest."""
_SYSTEM_ELEMENTS = 1 << 23
"""Of the systems of equations for scales that are solved together: 32 MiB, and as much again for copies."""
_MORE_DAMPING = 10.0
_MAX_DAMP = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """Scales of one weight, one for each of G groups of consecutive inputs of an output.

    Attributes:
        values: float32 [G, N]; bf16 numbers.
        group_size: inputs of a group.
    """

    values: Tensor
    group_size: int

    def columns(self, inputs_S: Tensor) -> Tensor:
        """The scales [S, N] of some inputs."""
        return self.values[inputs_S // self.group_size]


@dataclass(frozen=True, kw_only=True, slots=True)
class Factored:
    """A Gram matrix made ready for solving.

    Attributes:
        gram: H, damped, with mean diagonal 1 (before damping), rows and columns in the order of visits, [K, K].
        upper: U with H^-1 = U^T U, upper triangular, [K, K].
        order: the input that is visited at each place, [K].
        damp_percent: what was added to the diagonal.
    """

    gram: Tensor
    upper: Tensor
    order: Tensor
    damp_percent: float


def factor(gram_KK: Tensor, damp_percent: float) -> Factored:
    """Damp, order and factor a Gram matrix.

    Args:
        gram_KK: float32, symmetric; any positive multiple of X^T X.
        damp_percent: added to the diagonal, as a part of its mean. Raised tenfold where that is not enough to factor
            the matrix in float32.

    An input that is always zero gets the mean diagonal: its codes are plain rounding.
    """
    diagonal_K = gram_KK.diagonal()
    mean = diagonal_K.mean().clamp(min=torch.finfo(torch.float32).tiny)
    # Equal inputs go by position, so that their order does not depend on the sorting algorithm.
    order_K = torch.argsort(diagonal_K, descending=True, stable=True)
    ordered_KK = gram_KK[order_K][:, order_K].div_(mean)
    ordered_KK.diagonal().add_((ordered_KK.diagonal() <= 0).to(ordered_KK.dtype))
    damp, added = damp_percent, 0.0
    while True:
        ordered_KK.diagonal().add_(damp - added)
        added = damp
        upper_KK = _upper_factor_of_inverse(ordered_KK)
        if upper_KK is not None:
            return Factored(gram=ordered_KK, upper=upper_KK, order=order_K, damp_percent=damp)
        if damp >= _MAX_DAMP:  # nothing but the diagonal can be trusted
            diagonal_K = ordered_KK.diagonal().clamp(min=1.0)
            upper_KK = torch.diag(diagonal_K.rsqrt())
            return Factored(gram=torch.diag(diagonal_K), upper=upper_KK, order=order_K, damp_percent=damp)
        damp = min(_MAX_DAMP, damp * _MORE_DAMPING)


def _upper_factor_of_inverse(gram_KK: Tensor) -> Tensor | None:
    """U with H^-1 = U^T U; None where float32 does not see a positive definite matrix."""
    lower_KK, failed = torch.linalg.cholesky_ex(gram_KK)
    if int(failed):
        return None
    upper_KK, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_KK), upper=True)
    return upper_KK if not int(failed) and bool(torch.isfinite(upper_KK).all()) else None


def gptq(weight_KN: Tensor, factored: Factored, scales: Scales, grid: CodeGrid) -> Tensor:
    """Codes by GPTQ.

    Args:
        weight_KN: float32, transposed, inputs in their own order; not changed.
        factored: Gram matrix of the inputs.
        scales: of the weight.
        grid: the codes.

    Returns:
        Codes as float32 [K, N], inputs in their own order.
    """
    num_inputs = weight_KN.shape[0]
    left_KN = weight_KN[factored.order]
    codes_KN = torch.empty_like(left_KN)
    for start in range(0, num_inputs, BLOCK):
        stop = min(start + BLOCK, num_inputs)
        block_SN = left_KN[start:stop]
        upper_SS = factored.upper[start:stop, start:stop].contiguous()
        scale_SN = scales.columns(factored.order[start:stop])
        for column, step in enumerate(upper_SS.diagonal().tolist()):
            value_N, scale_N = block_SN[column], scale_SN[column]
            code_N = torch.div(value_N, scale_N, out=codes_KN[start + column])
            grid.nearest_(code_N)
            # The column becomes its error, in units of what that costs.
            value_N.addcmul_(code_N, scale_N, value=-1).div_(step)
            block_SN[column + 1 :].addr_(upper_SS[column, column + 1 :], value_N, alpha=-1)
        left_KN[stop:].addmm_(factored.upper[start:stop, stop:].T, block_SN, alpha=-1)
    return _in_own_order(codes_KN, factored.order)


def coordinate_descent(
    weight_KN: Tensor, codes_KN: Tensor, factored: Factored, scales: Scales, grid: CodeGrid
) -> Tensor:
    """Improve codes by one visit to each column; arguments and result as of `gptq`, `codes_KN` is not changed."""
    order_K = factored.order
    codes_KN = codes_KN[order_K]
    error_KN = weight_KN[order_K]
    num_inputs = error_KN.shape[0]
    blocks = [(start, min(start + BLOCK, num_inputs)) for start in range(0, num_inputs, BLOCK)]
    for start, stop in blocks:
        scale_SN = scales.columns(order_K[start:stop])
        error_KN[start:stop].addcmul_(codes_KN[start:stop], scale_SN, value=-1)
    for start, stop in blocks:
        gram_SK = factored.gram[start:stop]
        _descend(
            error_KN[start:stop],
            codes_KN[start:stop],
            gram_SK[:, start:stop].contiguous(),
            gram_SK @ error_KN,
            scales.columns(order_K[start:stop]),
            grid,
        )
    return _in_own_order(codes_KN, order_K)


def _descend(
    error_SN: Tensor, codes_SN: Tensor, gram_SS: Tensor, pull_SN: Tensor, scale_SN: Tensor, grid: CodeGrid
) -> None:
    """One visit to each column of a block; updates errors and codes. `pull` is H times the error of all columns."""
    for column, curvature in enumerate(gram_SS.diagonal().tolist()):
        scale_N, old_N = scale_SN[column], codes_SN[column]
        new_N = grid.nearest_(torch.addcdiv(old_N, pull_SN[column], scale_N, value=1 / curvature))
        change_N = (new_N - old_N).mul_(scale_N)
        codes_SN[column] = new_N
        error_SN[column] -= change_N
        pull_SN.addr_(gram_SS[column], change_N, alpha=-1)


def refit_scales(weight_KN: Tensor, codes_KN: Tensor, factored: Factored, scales: Scales) -> Tensor:
    """The scales that cost least with given codes: G linear equations for each output.

    Args:
        weight_KN: float32, transposed, inputs in their own order.
        codes_KN: its codes, float32, in the same order.
        factored: Gram matrix of the inputs.
        scales: the present scales; a result that is not within a factor of two of these is not used.

    Returns:
        float32 [G, N], not rounded.
    """
    place_K = torch.argsort(factored.order)
    gram_KK = factored.gram[place_K][:, place_K]
    num_groups, num_outputs = scales.values.shape
    step = max(1, _SYSTEM_ELEMENTS // num_groups**2)
    parts = [slice(start, min(start + step, num_outputs)) for start in range(0, num_outputs, step)]
    return torch.cat(
        [
            _refit_outputs(weight_KN[:, part], codes_KN[:, part], gram_KK, scales.values[:, part], scales.group_size)
            for part in parts
        ],
        dim=1,
    )


def _refit_outputs(weight_KN: Tensor, codes_KN: Tensor, gram_KK: Tensor, scale_GN: Tensor, group_size: int) -> Tensor:
    """`refit_scales` of some outputs; the Gram matrix is in the inputs' own order."""
    num_groups, num_outputs = scale_GN.shape
    target_GN = _group_sums(codes_KN * (gram_KK @ weight_KN), num_groups)
    normal_GGN = torch.stack(
        [
            _group_sums(codes_KN * (gram_KK[:, part] @ codes_KN[part]), num_groups)
            for part in (slice(start, start + group_size) for start in range(0, len(codes_KN), group_size))
        ],
        dim=1,
    )
    normal_NGG = normal_GGN.permute(2, 0, 1).contiguous()
    diagonal_NG = normal_NGG.diagonal(dim1=1, dim2=2)
    diagonal_NG.add_(diagonal_NG.mean(dim=1, keepdim=True) * 1e-6 + torch.finfo(torch.float32).tiny)
    found_NG, failed_N = torch.linalg.solve_ex(normal_NGG, target_GN.T.unsqueeze(-1))
    found_GN = found_NG.view(num_outputs, num_groups).T
    usable_GN = (found_GN > scale_GN / 2) & (found_GN < scale_GN * 2) & (failed_N == 0)
    return torch.where(usable_GN, found_GN, scale_GN)


def _in_own_order(rows_KN: Tensor, order_K: Tensor) -> Tensor:
    return torch.empty_like(rows_KN).index_copy_(0, order_K, rows_KN)


def _group_sums(values_KN: Tensor, num_groups: int) -> Tensor:
    return values_KN.view(num_groups, -1, values_KN.shape[1]).sum(dim=1)
