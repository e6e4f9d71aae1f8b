"""Checkpoints with random weights for benchmarks, and what to write down about the machine that ran one."""

import json
import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llama4_quant.architecture import Llama4Config, Role, TensorSpec, tensor_specs
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


def make_checkpoint(
    folder: Path, config: dict[str, Any], *, sparse: bool, shard_size: str = "3GB", runs: bool = False
) -> Layout:
    """Write a BF16 checkpoint.

    Args:
        folder: made here.
        config: its config.json.
        sparse: zeros that take no room on disk, instead of normal random weights.
        shard_size: size of its files, at most.
        runs: weights that keep activations near 1, so that logits are finite and tokens spread over the experts.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    specs = {spec.name: spec for spec in tensor_specs(Llama4Config.from_dict(config))}
    tensors = [OutputTensor(name=spec.name, dtype=torch.bfloat16, shape=spec.shape) for spec in specs.values()]
    layout = layout_shards(tensors, parse_size(shard_size))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json(layout)))
    weights = _Weights()
    for number, shard in enumerate(layout.shards):
        with (folder / shard.filename).open("wb") as file:
            file.write(shard.header)
            if sparse:
                file.truncate(shard.nbytes)
                continue
            for placement in (p for p in layout.placements.values() if p.shard == number):
                spec = specs[placement.tensor.name]
                for values in weights.draw(spec.num_weights, *(_moments(spec) if runs else (0.0, _SPREAD))):
                    file.write(values.view(torch.uint8).numpy().data)
    return layout


def _moments(spec: TensorSpec) -> tuple[float, float]:
    """Mean and standard deviation with which a layer's outputs are as large as its inputs."""
    if spec.role is Role.NORM:
        return 1.0, 0.0
    if spec.role is Role.EMBEDDING:
        return 0.0, 1.0
    fan_in = spec.shape[-2] if spec.role is Role.ROUTED_EXPERT else spec.shape[-1]  # fused experts are transposed
    return 0.0, fan_in**-0.5


class _Weights:
    """Normal random numbers, drawn once."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._block = torch.randn(_BLOCK_WEIGHTS + _SHIFT, generator=self._generator)
        self._scaled: tuple[tuple[float, float], torch.Tensor] | None = None

    def draw(self, num_weights: int, mean: float, spread: float) -> Iterator[torch.Tensor]:
        """BF16 pieces of `num_weights` weights in all."""
        if self._scaled is None or self._scaled[0] != (mean, spread):
            self._scaled = (mean, spread), (self._block * spread + mean).to(torch.bfloat16)
        while num_weights:
            count = min(num_weights, _BLOCK_WEIGHTS)
            first = int(torch.randint(_SHIFT, (1,), generator=self._generator))
            yield self._scaled[1][first : first + count]
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
