"""Random tiny Llama 4 models of transformers, and ours with the same weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Llama4Config as HFConfig
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig, PreTrainedModel

from llama4_quant.architecture import Llama4Config, linear_specs
from llama4_quant.runtime import Llama4Model

IMAGE_TOKEN = 90
SCOUT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "intermediate_size_mlp": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "attention_chunk_size": 8,
    "floor_scale": 4,
    "attn_scale": 0.3,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vision_output_dim": 48,
    "image_size": 16,
    "patch_size": 4,
    "projector_input_dim": 48,
    "projector_output_dim": 48,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def reference_model(*, multimodal: bool, **text: Any) -> PreTrainedModel:
    """An fp32 model of transformers in which every parameter is random, norms and biases too."""
    tied = text.get("tie_word_embeddings", False)
    if multimodal:
        config = HFConfig(
            text_config=TEXT | text, vision_config=VISION, image_token_index=IMAGE_TOKEN, tie_word_embeddings=tied
        )
        config._attn_implementation = "eager"
        model: PreTrainedModel = Llama4ForConditionalGeneration(config)
    else:
        text_config = Llama4TextConfig(**(TEXT | text))
        text_config._attn_implementation = "eager"
        model = Llama4ForCausalLM(text_config)
    randomize(model)
    return model.eval()


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights that keep activations near 1, so that no part of the network hides behind another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                # Fused experts are [E, in, out]; everything else is [out, in].
                fan_in = parameter.shape[-2] if ".experts." in name else parameter.shape[-1]
                parameter.copy_(noise * fan_in**-0.5)


def our_model(folder: Path, *, attention: str) -> Llama4Model:
    """Our fp32 model with the weights of a checkpoint that transformers wrote."""
    config = Llama4Config.from_file(folder / "config.json")
    model = Llama4Model(config, dtype=torch.float32, attention=attention).materialize("cpu")
    fill(model, load_file(folder / "model.safetensors"))
    return model


def fill(model: Llama4Model, tensors: dict[str, Tensor]) -> None:
    """Copy a BF16-layout checkpoint into the model; every tensor of it must have a place."""
    used = set()
    for spec in linear_specs(model.config):
        source = tensors[spec.source] if spec.expert is None else tensors[spec.source][spec.expert]
        rows = source.T if spec.transposed else source
        model.linear_target(spec)["weight"].copy_(rows[spec.out_start : spec.out_start + spec.out_features])
        used.add(spec.source)
    for name, target in model.plain_targets().items():
        target.copy_(tensors[name])
        used.add(name)
    assert used == set(tensors)
