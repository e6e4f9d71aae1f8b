"""Writes Hugging Face tensors as Meta's model-parallel shards: the inverse of reading them, tensor by tensor.

Splits follow fairscale's layers as llama-models uses them (ColumnParallelLinear: outputs, RowParallelLinear: inputs,
VocabParallelEmbedding: vocabulary), written as plain `chunk` calls on whole tensors.
"""

import io
import json
from pathlib import Path

import torch

from llama4_quant.architecture import Llama4Config

VISION_LAYER = {
    "self_attn.q_proj": "attn.wq",
    "self_attn.k_proj": "attn.wk",
    "self_attn.v_proj": "attn.wv",
    "self_attn.o_proj": "attn.wo",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def params_json(config: dict) -> dict:
    """params.json of the model that a Hugging Face config describes."""
    parsed = Llama4Config.from_dict(config)
    text, vision = parsed.text, parsed.vision
    params = {
        "dim": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "vocab_size": text.vocab_size,
        "multiple_of": 64,
        "ffn_dim_multiplier": 0.75,
        "ffn_exp": 4.0,
        "norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "use_scaled_rope": text.rope_scaling is not None,
        "use_qk_norm": text.use_qk_norm,
        "attention_chunk_size": text.attention_chunk_size,
        "nope_layer_interval": 4,
        "attn_temperature_tuning": text.attn_temperature_tuning,
        "floor_scale": float(text.floor_scale),
        "attn_scale": text.attn_scale,
        "moe_args": {
            "num_experts": text.num_local_experts,
            "top_k": text.num_experts_per_tok,
            "interleave_moe_layer_step": config.get("text_config", config)["interleave_moe_layer_step"],
        },
    }
    if vision is not None:
        params["vision_args"] = {
            "image_size": {"height": vision.image_size, "width": vision.image_size},
            "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
            "dim": vision.hidden_size,
            "n_layers": vision.num_hidden_layers,
            "n_heads": vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "output_dim": vision.vision_output_dim,
            "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        }
    return params


def meta_shards(config: dict, tensors: dict[str, torch.Tensor], num_ranks: int, *, fused: bool) -> list[dict]:
    """State dicts of all ranks.

    Args:
        fused: with the spellings of published checkpoints (`wqkv`, `fc1_weight`, norms inside them), else with those
            of llama-models' modules.
    """
    parsed = Llama4Config.from_dict(config)
    whole = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}
    shards = [_top(whole, rank, num_ranks) for rank in range(num_ranks)]
    for rank, shard in enumerate(shards):
        for layer in range(parsed.text.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            part = {name.removeprefix(prefix): t for name, t in whole.items() if name.startswith(prefix)}
            for name, tensor in _decoder_layer(part, rank, num_ranks, fused=fused).items():
                shard[f"layers.{layer}.{name}"] = tensor
        if parsed.vision is not None:
            shard.update(_vision(whole, parsed.vision.num_hidden_layers, rank, num_ranks))
    return [{name: _own(value) for name, value in shard.items()} for shard in shards]


def write_meta(folder: Path, params: dict, shards: list[dict]) -> Path:
    """Write params.json, the shards, and a tokenizer stand-in."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_text("stand-in")
    for rank, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    return folder


def _own(value: object) -> object:
    """A parameter with its own contiguous memory, as a state dict has."""
    return torch.nn.Parameter(value.clone(memory_format=torch.contiguous_format)) if torch.is_tensor(value) else value


def _top(whole: dict[str, torch.Tensor], rank: int, num_ranks: int) -> dict[str, object]:
    return {
        "tok_embeddings.weight": whole["model.embed_tokens.weight"].chunk(num_ranks, 0)[rank],
        "norm.weight": whole["model.norm.weight"],
        "output.weight": whole["lm_head.weight"].chunk(num_ranks, 0)[rank],
        "rope.freqs": torch.arange(16.0),
    }


def _decoder_layer(part: dict[str, torch.Tensor], rank: int, num_ranks: int, *, fused: bool) -> dict[str, object]:
    def outputs(name: str) -> torch.Tensor:
        return part[f"{name}.weight"].chunk(num_ranks, 0)[rank]

    def inputs(name: str) -> torch.Tensor:
        return part[f"{name}.weight"].chunk(num_ranks, 1)[rank]

    q, k, v = (outputs(f"self_attn.{x}_proj") for x in "qkv")
    attention_norm, ffn_norm = part["input_layernorm.weight"], part["post_attention_layernorm.weight"]
    layer: dict[str, object] = {"attention.wo.weight": inputs("self_attn.o_proj")}
    if fused:
        layer["attention.wqkv.weight"] = torch.cat([q, k, v])
        layer["attention.wqkv.layer_norm_weight"] = attention_norm
        layer["attention.wqkv._extra_state"] = io.BytesIO()
    else:
        layer |= {"attention.wq.weight": q, "attention.wk.weight": k, "attention.wv.weight": v}
        layer["attention_norm.weight"] = attention_norm
    if "feed_forward.router.weight" in part:
        layer |= _moe(part, rank, num_ranks, outputs, inputs)
        layer["feed_forward.norm.weight" if fused else "ffn_norm.weight"] = ffn_norm
        return layer
    gate, up = outputs("feed_forward.gate_proj"), outputs("feed_forward.up_proj")
    if fused:
        layer["feed_forward.mlp.fc1_weight"] = torch.cat([gate, up])
        layer["feed_forward.mlp.fc2_weight"] = inputs("feed_forward.down_proj")
        layer["feed_forward.mlp.layer_norm_weight"] = ffn_norm
    else:
        layer |= {"feed_forward.w1.weight": gate, "feed_forward.w3.weight": up, "ffn_norm.weight": ffn_norm}
        layer["feed_forward.w2.weight"] = inputs("feed_forward.down_proj")
    return layer


def _moe(part: dict, rank: int, num_ranks: int, outputs, inputs) -> dict[str, object]:
    gate_EDF, up_EDF = part["feed_forward.experts.gate_up_proj"].chunk(2, 2)
    down_EFD = part["feed_forward.experts.down_proj"]
    return {
        "feed_forward.router_DE": part["feed_forward.router.weight"].T,
        "feed_forward.experts.moe_w_in_eD_F": gate_EDF.chunk(num_ranks, 2)[rank].flatten(0, 1),
        "feed_forward.experts.moe_w_swiglu_eD_F": up_EDF.chunk(num_ranks, 2)[rank].flatten(0, 1),
        "feed_forward.experts.moe_w_out_eF_D": down_EFD.chunk(num_ranks, 1)[rank].flatten(0, 1),
        "feed_forward.w_in_shared_FD.weight": outputs("feed_forward.shared_expert.gate_proj"),
        "feed_forward.w_swiglu_FD.weight": outputs("feed_forward.shared_expert.up_proj"),
        "feed_forward.w_out_shared_DF.weight": inputs("feed_forward.shared_expert.down_proj"),
        "feed_forward.global_gate_stats_3E": torch.zeros(3, 4),
    }


def _vision(whole: dict[str, torch.Tensor], num_layers: int, rank: int, num_ranks: int) -> dict[str, object]:
    encoder, adapter = "vision_embeddings.vision_encoder", "vision_embeddings.vision_adapter.mlp"
    fc1, fc2 = (whole[f"vision_model.vision_adapter.mlp.fc{n}.weight"] for n in (1, 2))
    shard = {
        f"{encoder}.class_embedding": whole["vision_model.class_embedding"],
        f"{encoder}.positional_embedding_vlm": whole["vision_model.positional_embedding_vlm"],
        f"{encoder}.conv1._linear.weight": whole["vision_model.patch_embedding.linear.weight"].chunk(num_ranks)[rank],
        f"{adapter}.c_fc.weight": fc1.chunk(num_ranks, 0)[rank],
        f"{adapter}.c_proj.weight": fc2.chunk(num_ranks, 1)[rank],
        "vision_projection.weight": whole["multi_modal_projector.linear_1.weight"].chunk(num_ranks, 0)[rank],
    }
    for kind in ("weight", "bias"):
        shard[f"{encoder}.ln_pre.{kind}"] = whole[f"vision_model.layernorm_pre.{kind}"]
        shard[f"{encoder}.ln_post.{kind}"] = whole[f"vision_model.layernorm_post.{kind}"]
    for layer in range(num_layers):
        block, base = f"{encoder}.transformer.resblocks.{layer}", f"vision_model.model.layers.{layer}"
        for kind in ("weight", "bias"):
            shard[f"{block}.ln_1.{kind}"] = whole[f"{base}.input_layernorm.{kind}"]
            shard[f"{block}.ln_2.{kind}"] = whole[f"{base}.post_attention_layernorm.{kind}"]
            for name, meta in VISION_LAYER.items():
                tensor = whole[f"{base}.{name}.{kind}"]
                is_row_parallel = meta in {"attn.wo", "mlp.c_proj"}
                if is_row_parallel and kind == "weight":
                    tensor = tensor.chunk(num_ranks, 1)[rank]
                elif not is_row_parallel:
                    tensor = tensor.chunk(num_ranks, 0)[rank]
                shard[f"{block}.{meta}.{kind}"] = tensor
    return shard
