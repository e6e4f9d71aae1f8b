"""The gate of a feed-forward.

Shape letters: I intermediate.
"""

from torch import Tensor
from torch.nn import functional

from llama4_quant.ops import native_elementwise
from llama4_quant.runtime.linear import Builder


class Gate:
    """`silu(gate) * up`, by a compiled kernel where there is one."""

    def __init__(self, builder: Builder) -> None:
        self.is_native = builder.runs_elementwise

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Twice [..., I] -> [..., I]."""
        if self.is_native and gate.is_cpu:
            return native_elementwise.SILU_MUL(gate, up)
        return functional.silu(gate) * up
