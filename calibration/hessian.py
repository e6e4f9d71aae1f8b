"""What calibration remembers of a linear layer's inputs: sums of products, one row of activations at a time.

With x^ the inputs of the quantized model, x those of the original one for the same tokens and r a correction wanted of
the output, each row counting by its weight:

    gram        H = sum x^^T x^            [K, K]   GPTQ's Hessian
    input_drift   sum (x - x^)^T x^        [K, K]   how the inputs have moved, seen from x^
    output_drift  sum r^T x^               [N, K]   how the layer's output should move, seen from x^

Shape letters: K in, N out, R rows.
"""

from typing import Self

import torch
from torch import Tensor

ENOUGH_ROWS = 50
"""Rows per input under which the correction's ridge grows."""


class Moments:
    """Sums over rows for all weights that share one input.

    Attributes:
        gram, input_drift, output_drift: see above; the drifts are None unless asked for.
        num_rows: rows added with `add`.
    """

    def __init__(self, num_inputs: int, *, num_outputs: int = 0, drift: bool = False, device: torch.device) -> None:
        """Zeros.

        Args:
            num_inputs: K.
            num_outputs: N of the output drift; 0 for none.
            drift: keep the input drift.
            device: where the sums are.
        """
        zeros = torch.zeros
        self.gram = zeros(num_inputs, num_inputs, device=device)
        self.input_drift = zeros(num_inputs, num_inputs, device=device) if drift else None
        self.output_drift = zeros(num_outputs, num_inputs, device=device) if drift and num_outputs else None
        self.num_rows = 0

    def add(
        self,
        inputs_RK: Tensor,
        original_RK: Tensor | None = None,
        wanted_RN: Tensor | None = None,
        weight_R: Tensor | None = None,
        *,
        num_prior: int = 0,
    ) -> Self:
        """Add rows.

        Args:
            inputs_RK: float32, of the quantized model.
            original_RK: float32, of the original model for the same tokens; needed for drifts.
            wanted_RN: what should be added to the layer's output, for the output drift.
            weight_R: what each row counts; None: 1.
            num_prior: how many of these rows stand for what is not known, and are not counted in `num_rows`.
        """
        weighted_RK = inputs_RK if weight_R is None else inputs_RK * weight_R.unsqueeze(-1)
        self.gram.addmm_(weighted_RK.T, inputs_RK)
        if self.input_drift is not None:
            assert original_RK is not None
            self.input_drift.addmm_((original_RK - inputs_RK).T, weighted_RK)
        if self.output_drift is not None and wanted_RN is not None:
            self.output_drift.addmm_(wanted_RN.T, weighted_RK)
        self.num_rows += len(inputs_RK) - num_prior
        return self


def corrected(weight_NK: Tensor, moments: Moments, damp_percent: float) -> Tensor:
    """The weight that does on the quantized model's inputs what the original one did on its own.

    The least-squares solution of `W* x^ = W x + r`, drawn towards W by a ridge:
    `W* = W + (W input_drift + output_drift) (H + ridge)^-1` (the idea of QEP, arXiv 2504.09629, and Qronos,
    arXiv 2505.11695).

    Args:
        weight_NK: float32 [out, in].
        moments: with drift.
        damp_percent: the ridge, as a part of the mean diagonal of H, for as many rows as inputs; it grows as rows
            become fewer, since less can be known from them.

    Returns:
        float32 [N, K]; `weight_NK` itself where no rows were seen.
    """
    if moments.input_drift is None or not moments.num_rows:
        return weight_NK
    drift_NK = weight_NK @ moments.input_drift
    if moments.output_drift is not None:
        drift_NK += moments.output_drift
    num_inputs = weight_NK.shape[1]
    mean = moments.gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    ridge = damp_percent * max(1.0, ENOUGH_ROWS * num_inputs / moments.num_rows)
    system_KK = moments.gram / mean
    system_KK.diagonal().add_(ridge)
    lower_KK, failed = torch.linalg.cholesky_ex(system_KK)
    if int(failed):
        return weight_NK
    return weight_NK + torch.cholesky_solve(drift_NK.T / mean, lower_KK).T
