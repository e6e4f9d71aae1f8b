"""Which implementation quantizes: the compiled kernels, or the plain torch operations. Both give the same bytes.

`choose_backend()` is asked once, at the start of a conversion; the result is passed down. The environment variable
LLAMA4_QUANT_BACKEND (`auto`, `compiled` or `plain`) decides when the caller does not.
"""

import functools
import os
from dataclasses import dataclass
from enum import StrEnum

import torch

from llama4_quant.errors import UsageError
from llama4_quant.quantizers.compiled import quantize_compiled
from llama4_quant.quantizers.native import Library, NativeUnavailableError, build
from llama4_quant.quantizers.packed import PackedWeight, quantize_plain
from llama4_quant.scheme import WeightScheme, preset

ENVIRONMENT_VARIABLE = "LLAMA4_QUANT_BACKEND"


class BackendName(StrEnum):
    """What can be asked for."""

    AUTO = "auto"
    """COMPILED where it works, else PLAIN."""
    COMPILED = "compiled"
    """kernels.cpp; an error where it does not work."""
    PLAIN = "plain"
    """quantize.py with torch operations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """How weights are quantized.

    Attributes:
        name: COMPILED or PLAIN.
        detail: for the report: the compiler, or why there are no compiled kernels.
        library: the compiled kernels, None for PLAIN.
    """

    name: BackendName
    detail: str
    library: Library | None = None

    def quantize(self, weight: torch.Tensor, scheme: WeightScheme, out: torch.Tensor | None = None) -> PackedWeight:
        """Quantize, pack and measure one weight [out, in] of any strides; see `quantize_weight`.

        Thread-safe, and one thread a call. Bytes do not depend on the backend; its error sums agree to within 2^-19 and
        do not depend on threads or memory layout.

        Args:
            weight: as for `quantize_weight`.
            scheme: as for `quantize_weight`.
            out: contiguous uint8 of `code_bytes` or more that the compiled kernels write the codes to, for callers
                that quantize weight after weight: fresh memory costs as much as FP8 quantization. The codes are a view
                of it, until the next call with it. PLAIN makes its own memory.

        Raises:
            QuantizationError, SchemeError: as `quantize_weight`.
        """
        if self.library is None or weight.device.type != "cpu":
            return quantize_plain(weight, scheme)
        return quantize_compiled(weight, scheme, self.library, out)


def choose_backend(name: BackendName | str | None = None) -> Backend:
    """Find the backend that `name`, or else the environment, asks for; `auto` if neither does.

    Compiles on first use (some seconds, once for a machine: the library is kept on disk).

    Raises:
        UsageError: unknown name, or `compiled` where there are no compiled kernels.
    """
    asked = name if name is not None else os.environ.get(ENVIRONMENT_VARIABLE) or BackendName.AUTO
    if asked not in set(BackendName):
        raise UsageError(f"unknown backend {asked!r}; use one of {', '.join(BackendName)}")
    if asked == BackendName.PLAIN:
        return Backend(name=BackendName.PLAIN, detail="asked for")
    found = _compiled_or_plain()
    if asked == BackendName.COMPILED and found.library is None:
        raise UsageError(f"no compiled kernels: {found.detail}; install g++ or clang++, or use the backend 'plain'")
    return found


@functools.cache
def _compiled_or_plain() -> Backend:
    try:
        library = build()
    except NativeUnavailableError as error:
        return Backend(name=BackendName.PLAIN, detail=str(error))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # starting threads takes longer than all of these checks
    try:
        wrong = next((scheme for scheme in _every_scheme() if not _same_bytes(library, scheme)), None)
    finally:
        torch.set_num_threads(num_threads)
    if wrong is not None:
        detail = f"compiled kernels give other bytes than the plain path for {wrong.label} ({library.compiler})"
        return Backend(name=BackendName.PLAIN, detail=detail)
    return Backend(name=BackendName.COMPILED, detail=library.compiler, library=library)


def _every_scheme() -> list[WeightScheme]:
    settings = (("W4A16", 32), ("W4A16", 64), ("W4A16", 128), ("W4A16", -1), ("FP8_DYNAMIC", None), ("FP8_BLOCK", None))
    return [
        preset(name, group_size=group_size, observer=observer).weights
        for name, group_size in settings
        for observer in ("absmax", "mse")
    ]


def _same_bytes(library: Library, scheme: WeightScheme) -> bool:
    """Guard against a compiler that breaks the arithmetic: a few thousand weights, some milliseconds."""
    weight = torch.randn(256, 12, generator=torch.Generator().manual_seed(0)).pow_(3).to(torch.bfloat16).T
    plain, compiled = quantize_plain(weight, scheme), quantize_compiled(weight, scheme, library)
    same_codes = torch.equal(plain.codes.view(torch.uint8), compiled.codes.view(torch.uint8))
    return same_codes and torch.equal(plain.scale, compiled.scale)
