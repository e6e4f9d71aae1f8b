"""What a layer does between matrix products: norms, rotations, gates; on processors compiled (native_elementwise.py).

What the compiled kernels compute is written here in torch, which is what runs where they do not.

Shape letters: B batch, D head dimension, H hidden, I intermediate, T tokens, X heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from llama4_quant.ops import native_elementwise
from llama4_quant.ops.native_tape import NotRecordableError, Tape
from llama4_quant.runtime.linear import Builder
from llama4_quant.runtime.rope import Rotation


class Elementwise(nn.Module):
    """Chooses how it runs when it gets its place, as weights do.

    Attributes:
        is_native: the compiled kernel runs.
    """

    is_native: bool

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self._allows_native = builder.allows_native
        self.choose(builder.device)

    def choose(self, device: torch.device) -> None:
        """Choose for a device, where the activations are from now on; compiles on first use, for processors only."""
        self.is_native = self._allows_native and device.type == "cpu" and native_elementwise.probe() is None

    def require_native(self) -> None:
        """Before recording.

        Raises:
            NotRecordableError: torch's operators run here.
        """
        if not self.is_native:
            raise NotRecordableError(f"{type(self).__name__} runs in torch")


class RMSNorm(Elementwise):
    """Divide by the root mean square in fp32, round to the model's dtype, then multiply by the weight."""

    def __init__(self, builder: Builder, size: int, eps: float) -> None:
        super().__init__(builder)
        self.weight = builder.parameter(size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        if self.is_native:
            return native_elementwise.RMS_NORM(x, self.weight, self.eps)
        return _normalized(x, self.eps) * self.weight

    def record(self, tape: Tape, x_1H: Tensor) -> Tensor:
        """`forward` of one token on a tape."""
        self.require_native()
        return native_elementwise.record_rms_norm(tape, x_1H, self.weight, self.eps)


class HeadRotation(Elementwise):
    """What RoPE layers do to queries and keys: rotate; then, with `eps`, divide each head by its root mean square."""

    def __init__(self, builder: Builder, eps: float | None) -> None:
        super().__init__(builder)
        self.eps = eps

    def forward(self, x_BTXD: Tensor, rotation: Rotation) -> Tensor:
        """[B, T, X, D] -> [B, T, X, D]."""
        if self.is_native:
            return native_elementwise.ROTATE(x_BTXD, rotation.cos, rotation.sin, self.eps)
        x_BTXD = rotation.apply(x_BTXD)
        return x_BTXD if self.eps is None else _normalized(x_BTXD, self.eps)

    def record(self, tape: Tape, x_11XD: Tensor, rotation: Rotation) -> Tensor:
        """`forward` of one token on a tape, with what `rotation` holds when it runs."""
        self.require_native()
        return native_elementwise.record_rotate(tape, x_11XD, rotation.cos, rotation.sin, self.eps)


class Gate(Elementwise):
    """`silu(gate) * up`."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Twice [..., I] -> [..., I]."""
        if self.is_native:
            return native_elementwise.SILU_MUL(gate, up)
        return functional.silu(gate) * up

    def record(self, tape: Tape, gate_1I: Tensor, up_1I: Tensor) -> Tensor:
        """`forward` of one token on a tape."""
        self.require_native()
        return native_elementwise.record_silu_mul(tape, gate_1I, up_1I)


def _normalized(x: Tensor, eps: float) -> Tensor:
    """Divided by the root mean square of the last dimension, in fp32."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)).type_as(x)
