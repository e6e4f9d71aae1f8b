"""Names of Meta's original checkpoints, and how model-parallel ranks split each tensor.

Sources: llama-models 0.3.0, `llama4/model.py`, `moe.py`, `ffn.py`, `vision/*.py` (names, and the load hooks that rename
older spellings) and `checkpoint.py` (which dimension is split), and transformers' `convert_llama4_weights_to_hf.py`.
RoPE is interleaved in both, so q and k are not permuted.

Linear weights are [out, in] as in Hugging Face layout. Column-parallel ones are split by outputs (rows of the matrix),
row-parallel ones by inputs (columns). Routed experts are stacked on the first axis, [in, out] each:

    moe_w_in_eD_F, moe_w_swiglu_eD_F   [E * D, F / ranks]   gate and up; together gate_up_proj [E, D, 2F]
    moe_w_out_eF_D                     [E * F / ranks, D]   down_proj [E, F, D]: a rank has some rows of every expert
    router_DE                          [D, E]               router.weight, transposed

Shape letters: D hidden, E experts, F intermediate.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Split(StrEnum):
    """What a model-parallel rank has of a tensor."""

    NONE = "none"
    """All of it; rank 0's is taken."""
    ROWS = "rows"
    COLUMNS = "columns"
    EXPERT_COLUMNS = "expert-columns"
    """[E * D, F / ranks]."""
    EXPERT_ROWS = "expert-rows"
    """[E * F / ranks, D]."""
    TRANSPOSED = "transposed"
    """All of it, [in, out]."""


class Part(StrEnum):
    """Which part of a stored tensor (or of the Hugging Face tensor) this is about."""

    WHOLE = "whole"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    FIRST_HALF = "first-half"
    SECOND_HALF = "second-half"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where a stored tensor, or a part of it, belongs.

    Attributes:
        name: the Hugging Face tensor, `N` standing for the layer and the decoder named without its prefix.
        split: what one rank has.
        part: of the stored tensor (fused q, k, v or gate and up); for experts: of the Hugging Face tensor's columns.
    """

    name: str
    split: Split
    part: Part = Part.WHOLE


DECODER_PREFIX = "language_model."
"""Before the names of the decoder where there is a vision tower too."""

_IGNORED = re.compile(
    r"(^|\.)(freq_cis|rope\.freqs|_extra_state|global_gate_stats_3E|running_gate_stats_3E|expert_activation_DE)$"
)
"""Tables that follow from the configuration, and counters of training."""
_LAYER = re.compile(r"^(layers|vision_embeddings\.vision_encoder\.transformer\.resblocks)\.(\d+)\.")
_HF_LAYER = re.compile(r"^(model\.layers|vision_model\.model\.layers)\.(\d+)\.")


def targets_of(name: str) -> tuple[Target, ...] | None:
    """Where the tensor `name` of Meta's layout belongs, with real layer numbers; () if nowhere, None if unknown."""
    if _IGNORED.search(name):
        return ()
    match = _LAYER.match(name)
    layer = match[2] if match else "N"
    found = _TARGETS.get(_LAYER.sub(r"\1.N.", name))
    if found is None or (layer != "N" and layer != str(int(layer))):
        return None
    return tuple(Target(name=t.name.replace(".N.", f".{layer}."), split=t.split, part=t.part) for t in found)


def spellings_of(name: str) -> tuple[tuple[str, Target], ...]:
    """The tensors of Meta's layout that make up a tensor of the Hugging Face layout, each with its target.

    Of several spellings that Meta's loader accepts it is the one without fused parts; () if there is none. Two for
    `gate_up_proj`: gate, then up.

    Args:
        name: of the Hugging Face tensor, the decoder named without its prefix.
    """
    match = _HF_LAYER.match(name)
    found = _SPELLINGS.get(_HF_LAYER.sub(r"\1.N.", name), ())
    layer = match[2] if match else "N"
    return tuple((meta.replace(".N.", f".{layer}."), target) for meta, target in found)


def _decoder() -> dict[str, tuple[Target, ...]]:
    return {
        "tok_embeddings.weight": (Target(name="model.embed_tokens.weight", split=Split.ROWS),),
        "norm.weight": (Target(name="model.norm.weight", split=Split.NONE),),
        "output.weight": (Target(name="lm_head.weight", split=Split.ROWS),),
    }


def _decoder_layer() -> dict[str, tuple[Target, ...]]:
    """Every spelling that Meta's own loader accepts; only one may be there."""
    rows, columns, both = Split.ROWS, Split.COLUMNS, Split.NONE
    qkv = (("q_proj", Part.QUERY), ("k_proj", Part.KEY), ("v_proj", Part.VALUE))
    halves = (("gate_proj", Part.FIRST_HALF), ("up_proj", Part.SECOND_HALF))
    names = {
        "attention_norm.weight": [("input_layernorm", both, Part.WHOLE)],
        "attention.wqkv.layer_norm_weight": [("input_layernorm", both, Part.WHOLE)],
        "attention.wq.weight": [("self_attn.q_proj", rows, Part.WHOLE)],
        "attention.wk.weight": [("self_attn.k_proj", rows, Part.WHOLE)],
        "attention.wv.weight": [("self_attn.v_proj", rows, Part.WHOLE)],
        "attention.wqkv.weight": [(f"self_attn.{projection}", rows, part) for projection, part in qkv],
        "attention.wo.weight": [("self_attn.o_proj", columns, Part.WHOLE)],
        "ffn_norm.weight": [("post_attention_layernorm", both, Part.WHOLE)],
        "feed_forward.norm.weight": [("post_attention_layernorm", both, Part.WHOLE)],
        "feed_forward.mlp.layer_norm_weight": [("post_attention_layernorm", both, Part.WHOLE)],
        "feed_forward.w1.weight": [("feed_forward.gate_proj", rows, Part.WHOLE)],
        "feed_forward.w3.weight": [("feed_forward.up_proj", rows, Part.WHOLE)],
        "feed_forward.mlp.fc1_weight": [(f"feed_forward.{projection}", rows, part) for projection, part in halves],
        "feed_forward.w2.weight": [("feed_forward.down_proj", columns, Part.WHOLE)],
        "feed_forward.mlp.fc2_weight": [("feed_forward.down_proj", columns, Part.WHOLE)],
        "feed_forward.router_DE": [("feed_forward.router", Split.TRANSPOSED, Part.WHOLE)],
    }
    shared = {"gate_proj": ("w_in_shared_FD", "w1"), "up_proj": ("w_swiglu_FD", "w3")}
    for projection, (stacked, plain) in {**shared, "down_proj": ("w_out_shared_DF", "w2")}.items():
        for spelling in (stacked, f"shared_expert.{plain}"):
            split = columns if projection == "down_proj" else rows
            names[f"feed_forward.{spelling}.weight"] = [(f"feed_forward.shared_expert.{projection}", split, Part.WHOLE)]
    targets = {
        f"layers.N.{meta}": tuple(
            Target(name=f"model.layers.N.{module}.weight", split=split, part=part) for module, split, part in found
        )
        for meta, found in names.items()
    }
    experts = "feed_forward.experts"
    for spellings, fused, split, part in (
        (("moe_w_in_eD_F", "w1"), "gate_up_proj", Split.EXPERT_COLUMNS, Part.FIRST_HALF),
        (("moe_w_swiglu_eD_F", "w3"), "gate_up_proj", Split.EXPERT_COLUMNS, Part.SECOND_HALF),
        (("moe_w_out_eF_D", "w2"), "down_proj", Split.EXPERT_ROWS, Part.WHOLE),
    ):
        for spelling in spellings:
            target = Target(name=f"model.layers.N.{experts}.{fused}", split=split, part=part)
            targets[f"layers.N.{experts}.{spelling}"] = (target,)
    return targets


def _vision() -> dict[str, tuple[Target, ...]]:
    encoder, adapter = "vision_embeddings.vision_encoder", "vision_embeddings.vision_adapter.mlp"
    names = {
        f"{encoder}.class_embedding": ("vision_model.class_embedding", Split.NONE),
        f"{encoder}.positional_embedding_vlm": ("vision_model.positional_embedding_vlm", Split.NONE),
        f"{encoder}.conv1._linear.weight": ("vision_model.patch_embedding.linear.weight", Split.ROWS),
        f"{adapter}.c_fc.weight": ("vision_model.vision_adapter.mlp.fc1.weight", Split.ROWS),
        f"{adapter}.c_proj.weight": ("vision_model.vision_adapter.mlp.fc2.weight", Split.COLUMNS),
        "vision_projection.weight": ("multi_modal_projector.linear_1.weight", Split.ROWS),
    }
    for kind in ("weight", "bias"):
        names[f"{encoder}.ln_pre.{kind}"] = (f"vision_model.layernorm_pre.{kind}", Split.NONE)
        names[f"{encoder}.ln_post.{kind}"] = (f"vision_model.layernorm_post.{kind}", Split.NONE)
        block, layer = f"{encoder}.transformer.resblocks.N", "vision_model.model.layers.N"
        names[f"{block}.ln_1.{kind}"] = (f"{layer}.input_layernorm.{kind}", Split.NONE)
        names[f"{block}.ln_2.{kind}"] = (f"{layer}.post_attention_layernorm.{kind}", Split.NONE)
        for short in "qkv":
            names[f"{block}.attn.w{short}.{kind}"] = (f"{layer}.self_attn.{short}_proj.{kind}", Split.ROWS)
        names[f"{block}.mlp.c_fc.{kind}"] = (f"{layer}.mlp.fc1.{kind}", Split.ROWS)
        # The bias of a row-parallel layer is added after the sum over ranks: every rank has all of it.
        after = Split.COLUMNS if kind == "weight" else Split.NONE
        names[f"{block}.attn.wo.{kind}"] = (f"{layer}.self_attn.o_proj.{kind}", after)
        names[f"{block}.mlp.c_proj.{kind}"] = (f"{layer}.mlp.fc2.{kind}", after)
    return {meta: (Target(name=name, split=split),) for meta, (name, split) in names.items()}


_TARGETS = MappingProxyType({**_decoder(), **_decoder_layer(), **_vision()})


def _inverse(targets: Mapping[str, tuple[Target, ...]]) -> dict[str, tuple[tuple[str, Target], ...]]:
    """By Hugging Face name; the first spelling of each part counts."""
    found: dict[str, dict[Part, tuple[str, Target]]] = {}
    for meta, (target, *others) in targets.items():
        is_expert = target.split in {Split.EXPERT_COLUMNS, Split.EXPERT_ROWS}
        if not others and (is_expert or target.part is Part.WHOLE):
            found.setdefault(target.name, {}).setdefault(target.part, (meta, target))
    return {name: tuple(parts.values()) for name, parts in found.items()}


_SPELLINGS = MappingProxyType(_inverse(_TARGETS))
