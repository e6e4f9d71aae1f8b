"""Small random Llama 4 checkpoints for tests, written with the safetensors library and not with our writer."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from llama4_quant.architecture import Llama4Config, tensor_specs

TEXT = {
    "model_type": "llama4_text",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 128,
    "intermediate_size_mlp": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
    "floor_scale": 4,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "use_qk_norm": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
VISION = {
    "model_type": "llama4_vision_model",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "intermediate_size": 128,
    "vision_output_dim": 128,
    "image_size": 28,
    "patch_size": 7,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 128,
    "projector_output_dim": 128,
    "rope_theta": 10000,
}


def text_config(**changes: object) -> dict:
    """A flat config.json of a text-only model."""
    return {"architectures": ["Llama4ForCausalLM"], **TEXT, **changes}


def multimodal_config(**text_changes: object) -> dict:
    """A config.json with text and vision."""
    return copy.deepcopy(
        {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "image_token_index": 90,
            "boi_token_index": 91,
            "eoi_token_index": 92,
            "torch_dtype": "bfloat16",
            "text_config": TEXT | text_changes,
            "vision_config": VISION,
        }
    )


def random_tensors(config: dict, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Weights of every tensor of the model: norms around 1, others with a spread of 1/sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in tensor_specs(Llama4Config.from_dict(config)):
        values = torch.randn(spec.shape, generator=generator)
        is_norm = spec.name.endswith("norm.weight") or "layernorm" in spec.name
        inputs = spec.shape[-2] if len(spec.shape) == 3 else spec.shape[-1]
        scale = 0.1 if is_norm else inputs**-0.5
        tensors[spec.name] = (values * scale + (1.0 if spec.name.endswith("weight") and is_norm else 0.0)).to(dtype)
    return tensors


def write_checkpoint(folder: Path, config: dict, tensors: dict[str, torch.Tensor], num_shards: int = 2) -> Path:
    """Write config.json, shards and index, and a tokenizer stand-in that conversion has to copy."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map = {}
    for shard in range(num_shards):
        filename = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[shard::num_shards]}
        save_file(part, folder / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, filename)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def make_checkpoint(folder: Path, config: dict | None = None, *, seed: int = 0) -> Path:
    """A random BF16 checkpoint; multimodal unless a config is given."""
    config = multimodal_config() if config is None else config
    return write_checkpoint(folder, config, random_tensors(config, seed))
