"""Quantize Llama 4 checkpoints to FP8 and int4, run them, and measure what was lost.

The public API: `convert`, `load`, `evaluate`; `Scheme` with `preset` to make one, and `make_calibration`.
"""

from llama4_quant import threads

threads.limit_waiting()  # before anything imports torch

from llama4_quant._version import __version__
from llama4_quant.calibration.settings import make_calibration
from llama4_quant.conversion.convert import convert
from llama4_quant.evaluation.checkpoints import evaluate
from llama4_quant.runtime.loader import load
from llama4_quant.scheme import Scheme, preset

__all__ = ["Scheme", "__version__", "convert", "evaluate", "load", "make_calibration", "preset"]
