"""Choosing codes for a layer's output instead of for its weights: GPTQ, and coordinate descent after it.

A linear weight W [N, K] meets inputs with Gram matrix H = X^T X [K, K]. Storing Q instead costs
`tr((W - Q) H (W - Q)^T)`, the squared error of the layer's output on X. Both methods lower that cost, every output row
for itself:

- **GPTQ** (arXiv 2210.17323) fixes one column after the other, each so that it also makes up for the errors of those
  before it. Columns go by falling diag(H) ("static activation ordering": groups and their scales stay those of the
  original order, so nothing but the codes changes on disk). The paper spreads errors over what is still free by a
  factor of H^-1. The same follows from one factor of H itself, H = R R^T with R upper triangular (as in LDLQ, arXiv
  2307.13304): the cost is the sum over columns j of `R_jj^2 (target_j - q_j)^2` with `target_j = w_j + sum over i < j
  of (w_i - q_i) R_ij / R_jj`. That is a quarter of the arithmetic of inverting H, and gives the cost on the way.
- **Coordinate descent** (as in QuantEase, arXiv 2309.01885) then visits the columns again: given all others, a
  column's best codes are the rounding of one closed expression. The cost never rises.

Work is on transposed weights [K, N], so that a column of W is contiguous memory.

Shape letters: G scale groups, K in, N out, S columns of one block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.quantizers.grid import CodeGrid
from llama4_quant.quantizers.native import Library
from llama4_quant.quantizers.solver import descend_block, fix_block

BLOCK = 128
"""Columns between two matrix products with all the rest."""
_SYSTEM_ELEMENTS = 1 << 23
"""Of the systems of equations for scales that are solved together: 32 MiB, and as much again for copies."""
_PANEL = 256
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
        root: R with H = R R^T, upper triangular, [K, K].
        order: the input that is visited at each place, [K].
        damp_percent: what was added to the diagonal.
    """

    gram: Tensor
    root: Tensor
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
        root_KK = _upper_root(ordered_KK)
        if root_KK is not None:
            return Factored(gram=ordered_KK, root=root_KK, order=order_K, damp_percent=damp)
        if damp >= _MAX_DAMP:  # nothing but the diagonal can be trusted
            diagonal_K = ordered_KK.diagonal().clamp(min=1.0)
            root_KK = torch.diag(diagonal_K.sqrt())
            return Factored(gram=torch.diag(diagonal_K), root=root_KK, order=order_K, damp_percent=damp)
        damp = min(_MAX_DAMP, damp * _MORE_DAMPING)


def _upper_root(gram_KK: Tensor) -> Tensor | None:
    """R with H = R R^T, upper triangular; None where float32 does not see a positive definite matrix."""
    lower_KK = _cholesky(gram_KK.flip(0, 1))
    return None if lower_KK is None or not bool(torch.isfinite(lower_KK).all()) else lower_KK.flip(0, 1)


def _cholesky(gram_KK: Tensor) -> Tensor | None:
    """L with H = L L^T, lower triangular, in the place of H; None where H is not positive definite.

    Panel by panel, so that nearly all is matrix products: several times as fast as LAPACK's on processors.
    """
    size = len(gram_KK)
    step = size if gram_KK.device.type != "cpu" else _PANEL
    for start in range(0, size, step):
        stop = min(start + step, size)
        gram_KK[start:, start:stop].addmm_(gram_KK[start:, :start], gram_KK[start:stop, :start].T, alpha=-1)
        lower, failed = torch.linalg.cholesky_ex(gram_KK[start:stop, start:stop])
        if int(failed):
            return None
        gram_KK[start:stop, start:stop] = lower
        below = gram_KK[stop:, start:stop]
        below.copy_(torch.linalg.solve_triangular(lower.T, below, upper=True, left=False))
    return gram_KK.tril_()


def gptq(
    weight_KN: Tensor, factored: Factored, scales: Scales, grid: CodeGrid, library: Library | None = None
) -> tuple[Tensor, Tensor]:
    """Codes by GPTQ.

    Args:
        weight_KN: float32, transposed, inputs in their own order; not changed.
        factored: Gram matrix of the inputs.
        scales: of the weight.
        grid: the codes.
        library: compiled loops, which give the same bytes; only for processors.

    Returns:
        Codes as float32 [K, N], inputs in their own order; and what they cost by the damped Gram matrix, [N].
    """
    order_K, root_KK = factored.order, factored.root
    weight_KN = weight_KN[order_K]
    codes_KN, error_KN = torch.empty_like(weight_KN), torch.empty_like(weight_KN)
    cost_N = torch.zeros_like(weight_KN[0])
    for start in range(0, len(order_K), BLOCK):
        block = slice(start, min(start + BLOCK, len(order_K)))
        diagonal_S = root_KK.diagonal()[block]
        target_SN = weight_KN[block]
        if start:
            carried_KS = root_KK[:start, block] / diagonal_S
            target_SN = torch.addmm(target_SN, carried_KS.T, error_KN[:start])
        _fix_block(
            (weight_KN[block], target_SN, scales.columns(order_K[block]), codes_KN[block], error_KN[block]),
            cost_N,
            root_KK[block, block] / diagonal_S,
            diagonal_S.square(),
            grid,
            library,
        )
    return _in_own_order(codes_KN, order_K), cost_N


Matrices = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of one block, each [S, N]: weight, target, scale, codes, error; in descent the target is H times the error."""


def _fix_block(
    matrices: Matrices, cost_N: Tensor, feed_SS: Tensor, curvature_S: Tensor, grid: CodeGrid, library: Library | None
) -> None:
    """Codes and errors of a block whose targets know of all errors before it.

    Operations are rounded one by one, in this order, as in solver.h.
    """
    if library is not None and feed_SS.device.type == "cpu":
        fix_block(library, matrices, cost_N, feed_SS, curvature_S, grid)
        return
    weight_SN, target_SN, scale_SN, codes_SN, error_SN = matrices
    target_SN = target_SN.clone()
    for column, curvature in enumerate(curvature_S.tolist()):
        code_N = grid.nearest_(torch.div(target_SN[column], scale_SN[column], out=codes_SN[column]))
        stored_N = code_N * scale_SN[column]
        error_N = torch.sub(weight_SN[column], stored_N, out=error_SN[column])
        left_N = target_SN[column] - stored_N
        cost_N += left_N.mul_(left_N).mul_(curvature)
        target_SN[column + 1 :] += feed_SS[column, column + 1 :, None] * error_N


def coordinate_descent(
    weight_KN: Tensor,
    codes_KN: Tensor,
    factored: Factored,
    scales: Scales,
    grid: CodeGrid,
    library: Library | None = None,
) -> Tensor:
    """Improve codes by one visit to each column; arguments as of `gptq`, `codes_KN` is not changed; the codes."""
    order_K = factored.order
    weight_KN, codes_KN = weight_KN[order_K], codes_KN[order_K]
    error_KN = torch.empty_like(weight_KN)
    num_inputs = len(order_K)
    blocks = [slice(start, min(start + BLOCK, num_inputs)) for start in range(0, num_inputs, BLOCK)]
    for block in blocks:
        torch.addcmul(weight_KN[block], codes_KN[block], scales.columns(order_K[block]), value=-1, out=error_KN[block])
    for block in blocks:
        gram_SK = factored.gram[block]
        gram_SS = gram_SK[:, block].contiguous()
        scale_SN = scales.columns(order_K[block])
        matrices = (weight_KN[block], gram_SK @ error_KN, scale_SN, codes_KN[block], error_KN[block])
        _descend(matrices, gram_SS, gram_SS.diagonal().contiguous(), grid, library)
    return _in_own_order(codes_KN, order_K)


def _descend(matrices: Matrices, gram_SS: Tensor, curvature_S: Tensor, grid: CodeGrid, library: Library | None) -> None:
    """One visit to each column of a block; updates codes and errors. Operations as in solver.h, as in `_fix_block`."""
    if library is not None and gram_SS.device.type == "cpu":
        descend_block(library, matrices, gram_SS, curvature_S, grid)
        return
    _, pull_SN, scale_SN, codes_SN, error_SN = matrices
    for column, inverse in enumerate((1 / curvature_S).tolist()):
        scale_N, old_N = scale_SN[column], codes_SN[column]
        new_N = grid.nearest_((pull_SN[column] * inverse).div_(scale_N).add_(old_N))
        change_N = (new_N - old_N).mul_(scale_N)
        codes_SN[column] = new_N
        error_SN[column] -= change_N
        pull_SN[column + 1 :] -= gram_SS[column, column + 1 :, None] * change_N


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
