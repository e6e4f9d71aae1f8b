"""Decisions about weights: defaults, roles, patterns, refusals; and the dry run on the real configurations."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import multimodal_config, text_config

from llama4_quant.architecture import Llama4Config, Role, linear_specs
from llama4_quant.conversion.dry_run import dry_run
from llama4_quant.errors import CheckpointError, ConfigError, SchemeError
from llama4_quant.planning.make import make_plan
from llama4_quant.planning.plan import Plan
from llama4_quant.scheme import preset

DATA = Path(__file__).parent.parent / "data"


def plan_for(raw: dict | None = None, scheme: str = "W4A16", **settings: object) -> Plan:
    if scheme == "W4A16":
        settings = {"group_size": 32, **settings}
    config = Llama4Config.from_dict(multimodal_config() if raw is None else raw)
    return make_plan(config, preset(scheme, **settings))


def quantized_roles(plan: Plan) -> set[Role]:
    return {decision.role for decision in plan.decisions if decision.scheme is not None}


def test_default_roles() -> None:
    plan = plan_for()
    assert quantized_roles(plan) == {Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.DENSE_MLP}
    for role in quantized_roles(plan):
        assert all(d.scheme is not None for d in plan.decisions if d.role is role)


@pytest.mark.parametrize("role", ["attention", "lm-head", "vision", "projector"])
def test_each_role_can_be_added(role: str) -> None:
    assert quantized_roles(plan_for(quantize=[role])) - quantized_roles(plan_for()) == {Role(role)}


def test_never_quantized() -> None:
    plan = plan_for(quantize=["attention", "lm-head", "vision", "projector"])
    kept = {d.role for d in plan.decisions if d.scheme is None}
    assert kept == {Role.EMBEDDING, Role.NORM, Role.ROUTER, Role.PATCH_EMBEDDING, Role.VISION_OTHER}
    assert all(d.reason.startswith("always BF16") for d in plan.decisions if d.scheme is None)


def test_ignore_list_is_exactly_the_kept_linears() -> None:
    plan = plan_for(quantize=["attention"], ignore=[r"re:.*layers\.1\.feed_forward\.experts"])
    quantized = {d.name for d in plan.decisions if d.scheme is not None}
    linears = {x.name for x in linear_specs(plan.config)}
    assert set(plan.ignore) == linears - quantized
    assert sum(".experts.2." in name for name in plan.ignore) == 3  # kept experts are stored, and named, one by one
    assert "language_model.model.layers.1.feed_forward.router" in plan.ignore


@pytest.mark.parametrize(
    ("pattern", "num"),
    [
        ("language_model.model.layers.0.feed_forward.gate_proj", 1),
        ("language_model.model.layers.0.feed_forward.gate_proj.weight", 1),
        (r"re:.*shared_expert", 6),
        (r"re:language_model\.model\.layers\.1\.feed_forward\.experts", 12),
    ],
)
def test_ignore_patterns(pattern: str, num: int) -> None:
    by_pattern = [d for d in plan_for(ignore=[pattern]).decisions if d.reason == f"--ignore {pattern}"]
    assert len(by_pattern) == num
    assert all(d.scheme is None for d in by_pattern)


@pytest.mark.parametrize("pattern", ["lm_head2", "re:.*expertz", "gate_proj"])
def test_pattern_that_matches_nothing(pattern: str) -> None:
    with pytest.raises(SchemeError, match="matches none of the model's"):
        plan_for(ignore=[pattern])


def test_close_names_are_offered() -> None:
    with pytest.raises(SchemeError, match=r"close names: .*layers\.0\.feed_forward\.gate_proj"):
        plan_for(ignore=["language_model.model.layers.0.feed_forward.gateproj"])


def test_bad_regular_expression() -> None:
    with pytest.raises(SchemeError, match="not a regular expression"):
        plan_for(ignore=["re:("])


@pytest.mark.parametrize("pattern", [r"re:.*experts\.\d+\.down_proj", r"re:.*layers\.1\..*experts\.2\."])
def test_experts_of_a_layer_stay_together(pattern: str) -> None:
    with pytest.raises(SchemeError, match=r"layers\.1\.feed_forward\.experts: the routed experts of a layer need one"):
        plan_for(ignore=[pattern])


def test_nothing_left() -> None:
    with pytest.raises(SchemeError, match="nothing is left to quantize"):
        plan_for(ignore=["re:.*feed_forward"])


def test_indivisible_group_says_what_to_do() -> None:
    with pytest.raises(SchemeError) as caught:
        plan_for(text_config(intermediate_size=96), group_size=64)
    message = str(caught.value)
    assert "down_proj: in_features 96 is not divisible by group size 64" in message
    assert "--group-size 32 or -1" in message
    assert "--ignore" in message


def test_unknown_scheme_role_and_group_size() -> None:
    with pytest.raises(SchemeError, match="unknown scheme 'W2A16'; known schemes: W4A16, FP8_DYNAMIC, FP8_BLOCK"):
        preset("W2A16")
    with pytest.raises(SchemeError, match="unknown role; known roles: attention, lm-head, vision, projector"):
        plan_for(quantize=["router"])
    with pytest.raises(SchemeError, match="group size 48 is not supported; use one of 32, 64, 128, -1"):
        preset("W4A16", group_size=48)
    with pytest.raises(SchemeError, match="--group-size is for W4A16"):
        preset("FP8_DYNAMIC", group_size=128)


@pytest.mark.parametrize("spelling", ["fp8_dynamic", "FP8-Dynamic", "fp8dynamic"])
def test_spellings_of_scheme_names(spelling: str) -> None:
    assert preset(spelling) == preset("FP8_DYNAMIC")


def test_role_that_the_model_lacks() -> None:
    with pytest.raises(SchemeError, match="--quantize vision: this model has no such weights"):
        plan_for(text_config(), quantize=["vision"])
    with pytest.raises(SchemeError, match="--quantize lm-head"):
        plan_for(text_config(tie_word_embeddings=True), quantize=["lm-head"])


def test_block_scheme_leaves_qkv_alone() -> None:
    """vLLM permutes rows of q and k; it fuses them with v, so all three need one scheme."""
    plan = plan_for(scheme="FP8_BLOCK", quantize=["attention"])
    attention = {d.name.rpartition(".")[2]: d.scheme for d in plan.decisions if d.role is Role.ATTENTION}
    assert [name for name, scheme in attention.items() if scheme is not None] == ["o_proj"]


def test_quantized_vision_is_noted() -> None:
    assert plan_for().notes == ()
    assert "vLLM does not" in plan_for(quantize=["vision"]).notes[0]


@pytest.mark.parametrize(
    ("ignore", "fused"),
    [
        ([r"re:.*layers\.0\..*\.gate_proj"], "layers.0.feed_forward.gate_up_proj"),
        ([r"re:.*shared_expert\.up_proj"], "layers.3.feed_forward.shared_expert.gate_up_proj"),
        ([r"re:.*layers\.2\..*k_proj"], "layers.2.self_attn.qkv_proj"),
    ],
)
def test_partly_quantized_fusions_are_noted(ignore: list[str], fused: str) -> None:
    """vLLM raises where the parts of its fused modules differ."""
    (note,) = plan_for(ignore=ignore, quantize=["attention"]).notes
    assert fused in note
    assert "vLLM does not" in note


@pytest.mark.parametrize("ignore", [r"re:.*down_proj$", r"re:.*(gate|up)_proj$", r"re:.*[qkv]_proj$"])
def test_whole_fusions_are_not_noted(ignore: str) -> None:
    config = multimodal_config(moe_layers=[])
    assert plan_for(config, ignore=[ignore], quantize=["attention"]).notes == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000, expected an integer from 1 to 1048576"),
        (
            {"hidden_size": 2**20, "intermediate_size_mlp": 2**20, "num_hidden_layers": 1024},
            r"sizes of a model of [\d,]+ weights",
        ),
        ({"hidden_size": 2**20, "vocab_size": 2**24}, r"a model of 35,\d{3},[\d,]+ weights; expected at most 8,796,"),
        ({"num_attention_heads": 2**19, "head_dim": 4}, "head_dim is 4, expected an integer from 1 to 2"),
    ],
)
def test_models_of_absurd_size_are_refused_before_they_are_planned(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_for(text_config(**changes))


@pytest.mark.parametrize(("make_config", "prefix"), [(text_config, ""), (multimodal_config, "language_model.")])
def test_tied_head_is_ignored(make_config: Callable[..., dict], prefix: str) -> None:
    """It is no weight of the checkpoint, but a Linear in transformers, which would look for its codes."""
    assert plan_for(make_config(tie_word_embeddings=True)).ignore[-1] == f"{prefix}lm_head"


@pytest.mark.parametrize("where", ["top", "text_config"])
def test_quantized_source_is_refused(where: str) -> None:
    raw = multimodal_config()
    (raw if where == "top" else raw["text_config"])["quantization_config"] = {"quant_method": "fbgemm_fp8"}
    with pytest.raises(CheckpointError, match=r"already quantized .*'fbgemm_fp8'"):
        plan_for(raw)


@pytest.mark.parametrize(
    ("name", "params", "gigabytes_in"), [("scout", 108_641_793_536, 217.28), ("maverick", 401_583_781_376, 803.17)]
)
def test_dry_run_of_the_real_models(name: str, params: int, gigabytes_in: float) -> None:
    report = dry_run(DATA / f"{name}.json", config_only=True)
    assert report.totals.num_weights == params
    assert round(report.totals.bytes_in / 1e9, 2) == gigabytes_in
    assert len(report.weights) == sum(role.count for role in report.roles)
    assert report.totals.bytes_out == sum(weight.bytes_out for weight in report.weights)
    # 4 bits of code and 16 bits of scale per 128 weights, and 16 bytes of shape per weight.
    experts = next(role for role in report.roles if role.role == "routed-expert")
    assert experts.bytes_out == experts.num_weights * (4 + 16 / 128) / 8 + 16 * experts.count
    json.dumps(report.to_json(), allow_nan=False)


def test_group_32_costs_half_a_bit() -> None:
    report = dry_run(DATA / "scout.json", config_only=True, scheme=preset("W4A16", group_size=32))
    assert report.totals.quantized_bits_per_weight == pytest.approx(4.5, abs=1e-4)
