"""Which format a checkpoint is written in, and which schemes go with it."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from llama4_quant.errors import UsageError
from llama4_quant.formats.meta_fp8 import WHAT_IS_FP8
from llama4_quant.scheme import Scheme, SchemeName, Strategy, WeightType, preset


class CheckpointFormat(StrEnum):
    """How a checkpoint is stored."""

    COMPRESSED_TENSORS = "compressed-tensors"
    """Quantized, one 2-D weight per expert and projection; see compressed_tensors.py."""
    BF16 = "bf16"
    """Not quantized, in Hugging Face layout; see bf16.py."""
    FBGEMM_FP8 = "fbgemm-fp8"
    """FP8 with fused experts; see fbgemm_fp8.py."""
    META_FP8 = "meta-fp8"
    """Meta's own layout, routed experts in FP8; see meta_fp8.py."""

    @property
    def fuses_experts(self) -> bool:
        """Whether the experts of a layer stay in one tensor, as they are in the Hugging Face layout."""
        return self in {CheckpointFormat.BF16, CheckpointFormat.FBGEMM_FP8}


DEFAULT_SCHEMES: Mapping[str, str] = MappingProxyType(
    {
        CheckpointFormat.COMPRESSED_TENSORS: SchemeName.W4A16,
        CheckpointFormat.FBGEMM_FP8: SchemeName.FP8_DYNAMIC,
        CheckpointFormat.META_FP8: SchemeName.FP8_DYNAMIC,
    }
)
"""What a format stores unless it is told otherwise."""


def choose_format(
    name: str | CheckpointFormat, scheme: str | Scheme | None = None
) -> tuple[CheckpointFormat, Scheme | None]:
    """The format of this name, and the scheme to use with it.

    Args:
        name: `compressed-tensors`, `bf16`, `fbgemm-fp8` or `meta-fp8`.
        scheme: None is the format's own: W4A16 for compressed-tensors, none for bf16, FP8_DYNAMIC for the others.

    Raises:
        UsageError: an unknown format, or one that cannot store the scheme.
        SchemeError: an unknown scheme.
    """
    if name not in set(CheckpointFormat):
        raise UsageError(f"--format {name}: unknown; known formats: {', '.join(CheckpointFormat)}")
    chosen = CheckpointFormat(name)
    if chosen is CheckpointFormat.COMPRESSED_TENSORS:
        return chosen, preset(scheme or DEFAULT_SCHEMES[chosen])
    if chosen is CheckpointFormat.BF16:
        if scheme is not None:
            raise UsageError("--format bf16 does not quantize; drop --scheme and the options that belong to it")
        return chosen, None
    settled = preset(scheme or DEFAULT_SCHEMES[chosen])
    if settled.weights.type is not WeightType.FP8 or settled.weights.strategy is not Strategy.CHANNEL:
        raise UsageError(f"--format {chosen} has one scale per output channel: use FP8_DYNAMIC, not {settled.name}")
    if chosen is CheckpointFormat.META_FP8 and (settled.quantize or settled.ignore):
        raise UsageError(f"--format meta-fp8: {WHAT_IS_FP8}; drop --quantize and --ignore")
    return chosen, settled
