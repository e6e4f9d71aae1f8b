"""What weights are fitted to: sums over exactly the rows that they see at inference, scores included."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_runs import (
    LENGTHS,
    calibrate,
    collect_moments,
    exact_matmul,
    read_tokens,
    relative,
    tiny_checkpoint,
    token_data,
)
from corpus_files import write_image, write_lines
from torch import Tensor
from torch.testing import assert_close

from llama4_quant.calibration.embed import write_embeddings
from llama4_quant.calibration.hessian import Moments
from llama4_quant.calibration.routing import ENOUGH_ROWS, MAX_PRIOR_ROWS, PRIOR_STRENGTH, route
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.runtime.experts import MixtureOfExperts
from llama4_quant.runtime.linear import WeightStorage
from llama4_quant.runtime.loader import load
from llama4_quant.sample import SAMPLE_DIR
from llama4_quant.scheme import preset

ROUNDING = 1e-5  # of sums of some hundred float32 products, over four layers


def inputs_of_linears(checkpoint: Path, tokens: list[list[int]]) -> dict[str, Tensor]:
    """What every linear weight of our runtime's model gets, by name; of expert stacks, rows of each expert."""
    model = load(checkpoint, dtype="float32")
    rows: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            if len(inputs) == 1:
                rows.setdefault(name, []).append(inputs[0].flatten(0, -2))
                return
            for expert, part in enumerate(inputs[0].split(inputs[1].tolist())):
                experts, _, projection = name.rpartition(".")
                rows.setdefault(f"{experts}.{expert}.{projection}", []).append(part)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, WeightStorage):
            module.register_forward_hook(note(name))
    with torch.inference_mode():
        for ids in tokens:
            model(torch.tensor([ids]))
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("experts_per_token", [1, 2])
def test_sums_are_those_of_a_dense_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts_per_token: int
) -> None:
    """gram = X^T X of the runtime's own inputs, weighted where errors reach the residual; T*k rows in all."""
    monkeypatch.setattr("llama4_quant.calibration.routing.ENOUGH_ROWS", 0)  # no prior
    source = tiny_checkpoint(tmp_path / "source", num_experts_per_tok=experts_per_token)
    data = token_data(tmp_path / "tokens.jsonl")
    seen = collect_moments(monkeypatch)
    report = calibrate(source, tmp_path / "out", [data], scheme=preset("W4A16", group_size=32, quantize=["attention"]))
    inputs = inputs_of_linears(tmp_path / "out", read_tokens(data))
    num_tokens, config = sum(LENGTHS), report.calibration
    assert config is not None
    unweighted = 0
    for name, (moments, num_prior) in seen.items():
        x = inputs[name]
        assert (moments.num_rows, num_prior) == (len(x), 0), name
        if name.endswith(("o_proj", "down_proj")):
            continue
        unweighted += 1
        assert relative(moments.gram, x.T @ x) < ROUNDING if len(x) else not moments.gram.any(), name
    assert unweighted == 4 * 3 + 2 * 2 + 2 * (4 + 1) * 2
    for layer in (1, 3):
        experts = [seen[f"model.layers.{layer}.feed_forward.experts.{expert}.down_proj"][0] for expert in range(4)]
        assert sum(moments.num_rows for moments in experts) == num_tokens * experts_per_token
        assert config.layers[layer].rows_per_expert == tuple(moments.num_rows for moments in experts)
        assert config.layers[layer - 1].rows_per_expert == ()
    check_weighted(seen, source, tmp_path / "out", read_tokens(data), experts_per_token)


def check_weighted(
    seen: dict[str, tuple[Moments, int]], source: Path, out: Path, tokens: list[list[int]], experts_per_token: int
) -> None:
    """o_proj of layer 1, whose rows count by the size of the residual before it, and the drifts of both streams."""
    name = "model.layers.1.self_attn.o_proj"
    moments = seen[name][0]
    before = [residual_before(checkpoint, 1, tokens) for checkpoint in (out, source)]
    weight = 1 / (before[1].square().mean(dim=-1, keepdim=True) + 1e-5)
    quantized, original = (inputs_of_linears(checkpoint, tokens)[name] for checkpoint in (out, source))
    assert relative(moments.gram, (weight * quantized).T @ quantized) < ROUNDING
    # Differences of nearly equal numbers lose digits: the drift is some hundredths of what it is the difference of.
    assert relative(moments.input_drift, (original - quantized).T @ (weight * quantized)) < 100 * ROUNDING
    assert relative(moments.output_drift, (before[1] - before[0]).T @ (weight * quantized)) < 100 * ROUNDING
    assert experts_per_token in {1, 2}


def residual_before(checkpoint: Path, layer: int, tokens: list[list[int]]) -> Tensor:
    model = load(checkpoint, dtype="float32")
    states: list[Tensor] = []
    model.model.layers[layer].register_forward_pre_hook(lambda _module, inputs: states.append(inputs[0][0]))
    with torch.inference_mode():
        for ids in tokens:
            model(torch.tensor([ids]))
    return torch.cat(states)


def test_experts_see_scored_rows_and_the_prior(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With few tokens every expert gets prior rows, which count little and are not counted as its own."""
    source = tiny_checkpoint(tmp_path / "source")
    data = token_data(tmp_path / "tokens.jsonl")
    seen = collect_moments(monkeypatch)
    calibrate(source, tmp_path / "out", [data], scheme=preset("W4A16", group_size=32))
    moe: MixtureOfExperts = load(tmp_path / "out", dtype="float32").model.layers[1].feed_forward
    tokens = read_tokens(data)
    x_TH = inputs_of_linears(tmp_path / "out", tokens)["model.layers.1.feed_forward.router"]
    own = inputs_of_linears(tmp_path / "out", tokens)
    scores_TE = moe.router(x_TH).sigmoid()
    num_tokens = len(x_TH)
    num_prior = min(num_tokens, 256)
    prior_T = torch.arange(num_prior) * num_tokens // num_prior
    for expert in range(4):
        name = f"model.layers.1.feed_forward.experts.{expert}.gate_proj"
        moments, counted = seen[name]
        assert counted == (num_prior if moments.num_rows else 0)
        rows = x_TH[prior_T] * scores_TE[prior_T, expert, None]
        strength = PRIOR_STRENGTH * 128 / num_prior
        expected = own[name].T @ own[name] + (strength * rows.T @ rows if moments.num_rows else 0)
        assert relative(moments.gram, expected) < ROUNDING


def random_logits(num_tokens: int, num_experts: int, seed: int) -> Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("experts_per_token", [1, 2])
@pytest.mark.parametrize("chunk", [7, 100, 1000])
def test_routing_by_chunks(experts_per_token: int, chunk: int) -> None:
    quantized, original = random_logits(500, 6, 0), random_logits(500, 6, 0) + 0.3 * random_logits(500, 6, 1)
    quantized[:, 4] = -50  # never routed

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, 500, chunk):
            yield quantized[start : start + chunk], original[start : start + chunk]

    routing = route(chunks(), 500, experts_per_token=experts_per_token, width=16)
    assert routing.rows_per_expert[4] == 0
    assert sum(routing.rows_per_expert) == 500 * experts_per_token
    chosen = quantized.topk(experts_per_token).indices
    other = original.topk(experts_per_token).indices
    for expert in range(6):
        rows = routing.of(expert)
        own = torch.nonzero((chosen == expert).any(dim=1)).squeeze(1)
        assert torch.equal(rows.quantized_tokens, own)
        assert_close(rows.quantized_own, quantized[own, expert].sigmoid())
        assert_close(rows.original_scores[: len(own)], original[own, expert].sigmoid())
        there = torch.nonzero((other == expert).any(dim=1)).squeeze(1)
        assert torch.equal(rows.original_tokens, there)
        assert_close(rows.original_own, original[there, expert].sigmoid())
        has_prior = 0 < len(own) < ENOUGH_ROWS * 16
        assert rows.total_prior == (min(500, MAX_PRIOR_ROWS, 32) if has_prior else 0)
        prior = rows.fitted[rows.num_own :]
        assert_close(rows.quantized_scores[rows.num_own :], quantized[prior, expert].sigmoid())
        assert_close(rows.original_scores[rows.num_own :], original[prior, expert].sigmoid())
        assert float(rows.weights[rows.num_own :].sum()) == pytest.approx(PRIOR_STRENGTH * 16 * has_prior)
        assert rows.weights[: rows.num_own].eq(1).all()
        parts = [slice(start, min(start + 9, len(rows.fitted))) for start in range(0, len(rows.fitted), 9)]
        assert sum(rows.num_prior(part) for part in parts) == rows.total_prior
    expected = (chosen.sort(1).values != other.sort(1).values).any(dim=1).double().mean()
    assert routing.rerouted == pytest.approx(float(expected))


def test_routing_of_one_model() -> None:
    logits = random_logits(40, 4, 0)
    routing = route([(logits, logits)], 40, experts_per_token=1, width=8)
    assert routing.rerouted is None
    rows = routing.of(2)
    assert torch.equal(rows.quantized_tokens, rows.original_tokens)
    assert torch.equal(rows.quantized_own, rows.original_own)


def test_image_features_of_each_model_flow_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantized stream begins with features of the quantized vision tower, the original one with the source's."""
    name = write_image(tmp_path / "a.png", 3)
    records = [{"text": "<|image|>What is this?", "images": [name]}, {"text": "<|image|>And this?", "images": [name]}]
    data = write_lines(tmp_path / "pairs.jsonl", records)
    streams: dict[str, Tensor] = {}
    samples: list[Any] = []

    def watched(opened: Any, draw: Any, *others: Any) -> None:
        write_embeddings(opened, draw, *others)
        whole = slice(0, opened.quantized.num_rows)
        streams.update({name: getattr(opened, name).read(whole).clone() for name in ("quantized", "original")})
        samples.extend(draw())

    monkeypatch.setattr("llama4_quant.calibration.run.write_embeddings", watched)
    exact_matmul(monkeypatch)
    scheme = preset("FP8_DYNAMIC", quantize=["vision", "projector"])
    report = calibrate(SAMPLE_DIR, tmp_path / "out", [data], scheme=scheme, max_seq_length=600, num_samples=2)
    assert report.calibration is not None
    assert report.calibration.num_samples == 2
    for side, checkpoint in (("quantized", tmp_path / "out"), ("original", SAMPLE_DIR)):
        model = load(checkpoint, kernel="reference")  # bf16, as images are always computed
        with torch.inference_mode():
            expected = [
                model._place_images(s.input_ids[None], s.pixel_values)
                .put_into(model.model.embed_tokens(s.input_ids[None]))[0]
                .float()
                for s in samples
            ]
        assert torch.equal(streams[side], torch.cat(expected)), side
    assert relative(streams["quantized"], streams["original"]) > 1e-3


def test_an_experts_weights_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gate and up are one slice of a fused tensor: read once by the equalization, and once by the pass."""
    source, reads = tiny_checkpoint(tmp_path / "source"), Counter[tuple[str, int]]()
    read_slice = CheckpointReader.read_slice

    def counted(self: CheckpointReader, name: str, expert: int, *others: Any) -> Tensor:
        reads[name, expert] += 1
        return read_slice(self, name, expert, *others)

    monkeypatch.setattr(CheckpointReader, "read_slice", counted)
    calibrate(source, tmp_path / "out", [token_data(tmp_path / "tokens.jsonl")], scheme=preset("W4A16", group_size=32))
    assert len(reads) == 2 * 4 * 2
    assert set(reads.values()) == {2}
