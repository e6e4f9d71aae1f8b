"""A tiny Llama 4 with random weights, without any checkpoint."""

from typing import Any

import torch

from llama4_quant.architecture import Llama4Config
from llama4_quant.runtime import Llama4Model
from llama4_quant.runtime.linear import WeightStorage

IMAGE_TOKEN = 90
TEXT: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
    "floor_scale": 4,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vision_output_dim": 64,
    "image_size": 16,
    "patch_size": 4,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
}


def text_config(**changes: Any) -> Llama4Config:
    return Llama4Config.from_dict(TEXT | changes)


def image_config(**changes: Any) -> Llama4Config:
    return Llama4Config.from_dict(
        {
            "model_type": "llama4",
            "image_token_index": IMAGE_TOKEN,
            "text_config": TEXT | changes,
            "vision_config": VISION,
        }
    )


def random_model(config: Llama4Config, dtype: torch.dtype = torch.float32, **options: Any) -> Llama4Model:
    """An unquantized model on the CPU with weights of about 1/sqrt(inputs)."""
    model = Llama4Model(config, dtype=dtype, device="cpu", **options)
    generator = torch.Generator().manual_seed(0)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, WeightStorage)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * parameter.shape[-1] ** -0.5 if id(parameter) in linear else 1 + 0.3 * noise)
    return model


def random_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, IMAGE_TOKEN, (batch, length), generator=torch.Generator().manual_seed(seed))
