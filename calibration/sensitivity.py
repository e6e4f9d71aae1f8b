"""What storing a weight in some scheme will cost: the predicted rise of the KL divergence, from sums over rows.

Let y = W x be what a weight makes of one row, g the gradient of the log-likelihood of a token drawn from the model's
own distribution, and d the error that a scheme makes of y. To second order the divergence between the two models is
`KL = 1/2 E[(g . d)^2]` (g g^T averages to the Fisher information). Taking the outputs' errors as independent of each
other and of the gradients,

    KL = 1/2 sum over outputs n of mean(g_n^2) mean(d_n^2)

where the second mean weighs a row by its |g|^2, and is what the solver will leave. GPTQ's error is exactly `sum over k
of (r_nk / U_kk)^2`, r being what is left of a column after rounding and H^-1 = U^T U (gptq.py); the residual of
rounding to nearest stands in for r. So a scheme costs one rounding of the weight, and the factor is shared.

An FP8 weight rounds its inputs too. That error e is one and the same for all outputs (and all weights on that input),
so it is taken back to the input: `1/2 sum over k of mean(e_k^2 (g W)_k^2)`.

Shape letters: K in, N out, R rows.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from llama4_quant.calibration.decoder import as_quantized_inputs
from llama4_quant.calibration.gptq import factor
from llama4_quant.calibration.scales import search_scales
from llama4_quant.quantizers.quantize import QuantizedWeight, dequantize_weight, round_rows
from llama4_quant.scheme import Strategy, WeightScheme, WeightType

_DAMP = 0.01
_FP8 = WeightScheme(type=WeightType.FP8, strategy=Strategy.CHANNEL)


class InputSums:
    """Sums over the rows of one input, and over the gradients at the outputs of the weights that share it.

    Attributes:
        gram: sum x^T x, [K, K].
        gradients: by weight, sum of squared gradients, [N].
        squares: by weight, sum of |x|^2 |g|^2: tokens that matter may have larger inputs than others.
        rounding: sum of the squared errors of rounding x to FP8, times the squared gradients at x, [].
        num_rows: rows added.
    """

    def __init__(self, num_inputs: int, device: torch.device) -> None:
        """Zeros."""
        self.gram = torch.zeros(num_inputs, num_inputs, device=device)
        self.gradients: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.rounding = torch.zeros((), device=device)
        self.num_rows = 0

    def add(self, x_RK: Tensor, gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Self:
        """Add rows: inputs, the gradient [R, N] at the output of each weight, and these weights [N, K] by name."""
        self.gram.addmm_(x_RK.T, x_RK)
        rounding_RK = as_quantized_inputs(x_RK, _FP8) - x_RK
        back_RK = torch.zeros_like(x_RK)
        for name, gradient_RN in gradients.items():
            back_RK.addmm_(gradient_RN, weights[name])
            squares_RN = gradient_RN.square()
            energy_R = squares_RN.sum(dim=1)
            for sums, added in (
                (self.gradients, squares_RN.sum(dim=0)),
                (self.squares, energy_R @ x_RK.square().sum(dim=1)),
            ):
                sums[name] = sums[name] + added if name in sums else added
        self.rounding += (rounding_RK * back_RK).square().sum()
        self.num_rows += len(x_RK)
        return self


def predicted_kl(
    weights: Mapping[str, Tensor], sums: InputSums, candidates: Sequence[WeightScheme], num_tokens: int
) -> tuple[float, ...]:
    """Predicted KL in nats per token of storing all of `weights` in each candidate.

    Args:
        weights: float32 [N, K] by name, all on the input of `sums`.
        sums: of that input.
        candidates: the schemes; all divide K.
        num_tokens: tokens of the survey, of which `sums.num_rows` were routed here.

    Raises:
        QuantizationError: a weight holds NaN or Inf.
    """
    if not sums.num_rows:
        return (0.0,) * len(candidates)
    factored = factor(sums.gram, _damping(len(sums.gram), sums.num_rows))
    shape_K = torch.empty_like(factored.root.diagonal())
    shape_K[factored.order] = factored.root.diagonal().square()  # of the Gram matrix with mean diagonal 1
    # FP8 rounds the inputs of all these weights at once.
    inputs = 0.5 * float(sums.rounding) / num_tokens
    costs = [inputs if scheme.type is WeightType.FP8 else 0.0 for scheme in candidates]
    for name, weight_NK in weights.items():
        energy = sums.gradients[name].sum().clamp(min=torch.finfo(torch.float32).tiny)
        cost_K = shape_K * (sums.squares[name] / (energy * len(shape_K)))
        # The mean over tokens, of which only some are rows here.
        fisher_N = sums.gradients[name] / num_tokens
        for place, scheme in enumerate(candidates):
            error_NK = _rounded(weight_NK, scheme, sums.gram.diagonal()).sub_(weight_NK)
            costs[place] += 0.5 * float((error_NK.square_() @ cost_K * fisher_N).sum(dtype=torch.float64))
    return tuple(costs)


def _rounded(weight_NK: Tensor, scheme: WeightScheme, importance_K: Tensor) -> Tensor:
    """The weight rounded to nearest, with the scales that the solver begins with."""
    scale = search_scales(weight_NK, scheme, importance_K)
    codes = round_rows(weight_NK, scale, scheme)
    return dequantize_weight(QuantizedWeight(codes=codes, scale=scale, scheme=scheme), torch.float32)


def _damping(num_inputs: int, num_rows: int) -> float:
    """More of it where rows are few: directions that were not seen must not look as if errors there were free."""
    return min(1.0, _DAMP * max(1.0, 10 * num_inputs / num_rows))
