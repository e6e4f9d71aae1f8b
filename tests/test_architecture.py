"""The list of weights equals transformers' own models, tensor by tensor, for the real configurations."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import Llama4Config as HfConfig
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration
from transformers import Llama4TextConfig as HfTextConfig

from llama4_quant.architecture import Llama4Config, Role, linear_specs, tensor_specs

DATA = Path(__file__).parent / "data"


def raw_config(name: str) -> dict:
    return json.loads((DATA / f"{name}.json").read_text())


def meta_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("name", "billions"), [("scout", 108.6), ("maverick", 401.6)])
def test_tensors_of_the_real_models(name: str, billions: float) -> None:
    raw = raw_config(name)
    specs = tensor_specs(Llama4Config.from_dict(raw))
    with torch.device("meta"):
        theirs = meta_shapes(Llama4ForConditionalGeneration(HfConfig.from_dict(raw)))
    assert {spec.name: spec.shape for spec in specs} == theirs
    assert len(specs) == len(theirs)
    assert round(sum(spec.num_weights for spec in specs) / 1e9, 1) == billions


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_bias": True}, {"interleave_moe_layer_step": 2}, {"moe_layers": []}, {"moe_layers": [0, 3]}],
)
def test_text_only_variants(changes: dict) -> None:
    raw = raw_config("scout")["text_config"] | {"num_hidden_layers": 4} | changes
    with torch.device("meta"):
        theirs = meta_shapes(Llama4ForCausalLM(HfTextConfig.from_dict(raw)))
    assert {spec.name: spec.shape for spec in tensor_specs(Llama4Config.from_dict(raw))} == theirs


def test_tied_head_is_not_stored() -> None:
    raw = raw_config("scout")["text_config"] | {"num_hidden_layers": 1, "tie_word_embeddings": True}
    names = {spec.name for spec in tensor_specs(Llama4Config.from_dict(raw))}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_linears_cover_their_sources_exactly_once() -> None:
    """Columns of fused experts are neither shared nor forgotten; every other linear is its whole source."""
    raw = copy.deepcopy(raw_config("maverick"))
    raw["text_config"] |= {"num_hidden_layers": 2, "num_local_experts": 4}
    for spec in tensor_specs(Llama4Config.from_dict(raw)):
        if len(spec.shape) != 3:
            assert all((x.out_features, x.in_features) == spec.shape for x in spec.linears)
            continue
        num_experts, in_features, out_columns = spec.shape
        for expert in range(num_experts):
            parts = [x for x in spec.linears if x.expert == expert]
            columns = [c for x in parts for c in range(x.out_start, x.out_start + x.out_features)]
            assert columns == list(range(out_columns))
            assert all(x.in_features == in_features and x.transposed and x.source == spec.name for x in parts)


def test_gate_is_the_first_half_of_gate_up() -> None:
    linears = {x.name: x for x in linear_specs(Llama4Config.from_dict(raw_config("scout")))}
    base = "language_model.model.layers.0.feed_forward.experts.3"
    assert linears[f"{base}.gate_proj"].out_start == 0
    assert linears[f"{base}.up_proj"].out_start == 8192
    assert linears[f"{base}.down_proj"].source.endswith("experts.down_proj")


def test_every_linear_module_of_transformers_is_listed() -> None:
    """`ignore` in quantization_config must name each module that is an nn.Linear there (the router is one)."""
    raw = raw_config("maverick")
    raw["text_config"]["num_hidden_layers"] = 2
    raw["vision_config"]["num_hidden_layers"] = 1
    with torch.device("meta"):
        model = Llama4ForConditionalGeneration(HfConfig.from_dict(raw))
    theirs = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    ours = {x.name for x in linear_specs(Llama4Config.from_dict(raw)) if x.role is not Role.ROUTED_EXPERT}
    assert ours == theirs
