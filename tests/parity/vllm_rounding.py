"""How far two correct engines may differ: the noise of logits, from the arithmetic of BF16 (and FP8) alone.

Both engines compute the same function and round at different places. Their final hidden states then differ as if by
noise, and the logits in a direction d over the vocabulary (+1 for one token, -1 for another) differ with the standard
deviation

    sigma^2  =  eps^2 || (d @ W) * g ||^2  +  2 u^2/6 || d * logits ||^2

with head W [V, H], final norm weight g [H], and eps the noise of the normalized hidden state, per element. The last
term is the rounding of the logits themselves, in both engines. eps follows from counting:

- A rounding to the compute dtype is off by at most u of the value (u = 2^-8 for BF16's 8 significant bits); by
  u / sqrt(6) in root mean square, if mantissas are uniform: errors in +-u, mantissas m in 1..2 give u^2/3 * E[1/m^2],
  and E[1/m^2] = 1/2.
- A branch (attention or MLP) rounds its signal about ROUNDINGS_PER_BRANCH times, in each of the two engines, and
  inherits the noise of the residual stream that it reads.
- FP8 activations: inputs that differ by eps in root mean square (by sqrt(2/pi) eps in the mean, if normal) fall on two
  sides of a rounding boundary with probability difference / spacing, and then come out a whole spacing apart. So their
  squares differ by difference * spacing; e4m3's relative spacing is 2^-3/m, in the mean 2^-3 ln 2.
- The residual stream after b branches of equal size is the sum of b + 1 parts (the embedding is one), so that a
  branch's share of its square is 1/(b + 1). Each addition rounds once more.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float32": 2.0**-24}

ROUNDINGS_PER_BRANCH = 10
"""Attention: norm and its weight, dequantized weights, q/k/v, RoPE, qk-norm or temperature, probabilities, values,
weights again, output. The MLP has nine."""

FP8_INPUTS_PER_BRANCH = 2
FP8_FLIP = math.sqrt(2 / math.pi) * 2.0**-3 * math.log(2)


def rounding_variance(dtype: str) -> float:
    """Of one rounding to `dtype`, relative to the value's square."""
    return UNIT_ROUNDOFF[dtype] ** 2 / 6


def hidden_noise(num_layers: int, dtype: str, *, fp8_activations: bool) -> float:
    """eps: relative difference of two engines' final hidden states, root mean square."""
    once = 2 * rounding_variance(dtype)  # each engine rounds
    variance = 0.0
    for branch in range(1, 2 * num_layers + 1):
        own = ROUNDINGS_PER_BRANCH * once
        if fp8_activations:
            own += FP8_INPUTS_PER_BRANCH * FP8_FLIP * math.sqrt(variance + own)
        variance += own / (branch + 1) + once
    return math.sqrt(variance)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """Standard deviations between two engines that run one checkpoint.

    Attributes:
        dtype: both engines' compute dtype.
        eps: see `hidden_noise`.
        head: [V, H] float32, lm_head.
        norm: [H] float32, weight of the final norm.
    """

    dtype: str
    eps: float
    head: Tensor
    norm: Tensor

    def sigma(self, direction_V: Tensor, logits_V: Tensor) -> float:
        """Of `direction_V @ logits_V`."""
        hidden = self.eps * (direction_V @ self.head * self.norm).norm()
        logits = math.sqrt(2 * rounding_variance(self.dtype)) * (direction_V * logits_V).norm()
        return math.hypot(float(hidden), float(logits))

    def sigma_of_gap(self, logits_V: Tensor, first: int, second: int) -> float:
        """Of the difference of two tokens' logits."""
        direction = torch.zeros_like(logits_V)
        direction[first] += 1
        direction[second] -= 1
        return self.sigma(direction, logits_V)

    def sigma_of_logprob(self, logits_V: Tensor, token: int) -> float:
        """Of a token's log-probability, to first order: its gradient is the one-hot minus the probabilities."""
        direction = -logits_V.softmax(dim=-1)
        direction[token] += 1
        return self.sigma(direction, logits_V)
