"""The arithmetic of one decoder layer in pieces, for calibration: statistics are taken and weights change in between.

The pieces are those of the runtime (its attention, its rotary embedding), in float32. What differs is only that
weights are passed in, since there are two of each: the original and the quantized one.

Shape letters: B sequences, E experts, H hidden, I intermediate, K in, N out, R rows, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from llama4_quant.config import TextConfig
from llama4_quant.ops.reference import round_activations_fp8
from llama4_quant.runtime.attention import Attention, Step, TextAttention
from llama4_quant.runtime.cache_formats import CacheScales
from llama4_quant.runtime.linear import Builder
from llama4_quant.runtime.rope import TextRotary
from llama4_quant.runtime.text import make_step
from llama4_quant.scheme import FP8_BLOCK_SIZE, Strategy, WeightScheme, WeightType


class DecoderMath:
    """What layers compute apart from their weights."""

    def __init__(self, config: TextConfig, device: torch.device) -> None:
        self.config = config
        self._rotary = TextRotary(config).to(device)
        self._device = device
        self._attention = {
            layer: TextAttention(config, layer, _shapes_only(), Attention.SDPA)
            for layer in range(config.num_hidden_layers)
        }

    def norm(self, x: Tensor, gain_H: Tensor) -> Tensor:
        """RMSNorm in float32: [..., H] -> [..., H]."""
        return functional.rms_norm(x, gain_H.shape, gain_H, self.config.rms_norm_eps)

    def context(
        self, layer: int, projected: Sequence[Tensor], length: int, scales: CacheScales | None = None
    ) -> Tensor:
        """Attention: queries, keys and values [R, ...] -> [R, heads * D].

        Args:
            layer: its number.
            projected: queries, keys and values of whole sequences, one after the other.
            length: tokens of each sequence.
            scales: of an FP8 KV cache.
        """
        q, k, v = (rows.view(-1, length, rows.shape[-1]) for rows in projected)
        return self._attention[layer].context(q, k, v, self._step(len(q), length), None, scales).flatten(0, 1)

    def cached(self, layer: int, projected: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [R, ...] as they are cached, [sequences, length, heads, D]; `length` as for `context`."""
        k, v = (rows.view(-1, length, rows.shape[-1]) for rows in projected)
        return self._attention[layer].cached(k, v, self._step(len(k), length))

    def _step(self, num_sequences: int, length: int) -> Step:
        padding = (0,) * num_sequences
        return make_step(self.config, self._rotary, new=length, past=0, padding=padding, device=self._device)


def swiglu(gate_RI: Tensor, up_RI: Tensor) -> Tensor:
    """What down_proj gets."""
    return functional.silu(gate_RI) * up_RI


def as_quantized_inputs(x_RK: Tensor, scheme: WeightScheme | None) -> Tensor:
    """Activations as a weight stored by `scheme` meets them: rounded for FP8, unchanged otherwise."""
    if scheme is None or scheme.type is not WeightType.FP8:
        return x_RK
    return round_activations_fp8(x_RK, group_size=FP8_BLOCK_SIZE if scheme.strategy is Strategy.BLOCK else None)


@contextmanager
def fast_matmul(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 numbers by the machine's fast units, where it has some.

    On a CPU with AMX inputs are rounded to bfloat16 (relative error 2^-9) and sums kept in float32, at several times
    the speed; on a GPU inputs are rounded to TF32. Solving is done outside of this.
    """
    if device.type == "cuda":
        backend, precision = torch.backends.cuda.matmul, "tf32"
    elif torch.cpu._is_amx_tile_supported():  # noqa: SLF001 - there is no public question
        backend, precision = torch.backends.mkldnn.matmul, "bf16"  # type: ignore[attr-defined]
    else:
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before


def _shapes_only() -> Builder:
    return Builder(dtype=torch.float32, device=torch.device("meta"), scheme_of=lambda _name: None)
