"""Every error that a user can cause or meet, as one small family.

A message says what went wrong, where, what was expected and found, and what to do next. The command line prints it
without a traceback and exits with status 1.
"""

from collections.abc import Sequence


class Llama4QuantError(ValueError):
    """Base of all errors raised on purpose by llama4-quant."""


class CheckpointError(Llama4QuantError):
    """The source checkpoint is missing, damaged, or does not hold what its config.json promises."""


class HubError(CheckpointError):
    """The Hub cannot be reached, or does not give access; what is needed may be in its local cache."""


class OtherLayoutError(CheckpointError):
    """A Hub repository without safetensors, so that its weights are not known from headers."""


class ConfigError(Llama4QuantError):
    """config.json (or another JSON file of the source) cannot be used."""


class SchemeError(Llama4QuantError):
    """The requested quantization is unknown or does not fit the model."""


class QuantizationError(Llama4QuantError):
    """A weight cannot be quantized: for instance because it holds NaN or Inf."""


class OutputError(Llama4QuantError):
    """The output cannot be written: it exists already, or the disk is full."""


class UsageError(Llama4QuantError):
    """Arguments that contradict each other or name something that does not exist."""


def some_tensors(names: Sequence[str]) -> str:
    """`tensor a is`, `tensors a, b, c and 7 more are`; for messages."""
    shown = ", ".join(names[:3])
    if len(names) == 1:
        return f"tensor {shown} is"
    return f"tensors {shown} are" if len(names) <= 3 else f"tensors {shown} and {len(names) - 3} more are"
