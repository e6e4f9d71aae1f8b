"""The hidden states that the pass ends with are those of the models: the quantized checkpoint's and the source's."""

from pathlib import Path
from typing import Any

import pytest
from calibrated_runs import (
    LENGTHS,
    calibrate_and_look,
    hidden_states,
    read_tokens,
    relative,
    tiny_checkpoint,
    token_data,
)

from llama4_quant.scheme import preset

# Sums of a few hundred float32 products, in another order: relative 2^-24 each, four layers deep.
ROUNDING = 2e-6
# An activation on the border of two FP8 codes falls to either side; a few of some 100,000 do, each off by 2^-4 at most.
FP8_BORDERS = 6e-3


@pytest.mark.parametrize(
    ("scheme", "bound"),
    [
        (preset("W4A16", group_size=32, quantize=["attention"]), ROUNDING),
        (preset("W4A16", group_size=-1), ROUNDING),
        (preset("W4A16", group_size=64, ignore=["re:.*layers.1.self_attn.q_proj", "model.layers.2.self_attn.o_proj",
                                                "re:.*shared_expert.gate_proj", "re:.*layers.0.*up_proj"],
                quantize=["attention"]), ROUNDING),
        (preset("FP8_DYNAMIC", quantize=["attention"]), FP8_BORDERS),
        (preset("FP8_DYNAMIC", quantize=["attention"], ignore=["re:.*layers.1.*(q|o)_proj", "re:.*layers.0.*up_proj"]),
         FP8_BORDERS),
        (preset("FP8_BLOCK"), FP8_BORDERS),
    ],
    ids=lambda value: value.label if hasattr(value, "label") else "",
)  # fmt: skip
@pytest.mark.parametrize("algorithm", ["gptq", "best"])
def test_every_scheme(tmp_path: Path, algorithm: str, scheme: Any, bound: float) -> None:
    check(tmp_path, algorithm, scheme, bound)


@pytest.mark.parametrize(
    "config",
    [
        {"num_experts_per_tok": 2},
        {"attention_bias": True},
        {"interleave_moe_layer_step": 1, "attention_chunk_size": 16},
        {"no_rope_layers": [0, 1, 0, 1], "attn_temperature_tuning": True, "attention_chunk_size": 5},
        {"no_rope_layers": [0, 0, 1, 1], "attn_temperature_tuning": False, "use_qk_norm": False},
        {"moe_layers": [], "num_local_experts": 1},
        {"tie_word_embeddings": True, "num_local_experts": 16},
    ],
    ids=str,
)
def test_every_kind_of_layer(tmp_path: Path, config: dict[str, Any]) -> None:
    check(tmp_path, "best", preset("W4A16", group_size=32, quantize=["attention"]), ROUNDING, **config)


def check(tmp_path: Path, algorithm: str, scheme: Any, bound: float, **config: Any) -> None:
    source = tiny_checkpoint(tmp_path / "source", **config)
    data = token_data(tmp_path / "tokens.jsonl")
    seen = calibrate_and_look(source, tmp_path / "out", [data], algorithm=algorithm, scheme=scheme)
    tokens = read_tokens(data)
    expected = hidden_states(tmp_path / "out", tokens)
    assert seen.quantized.shape == expected.shape == (sum(LENGTHS), 128)
    assert relative(seen.quantized, expected) < bound
    exact = hidden_states(source, tokens)
    if algorithm == "best":
        assert seen.original is not None
        assert relative(seen.original, exact) < ROUNDING
        last = seen.report.calibration.layers[-1]
        assert last.relative_error == pytest.approx(relative(expected, exact), rel=0.02)
    else:
        assert seen.original is None
    # What was compared differs by far more than what is allowed, so that a mix-up would show.
    assert relative(expected, exact) > 4 * bound
