"""What quantization did to a model: perplexity, KL divergence to a reference, top-1 agreement."""

from llama4_quant.evaluation.measure import NamedModel, evaluate
from llama4_quant.evaluation.report import Comparison, Estimate, EvaluationResult, render
from llama4_quant.evaluation.windows import token_windows

__all__ = ["Comparison", "Estimate", "EvaluationResult", "NamedModel", "evaluate", "render", "token_windows"]
