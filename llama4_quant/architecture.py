"""Every weight of a Llama 4, with its role, derived from config.json alone.

Two views of the same model:

- `tensor_specs`: the tensors of a BF16 checkpoint in Hugging Face layout, by name and shape. A checkpoint is complete
  and undamaged in structure exactly when its headers equal this list.
- `linear_specs`: the linear weights as quantization sees them, each [out, in] and, for routed experts, one per expert
  and projection. Hugging Face stores experts fused and *transposed*: `gate_up_proj` [E, H, 2I] (gate first) and
  `down_proj` [E, I, H]; a spec says which columns of which expert it is.

Shape letters: E experts, H hidden, I intermediate, N out, K in, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from llama4_quant.config import Llama4Config, RopeScaling, TextConfig, VisionConfig

__all__ = [
    "LinearSpec", "Llama4Config", "Role", "RopeScaling", "TensorSpec", "TextConfig", "VisionConfig", "attention_names",
    "linear_specs", "tensor_specs",
]  # fmt: skip


class Role(StrEnum):
    """What a weight does; decisions about quantization are made per role."""

    EMBEDDING = "embedding"
    NORM = "norm"
    ATTENTION = "attention"
    ROUTER = "router"
    ROUTED_EXPERT = "routed-expert"
    SHARED_EXPERT = "shared-expert"
    DENSE_MLP = "dense-mlp"
    LM_HEAD = "lm-head"
    PATCH_EMBEDDING = "patch-embedding"
    VISION = "vision"
    """Linear weights of the vision tower and its adapter."""
    VISION_OTHER = "vision-other"
    """Norms, biases, class token and positions of the vision tower."""
    PROJECTOR = "projector"
    BIAS = "bias"
    """Biases of text attention, in the rare checkpoints that have them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """One linear weight, seen as [out_features, in_features].

    Attributes:
        name: the module's name in a compressed-tensors checkpoint, without ".weight".
        layer: layer index inside its tower; None outside the layers.
        source: the BF16 tensor that holds it.
        expert: index into the source's first dimension for routed experts, else None.
        transposed: the source stores [in, out] (routed experts); `out_start` is then the first of the out columns.
        out_start: where this weight's outputs begin in a source that fuses several.
    """

    name: str
    role: Role
    layer: int | None
    out_features: int
    in_features: int
    source: str
    expert: int | None = None
    transposed: bool = False
    out_start: int = 0

    @property
    def num_weights(self) -> int:
        """Weights, without bias."""
        return self.out_features * self.in_features


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor of the BF16 checkpoint in Hugging Face layout; `linears` are the linear weights it holds, if any."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None
    linears: tuple[LinearSpec, ...] = ()

    @property
    def num_weights(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total


def tensor_specs(config: Llama4Config) -> tuple[TensorSpec, ...]:
    """All tensors of the model's BF16 checkpoint, in order of execution (vision, projector, text)."""
    vision = [] if config.vision is None else [*_vision_tensors(config.vision), _projector(config.vision, config.text)]
    return (*vision, *_text_tensors(config.text, config.prefix))


def linear_specs(config: Llama4Config) -> tuple[LinearSpec, ...]:
    """All linear weights, in the order of `tensor_specs`; routed experts one by one, gate before up."""
    return tuple(linear for tensor in tensor_specs(config) for linear in tensor.linears)


def attention_names(config: Llama4Config) -> tuple[str, ...]:
    """Module names of the attention of each decoder layer, which are those with a KV cache."""
    return tuple(f"{config.prefix}model.layers.{layer}.self_attn" for layer in range(config.text.num_hidden_layers))


def _linear(name: str, role: Role, layer: int | None, out_features: int, in_features: int) -> TensorSpec:
    source = f"{name}.weight"
    linear = LinearSpec(
        name=name, role=role, layer=layer, out_features=out_features, in_features=in_features, source=source
    )
    return TensorSpec(name=source, shape=(out_features, in_features), role=role, layer=layer, linears=(linear,))


def _plain(name: str, role: Role, layer: int | None, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, shape=shape, role=role, layer=layer)


def _text_tensors(text: TextConfig, prefix: str) -> Iterator[TensorSpec]:
    hidden, vocabulary = text.hidden_size, text.vocab_size
    yield _plain(f"{prefix}model.embed_tokens.weight", Role.EMBEDDING, None, vocabulary, hidden)
    for layer in range(text.num_hidden_layers):
        base = f"{prefix}model.layers.{layer}"
        yield _plain(f"{base}.input_layernorm.weight", Role.NORM, layer, hidden)
        yield from _attention(text, f"{base}.self_attn", layer)
        yield _plain(f"{base}.post_attention_layernorm.weight", Role.NORM, layer, hidden)
        if layer in text.moe_layers:
            yield from _moe(text, f"{base}.feed_forward", layer)
        else:
            yield from _mlp(f"{base}.feed_forward", Role.DENSE_MLP, layer, hidden, text.intermediate_size_mlp)
    yield _plain(f"{prefix}model.norm.weight", Role.NORM, None, hidden)
    if not text.tie_word_embeddings:
        yield _linear(f"{prefix}lm_head", Role.LM_HEAD, None, vocabulary, hidden)


def _attention(text: TextConfig, base: str, layer: int) -> Iterator[TensorSpec]:
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    for projection, out_features, in_features in (
        ("q_proj", queries, text.hidden_size),
        ("k_proj", keys, text.hidden_size),
        ("v_proj", keys, text.hidden_size),
        ("o_proj", text.hidden_size, queries),
    ):
        yield _linear(f"{base}.{projection}", Role.ATTENTION, layer, out_features, in_features)
        if text.attention_bias:
            yield _plain(f"{base}.{projection}.bias", Role.BIAS, layer, out_features)


def _mlp(base: str, role: Role, layer: int, hidden: int, intermediate: int) -> Iterator[TensorSpec]:
    yield _linear(f"{base}.gate_proj", role, layer, intermediate, hidden)
    yield _linear(f"{base}.up_proj", role, layer, intermediate, hidden)
    yield _linear(f"{base}.down_proj", role, layer, hidden, intermediate)


def _moe(text: TextConfig, base: str, layer: int) -> Iterator[TensorSpec]:
    hidden, intermediate = text.hidden_size, text.intermediate_size
    yield _linear(f"{base}.router", Role.ROUTER, layer, text.num_local_experts, hidden)
    yield from _mlp(f"{base}.shared_expert", Role.SHARED_EXPERT, layer, hidden, intermediate)
    gate_up = (("gate_proj", 0), ("up_proj", intermediate))
    yield _fused_experts(text, base, "gate_up_proj", layer, gate_up, out_features=intermediate, in_features=hidden)
    down = (("down_proj", 0),)
    yield _fused_experts(text, base, "down_proj", layer, down, out_features=hidden, in_features=intermediate)


def _fused_experts(
    text: TextConfig,
    base: str,
    fused_name: str,
    layer: int,
    projections: tuple[tuple[str, int], ...],
    *,
    out_features: int,
    in_features: int,
) -> TensorSpec:
    """A fused tensor [E, in, out * projections] and its (projection, first out column) parts for every expert."""
    source = f"{base}.experts.{fused_name}"
    linears = tuple(
        LinearSpec(
            name=f"{base}.experts.{expert}.{projection}",
            role=Role.ROUTED_EXPERT,
            layer=layer,
            out_features=out_features,
            in_features=in_features,
            source=source,
            expert=expert,
            transposed=True,
            out_start=out_start,
        )
        for expert in range(text.num_local_experts)
        for projection, out_start in projections
    )
    shape = (text.num_local_experts, in_features, out_features * len(projections))
    return TensorSpec(name=source, shape=shape, role=Role.ROUTED_EXPERT, layer=layer, linears=linears)


def _vision_tensors(vision: VisionConfig) -> Iterator[TensorSpec]:
    base, hidden = "vision_model", vision.hidden_size
    patch_inputs = vision.num_channels * vision.patch_size**2
    yield _plain(f"{base}.class_embedding", Role.VISION_OTHER, None, hidden)
    yield _plain(f"{base}.positional_embedding_vlm", Role.VISION_OTHER, None, vision.num_patches + 1, hidden)
    yield _linear(f"{base}.patch_embedding.linear", Role.PATCH_EMBEDDING, None, hidden, patch_inputs)
    yield from _layer_norm(f"{base}.layernorm_pre", None, hidden)
    for layer in range(vision.num_hidden_layers):
        yield from _vision_layer(vision, f"{base}.model.layers.{layer}", layer)
    yield from _layer_norm(f"{base}.layernorm_post", None, hidden)
    adapter = f"{base}.vision_adapter.mlp"
    yield _linear(f"{adapter}.fc1", Role.VISION, None, vision.projector_input_dim, vision.intermediate_size)
    yield _linear(f"{adapter}.fc2", Role.VISION, None, vision.projector_output_dim, vision.projector_output_dim)


def _vision_layer(vision: VisionConfig, base: str, layer: int) -> Iterator[TensorSpec]:
    hidden, intermediate = vision.hidden_size, vision.intermediate_size
    yield from _layer_norm(f"{base}.input_layernorm", layer, hidden)
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield from _vision_linear(f"{base}.self_attn.{projection}", layer, hidden, hidden)
    yield from _layer_norm(f"{base}.post_attention_layernorm", layer, hidden)
    yield from _vision_linear(f"{base}.mlp.fc1", layer, intermediate, hidden)
    yield from _vision_linear(f"{base}.mlp.fc2", layer, hidden, intermediate)


def _vision_linear(name: str, layer: int, out_features: int, in_features: int) -> Iterator[TensorSpec]:
    yield _linear(name, Role.VISION, layer, out_features, in_features)
    yield _plain(f"{name}.bias", Role.VISION_OTHER, layer, out_features)


def _layer_norm(name: str, layer: int | None, hidden: int) -> Iterator[TensorSpec]:
    yield _plain(f"{name}.weight", Role.VISION_OTHER, layer, hidden)
    yield _plain(f"{name}.bias", Role.VISION_OTHER, layer, hidden)


def _projector(vision: VisionConfig, text: TextConfig) -> TensorSpec:
    name = "multi_modal_projector.linear_1"
    return _linear(name, Role.PROJECTOR, None, text.hidden_size, vision.vision_output_dim)
