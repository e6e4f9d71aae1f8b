"""The parts of a model as config.json describes them, checked: decoder, vision tower, scaling of RoPE."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Frequency scaling of RoPE as Llama 3.1 introduced it (`rope_type` "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The decoder.

    Attributes:
        intermediate_size: width of routed and shared experts.
        intermediate_size_mlp: width of dense layers.
        moe_layers: indices of mixture-of-experts layers; the others are dense.
        rope_layers: per layer: True = RoPE and chunked attention, False = NoPE and full attention.
        attention_chunk_size: tokens per chunk of RoPE layers; None = full attention everywhere.
        floor_scale: positions per step of the query temperature on NoPE layers.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    intermediate_size_mlp: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    num_experts_per_tok: int
    num_local_experts: int
    moe_layers: tuple[int, ...]
    rope_theta: float
    rope_scaling: RopeScaling | None
    use_qk_norm: bool
    rope_layers: tuple[bool, ...]
    attention_chunk_size: int | None
    attn_temperature_tuning: bool
    floor_scale: int
    attn_scale: float
    attention_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The vision tower and its adapter."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    intermediate_size: int
    vision_output_dim: int
    image_size: int
    patch_size: int
    norm_eps: float
    pixel_shuffle_ratio: float
    projector_input_dim: int
    projector_output_dim: int
    rope_theta: float

    @property
    def num_patches(self) -> int:
        """Patches of one tile, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_tile(self) -> int:
        """Text positions that one tile takes after pixel shuffle."""
        return round(self.num_patches * self.pixel_shuffle_ratio**2)
