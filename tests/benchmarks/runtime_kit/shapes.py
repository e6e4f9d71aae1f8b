"""Models to measure: Scout at a fraction of its width and depth."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A text-only Llama 4 whose layers are all mixtures of experts, as Scout's are; every 4th layer is NoPE."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    experts: int
    vocabulary: int

    def config(self) -> dict[str, Any]:
        """config.json; everything that is not a size is Scout's."""
        return {
            "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "vocab_size": self.vocabulary,
            "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "intermediate_size_mlp": 2 * self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "num_local_experts": self.experts, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
            "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(self.layers)],
            "attention_chunk_size": 8192, "use_qk_norm": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
            "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "floor_scale": 8192, "attn_scale": 0.1, "attn_temperature_tuning": True, "attention_bias": False,
            "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        }  # fmt: skip


def scout(*, kv_heads: int, layers: int, experts: int, vocabulary: int) -> Shape:
    """Scout's proportions; with 8 key-value heads also its width (hidden 5120, intermediate 8192, 40 query heads)."""
    return Shape(
        hidden=640 * kv_heads,
        intermediate=1024 * kv_heads,
        heads=5 * kv_heads,
        kv_heads=kv_heads,
        head_dim=128,
        layers=layers,
        experts=experts,
        vocabulary=vocabulary,
    )


TINY = Shape(
    hidden=256, intermediate=256, heads=4, kv_heads=2, head_dim=64, layers=4, experts=4, vocabulary=512
)  # fmt: skip
"""For a test of the benchmark itself: it fits in every cache, so its figures mean nothing."""
