"""Checkpoints of one Llama 4 MoE layer for benchmarks, and what to write down about the machine that ran one."""

import json
import os
import platform
import re
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch

from llama4_quant.architecture import Llama4Config, tensor_specs
from llama4_quant.checkpoint.layout import Layout, OutputTensor, index_json, layout_shards, parse_size

_BLOCK_WEIGHTS = 1 << 24
"""Random weights are drawn once and then repeated, each time from another place on."""
_SHIFT = 977
_SPREAD = 0.02


def layer_config(
    experts: int, hidden: int, intermediate: int, *, heads: tuple[int, int] = (2, 1), vocabulary: int = 128
) -> dict[str, Any]:
    """One MoE layer, and by default as little else as the architecture allows; `heads` are those of q and of k, v."""
    return {
        "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "vocab_size": vocabulary,
        "hidden_size": hidden, "intermediate_size": intermediate, "intermediate_size_mlp": 2 * intermediate,
        "num_hidden_layers": 1, "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 128,
        "num_local_experts": experts, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
        "attention_chunk_size": 8192, "use_qk_norm": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "floor_scale": 8192, "attn_scale": 0.1, "attn_temperature_tuning": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def make_checkpoint(folder: Path, config: dict[str, Any], *, sparse: bool, shard_size: str = "3GB") -> Layout:
    """Write a BF16 checkpoint.

    Args:
        folder: made here.
        config: its config.json.
        sparse: zeros that take no room on disk, instead of normal random weights.
        shard_size: size of its files, at most.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    specs = tensor_specs(Llama4Config.from_dict(config))
    tensors = [OutputTensor(name=spec.name, dtype=torch.bfloat16, shape=spec.shape) for spec in specs]
    layout = layout_shards(tensors, parse_size(shard_size))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json(layout)))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(_BLOCK_WEIGHTS + _SHIFT, generator=generator).mul_(_SPREAD).to(torch.bfloat16)
    for shard in layout.shards:
        with (folder / shard.filename).open("wb") as file:
            file.write(shard.header)
            if sparse:
                file.truncate(shard.nbytes)
            else:
                _fill(file, (shard.nbytes - len(shard.header)) // 2, weights, generator)
    return layout


def _fill(file: BinaryIO, num_weights: int, weights: torch.Tensor, generator: torch.Generator) -> None:
    while num_weights:
        count, first = min(num_weights, _BLOCK_WEIGHTS), int(torch.randint(_SHIFT, (1,), generator=generator))
        file.write(weights[first : first + count].view(torch.uint8).numpy().data)
        num_weights -= count


def circumstances() -> dict[str, Any]:
    """Where and when: processor, cores, load (processes that ran in the last minute), versions."""
    return {
        "when": time.strftime("%Y-%m-%d"),
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """The processor, as Linux calls it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()
