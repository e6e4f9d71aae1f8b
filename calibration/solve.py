"""One calibrated weight: correct it, choose its scales, choose its codes, say what that costs.

Shape letters: G scale groups, K in, N out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.calibration.decoder import fast_matmul
from llama4_quant.calibration.gptq import Factored, coordinate_descent, factor, gptq, refit_scales
from llama4_quant.calibration.hessian import Moments, corrected
from llama4_quant.calibration.scales import search_scales, solver_scales, stored_scales
from llama4_quant.calibration.settings import SolverSettings
from llama4_quant.quantizers.error import measure
from llama4_quant.quantizers.lanes import rows_per_scale
from llama4_quant.quantizers.native import Library
from llama4_quant.quantizers.packed import PackedWeight
from llama4_quant.quantizers.packing import pack_int4
from llama4_quant.quantizers.quantize import QuantizedWeight, dequantize_weight, grid_of, quantize_weight
from llama4_quant.quantizers.search import SMALLEST_SCALE, round_to_bf16
from llama4_quant.scheme import Strategy, WeightScheme, WeightType

ROW_ELEMENTS = 1 << 24
"""Weights that are worked on at a time: 64 MiB in float32, and some five times that with what goes with them."""

_CLOSE = 0.8
"""Where an output costs more than this part of what rounding costs, both are taken exactly: inputs of fast products
have 8 bits or more, so a sum of squares is off by about a hundredth."""
FEW_ROWS = 1.0
"""Rows per input under which damping grows, with the square of what is missing: what a few rows say of how inputs hang
together is mostly accident, and codes that make use of it cost more than plain rounding does on other rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SolvedWeight:
    """A weight and what its codes cost on the calibration rows.

    Attributes:
        packed: as it is stored; its error is against the source's weight.
        output_error: squared error of the outputs on the rows seen, as a part of the squared outputs of the source's
            weight: of the stored weight against the one it was to be (the corrected one, if there was a correction).
        rounding_error: the same of the weight rounded to nearest.
        squared_outputs: what both are a part of.
        num_rounded: outputs that are stored as rounded to nearest, since anything else would have cost more.
    """

    packed: PackedWeight
    output_error: float
    rounding_error: float
    squared_outputs: float
    num_rounded: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """Everything that all weights with one input share.

    Attributes:
        moments: sums over the rows of that input.
        factored: their Gram matrix.
        settings: which methods.
        library: compiled loops, if there are some; they change no byte.
    """

    moments: Moments
    factored: Factored
    settings: SolverSettings
    library: Library | None = None

    @classmethod
    def of(cls, moments: Moments, settings: SolverSettings, library: Library | None = None) -> "Solver":
        """Factor the Gram matrix once for all weights."""
        num_inputs = len(moments.gram)
        damp_percent = settings.damp_percent * max(1.0, FEW_ROWS * num_inputs / max(1, moments.num_rows)) ** 2
        return cls(moments=moments, factored=factor(moments.gram, damp_percent), settings=settings, library=library)

    def solve(self, weight_NK: Tensor, scheme: WeightScheme, rounded: QuantizedWeight | None = None) -> SolvedWeight:
        """Quantize one weight; no output costs more than rounding to nearest would.

        Args:
            weight_NK: [out, in], any float dtype.
            scheme: how it is stored.
            rounded: the weight rounded to nearest; None: it is made here.

        Raises:
            QuantizationError: the weight holds NaN or Inf.
        """
        exact_NK = weight_NK.to(torch.float32)
        target_NK = exact_NK
        if self.settings.correct:
            target_NK = corrected(exact_NK, self.moments, self.settings.ridge_percent)
        scale = search_scales(target_NK, scheme, self._importance(), self.library)
        parts = [
            self._solve_rows(target_NK[rows], _rows_of(scale, rows, scheme), scheme)
            for rows in self._chunks(*exact_NK.shape)
        ]
        quantized = QuantizedWeight(
            codes=torch.cat([codes for codes, _, _ in parts]),
            scale=torch.cat([part for _, part, _ in parts]).to(grid_of(scheme).scale_dtype),
            scheme=scheme,
        )
        costs = [cost_N for _, _, cost_N in parts if cost_N is not None]
        cost_N = torch.cat(costs) if costs else None
        return self._guarded(exact_NK, target_NK, quantized, rounded or quantize_weight(exact_NK, scheme), cost_N)

    def _importance(self) -> Tensor:
        """What the squared error of each input's weights counts in the search for scales: the damped diagonal."""
        importance_K = torch.empty(len(self.factored.order), device=self.factored.gram.device)
        importance_K[self.factored.order] = self.factored.gram.diagonal()
        return importance_K

    def _chunks(self, num_outputs: int, num_inputs: int) -> Sequence[slice]:
        """Slices of rows that no 128-row block crosses."""
        step = max(1, ROW_ELEMENTS // (num_inputs * 128)) * 128
        return [slice(start, min(start + step, num_outputs)) for start in range(0, num_outputs, step)]

    def _solve_rows(
        self, target_NK: Tensor, scale: Tensor, scheme: WeightScheme
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes as stored (one to an element), scales, and the damped cost of each output where that is known."""
        grid = grid_of(scheme)
        num_outputs, num_inputs = target_NK.shape
        scales = solver_scales(scale, (num_outputs, num_inputs), scheme)
        target_KN = target_NK.T.contiguous()
        codes_KN, cost_N = gptq(target_KN, self.factored, scales, grid, self.library)
        for sweep in range(self.settings.num_sweeps):
            if sweep and self.settings.refit_scales and scheme.strategy is not Strategy.BLOCK:
                found = round_to_bf16(refit_scales(target_KN, codes_KN, self.factored, scales))
                scales = type(scales)(values=found.clamp_(min=SMALLEST_SCALE), group_size=scales.group_size)
            codes_KN = coordinate_descent(target_KN, codes_KN, self.factored, scales, grid, self.library)
        codes = codes_KN.T.contiguous()
        return grid.encode(codes), stored_scales(scales, scheme), None if self.settings.num_sweeps else cost_N

    def _guarded(
        self,
        exact_NK: Tensor,
        target_NK: Tensor,
        solved: QuantizedWeight,
        rounded: QuantizedWeight,
        cost_N: Tensor | None,
    ) -> SolvedWeight:
        """The better of two candidates, output by output (in FP8 blocks, whose outputs share scales, by the block).

        Costs are products with a K x K matrix, each as dear as GPTQ itself, so they are taken on the machine's fast
        units, and again exactly only for outputs where it is close.
        """
        scheme, height = solved.scheme, rows_per_scale(solved.scheme)
        codes, scale = solved.codes.clone(), solved.scale.clone()
        num_rounded, costs = 0, torch.zeros(3, dtype=torch.float64)
        for rows in self._chunks(*solved.shape):
            target, stored = target_NK[rows], _dequantized_rows(solved, rows)
            with fast_matmul(target.device):
                total_N = self._seen(exact_NK[rows])
                plain_NK = target - _dequantized_rows(rounded, rows)
                plain_N = self._seen(plain_NK)
                error_NK = target - stored
                error_N = self._seen(error_NK) if cost_N is None else self._undamped(cost_N[rows], error_NK)
            close_N = self._block_costs(error_NK, error_N, height) > _CLOSE * self._block_costs(
                plain_NK, plain_N, height
            )
            if bool(close_N.any()):
                error_N[close_N] = self._seen(error_NK[close_N])
                plain_N[close_N] = self._seen(plain_NK[close_N])
            worse_N = self._block_costs(error_NK, error_N, height) > self._block_costs(plain_NK, plain_N, height)
            worse_N &= close_N
            chosen = rows.start + torch.nonzero(worse_N).squeeze(-1)
            codes[chosen] = rounded.codes[chosen]
            scales = rows.start // height + torch.nonzero(worse_N[::height]).squeeze(-1)
            scale[scales] = rounded.scale[scales]
            num_rounded += len(chosen)
            found = (total_N, torch.where(worse_N, plain_N, error_N), plain_N)
            costs += torch.stack([cost_N.sum(dtype=torch.float64).cpu() for cost_N in found])
        total, error, plain = costs.clamp(min=0).tolist()
        total = max(total, torch.finfo(torch.float32).tiny)
        quantized = QuantizedWeight(codes=codes, scale=scale, scheme=scheme)
        return SolvedWeight(
            packed=PackedWeight(
                codes=pack_int4(codes) if scheme.type is WeightType.INT4 else codes,
                scale=scale,
                shape=quantized.shape,
                scheme=scheme,
                error=measure(exact_NK, quantized),
            ),
            output_error=error / total,
            rounding_error=plain / total,
            squared_outputs=total,
            num_rounded=num_rounded,
        )

    def _seen(self, error_NK: Tensor) -> Tensor:
        """Squared errors of the outputs on the rows seen, [N]."""
        return (error_NK @ self.moments.gram).mul_(error_NK).sum(dim=1)

    def _undamped(self, cost_N: Tensor, error_NK: Tensor) -> Tensor:
        """The same of a cost as the solver counts."""
        return (cost_N - error_NK.square() @ self._damping()) * self._mean()

    def _block_costs(self, error_NK: Tensor, seen_N: Tensor, height: int) -> Tensor:
        """Costs as the solver counts, with damping, of the outputs that share scales, one for each output."""
        return _block_sums(seen_N / self._mean() + error_NK.square() @ self._damping(), height)

    def _damping(self) -> Tensor:
        return self.factored.damp_percent + (self.moments.gram.diagonal() <= 0).to(torch.float32)

    def _mean(self) -> Tensor:
        return self.moments.gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)


def _block_sums(cost_N: Tensor, height: int) -> Tensor:
    """Sums over the outputs that share scales, one for each output."""
    if height == 1:
        return cost_N
    sums = [part.sum().expand(len(part)) for part in torch.split(cost_N, height)]
    return torch.cat(sums)


def _dequantized_rows(weight: QuantizedWeight, rows: slice) -> Tensor:
    part = QuantizedWeight(
        codes=weight.codes[rows], scale=_rows_of(weight.scale, rows, weight.scheme), scheme=weight.scheme
    )
    return dequantize_weight(part, torch.float32)


def _rows_of(scale: Tensor, rows: slice, scheme: WeightScheme) -> Tensor:
    if scheme.strategy is not Strategy.BLOCK:
        return scale[rows]
    return scale[rows.start // 128 : -(-rows.stop // 128)]
