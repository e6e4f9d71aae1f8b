"""Our own Llama 4 for inference: plain PyTorch modules that run the weights as they are stored."""

from llama4_quant.runtime.attention import Attention
from llama4_quant.runtime.cache import KVCache
from llama4_quant.runtime.model import Llama4Model, Logits

__all__ = ["Attention", "KVCache", "Llama4Model", "Logits"]
