"""lm_head under calibration: fitted to the last hidden states of all calibration tokens, normed.

The original stream says what its outputs should be, so that with two streams the head also makes up for what is left
of the drift: its target are the original model's logits. It has as many outputs as the vocabulary (202,048 in Llama 4)
and is solved in parts, a work item's rows at a time.

Shape letters: H hidden, R rows.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from llama4_quant.calibration.decoder import as_quantized_inputs, fast_matmul
from llama4_quant.calibration.hessian import Moments
from llama4_quant.calibration.source_weights import SourceWeights
from llama4_quant.calibration.streams import Streams
from llama4_quant.config import Llama4Config


def calibrate_head(
    config: Llama4Config, weights: SourceWeights, last: Streams, done: Callable[[str, int], None]
) -> None:
    """Quantize what is left of lm_head, if the plan quantizes it.

    Args:
        config: the model.
        weights: the model's.
        last: the hidden states after the last layer.
        done: called with the weight's name and the source bytes that are done now.
    """
    name = f"{config.prefix}lm_head"
    if config.text.tie_word_embeddings or not weights.is_pending([name]):
        return
    gain_H = weights.original(f"{config.prefix}model.norm.weight")

    def normed(x_RH: Tensor) -> Tensor:
        return functional.rms_norm(x_RH, gain_H.shape, gain_H, config.text.rms_norm_eps)

    moments = Moments(config.text.hidden_size, drift=last.original is not None, device=weights.device)
    for rows in last.quantized.chunks():
        quantized_RH = as_quantized_inputs(normed(last.quantized.read(rows)), weights.scheme(name))
        original_RH = None if last.original is None else normed(last.original.read(rows))
        with fast_matmul(weights.device):
            moments.add(quantized_RH, original_RH)
    for num_bytes in weights.quantize_rows(name, moments):
        done(name, num_bytes)
    weights.sync()
