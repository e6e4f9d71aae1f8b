"""One calibrated weight: correct it, choose its scales, choose its codes, say what that costs.

Shape letters: G scale groups, K in, N out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.calibration.gptq import Factored, coordinate_descent, factor, gptq, output_error, refit_scales
from llama4_quant.calibration.hessian import Moments, corrected
from llama4_quant.calibration.scales import search_scales, solver_scales, stored_scales
from llama4_quant.calibration.settings import SolverSettings
from llama4_quant.quantizers.error import measure
from llama4_quant.quantizers.packed import PackedWeight
from llama4_quant.quantizers.packing import pack_int4
from llama4_quant.quantizers.quantize import QuantizedWeight, dequantize_weight, grid_of
from llama4_quant.quantizers.search import SMALLEST_SCALE, round_to_bf16
from llama4_quant.scheme import Strategy, WeightScheme, WeightType

ROW_ELEMENTS = 1 << 24
"""Weights that are worked on at a time: 64 MiB in float32, and some five times that with what goes with them."""

FEW_ROWS = 1.0
"""Rows per input under which damping grows, with the square of what is missing: what a few rows say of how inputs hang
together is mostly accident, and codes that make use of it cost more than plain rounding does on other rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SolvedWeight:
    """A weight and what its codes cost on the calibration rows.

    Attributes:
        packed: as it is stored; its error is against the source's weight.
        output_error: squared error of the outputs on the rows seen, as a part of the squared outputs: of the stored
            weight against the one it was to be (the corrected one, if there was a correction).
    """

    packed: PackedWeight
    output_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """Everything that all weights with one input share.

    Attributes:
        moments: sums over the rows of that input.
        factored: their Gram matrix.
        settings: which methods.
    """

    moments: Moments
    factored: Factored
    settings: SolverSettings

    @classmethod
    def of(cls, moments: Moments, settings: SolverSettings) -> "Solver":
        """Factor the Gram matrix once for all weights."""
        num_inputs = len(moments.gram)
        damp_percent = settings.damp_percent * max(1.0, FEW_ROWS * num_inputs / max(1, moments.num_rows)) ** 2
        return cls(moments=moments, factored=factor(moments.gram, damp_percent), settings=settings)

    def solve(self, weight_NK: Tensor, scheme: WeightScheme) -> SolvedWeight:
        """Quantize one weight.

        Args:
            weight_NK: [out, in], any float dtype.
            scheme: how it is stored.

        Raises:
            QuantizationError: the weight holds NaN or Inf.
        """
        exact_NK = weight_NK.to(torch.float32)
        target_NK = exact_NK
        if self.settings.correct:
            target_NK = corrected(exact_NK, self.moments, self.settings.ridge_percent)
        scale = search_scales(target_NK, scheme, self._importance())
        parts = [
            self._solve_rows(target_NK[rows], _rows_of(scale, rows, scheme), scheme)
            for rows in self._chunks(*exact_NK.shape)
        ]
        quantized = QuantizedWeight(
            codes=torch.cat([codes for codes, _ in parts]),
            scale=torch.cat([part for _, part in parts]).to(grid_of(scheme).scale_dtype),
            scheme=scheme,
        )
        return self._measured(exact_NK, target_NK, quantized)

    def _importance(self) -> Tensor:
        """What the squared error of each input's weights counts in the search for scales: the damped diagonal."""
        importance_K = torch.empty(len(self.factored.order), device=self.factored.gram.device)
        importance_K[self.factored.order] = self.factored.gram.diagonal()
        return importance_K

    def _chunks(self, num_outputs: int, num_inputs: int) -> Sequence[slice]:
        """Slices of rows that no 128-row block crosses."""
        step = max(1, ROW_ELEMENTS // (num_inputs * 128)) * 128
        return [slice(start, min(start + step, num_outputs)) for start in range(0, num_outputs, step)]

    def _solve_rows(self, target_NK: Tensor, scale: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
        """Codes as stored (one to an element), and scales."""
        grid = grid_of(scheme)
        num_outputs, num_inputs = target_NK.shape
        scales = solver_scales(scale, (num_outputs, num_inputs), scheme)
        target_KN = target_NK.T.contiguous()
        codes_KN = gptq(target_KN, self.factored, scales, grid)
        for sweep in range(self.settings.num_sweeps):
            if sweep and self.settings.refit_scales and scheme.strategy is not Strategy.BLOCK:
                found = round_to_bf16(refit_scales(target_KN, codes_KN, self.factored, scales))
                scales = type(scales)(values=found.clamp_(min=SMALLEST_SCALE), group_size=scales.group_size)
            codes_KN = coordinate_descent(target_KN, codes_KN, self.factored, scales, grid)
        codes = codes_KN.T.contiguous()
        return grid.encode(codes), stored_scales(scales, scheme)

    def cost(self, weight_NK: Tensor, stored_NK: Tensor) -> float:
        """Squared error of the outputs on the rows seen, as a part of the squared outputs of `weight_NK`."""
        gram_KK = self.moments.gram
        total = max(output_error(weight_NK.T, gram_KK), torch.finfo(torch.float32).tiny)
        return max(0.0, output_error(weight_NK.T - stored_NK.T, gram_KK)) / total

    def _measured(self, exact_NK: Tensor, target_NK: Tensor, quantized: QuantizedWeight) -> SolvedWeight:
        is_int4 = quantized.scheme.type is WeightType.INT4
        packed = PackedWeight(
            codes=pack_int4(quantized.codes) if is_int4 else quantized.codes,
            scale=quantized.scale,
            shape=quantized.shape,
            scheme=quantized.scheme,
            error=measure(exact_NK, quantized),
        )
        cost = self.cost(target_NK, dequantize_weight(quantized, torch.float32))
        return SolvedWeight(packed=packed, output_error=cost)


def _rows_of(scale: Tensor, rows: slice, scheme: WeightScheme) -> Tensor:
    if scheme.strategy is not Strategy.BLOCK:
        return scale[rows]
    return scale[rows.start // 128 : -(-rows.stop // 128)]
