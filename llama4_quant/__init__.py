"""Quantize Llama 4 checkpoints to FP8 and int4, run them, and measure what was lost.

The public API: `convert`, `load`, `evaluate`; `Scheme` with `preset` to make one, and `make_calibration`. Each is
imported when it is first asked for, so that a command loads what it needs and nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llama4_quant import threads

threads.limit_waiting()  # before anything imports torch

from llama4_quant._version import __version__

if TYPE_CHECKING:
    from llama4_quant.calibration.settings import make_calibration
    from llama4_quant.conversion.convert import convert
    from llama4_quant.evaluation.checkpoints import evaluate
    from llama4_quant.runtime.loader import load
    from llama4_quant.scheme import Scheme, preset

__all__ = ["Scheme", "__version__", "convert", "evaluate", "load", "make_calibration", "preset"]

_MODULES = {
    "Scheme": "scheme",
    "convert": "conversion.convert",
    "evaluate": "evaluation.checkpoints",
    "load": "runtime.loader",
    "make_calibration": "calibration.settings",
    "preset": "scheme",
}


def __getattr__(name: str) -> Any:
    """What is public is imported on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
