"""lm_head under calibration: fitted to the normed last hidden states, some rows at a time."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_runs import (
    LENGTHS,
    calibrate,
    collect_moments,
    hidden_states,
    read_tokens,
    relative,
    tiny_checkpoint,
    token_data,
)
from resilience.resilience_tools import contents, interrupt, stop_in
from torch import Tensor
from torch.nn import functional

from llama4_quant import work
from llama4_quant.calibration.solve import Solver
from llama4_quant.calibration.weights import Weights
from llama4_quant.conversion.report import Report
from llama4_quant.runtime.loader import load
from llama4_quant.scheme import Scheme, preset
from llama4_quant.verification.verify import verify

ROUNDING = 1e-5  # of sums of some hundred float32 products, over two layers
VOCABULARY = 300
SCHEME = preset("W4A16", group_size=32, quantize=["lm-head"])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "source", vocab_size=VOCABULARY, num_hidden_layers=2)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return token_data(tmp_path / "tokens.jsonl")


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work items of 128 rows: 128, 128 and 44."""
    monkeypatch.setattr(work, "tensor_items", partial(work.tensor_items, chunk_bytes=2**15))


def normed(checkpoint: Path, data: str) -> Tensor:
    """What lm_head gets in our runtime, for all tokens."""
    gain = load(checkpoint, dtype="float32").model.norm.weight
    return functional.rms_norm(hidden_states(checkpoint, read_tokens(data)), gain.shape, gain, 1e-5)


@pytest.mark.parametrize("algorithm", ["gptq", "best"])
def test_sums_are_those_of_the_runtime(
    source: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    """gram = X^T X of the quantized model's last states, normed; with two streams also how far they have moved."""
    seen = collect_moments(monkeypatch)
    report = calibrate(source, tmp_path / "out", [data], algorithm=algorithm, scheme=SCHEME)
    moments = seen["lm_head"][0]
    x, exact = normed(tmp_path / "out", data), normed(source, data)
    assert moments.num_rows == len(x) == sum(LENGTHS)
    assert relative(moments.gram, x.T @ x) < ROUNDING
    assert moments.output_drift is None
    if algorithm == "gptq":
        assert moments.input_drift is None
    else:
        # Differences of nearly equal numbers lose digits: the drift is some hundredths of what it is the difference of.
        assert relative(moments.input_drift, (exact - x).T @ x) < 100 * ROUNDING
    record = record_of(report)
    assert (record["method"], record["num_rows"], record["num_prior_rows"]) == (algorithm, len(x), 0)
    assert record["output_error"] < record["rounding_error"]


def record_of(report: Report) -> Any:
    (weight,) = [weight for weight in report.to_json()["weights"] if weight["name"] == "lm_head"]
    return weight["calibration"]


def logits_error(source: Path, out: Path, data: str) -> float:
    """Of the head's logits, on what the head gets, against the original model's logits."""
    head, exact = (load(folder, dtype="float32") for folder in (out, source))
    with torch.inference_mode():
        return relative(head.lm_head(normed(out, data)), exact.lm_head(normed(source, data)))


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
@pytest.mark.parametrize("algorithm", ["gptq", "best"])
def test_the_logits_are_better_than_with_a_rounded_head(
    source: Path, data: str, tmp_path: Path, algorithm: str, scheme: str
) -> None:
    """Everything else the same; the original logits are what counts."""
    chosen = preset(scheme, quantize=["lm-head"])
    calibrate(source, tmp_path / "out", [data], algorithm=algorithm, scheme=chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "quantize_rows", rounded_rows)
        calibrate(source, tmp_path / "rounded", [data], algorithm=algorithm, scheme=chosen)
    found = logits_error(source, tmp_path / "out", data)
    assert found < logits_error(source, tmp_path / "rounded", data)


def rounded_rows(self: Weights, name: str, _moments: object) -> Any:
    """As `quantize_rows`, by rounding to nearest."""
    for item in self._items_of([name]):
        packed = self._backend.quantize(self.original(name), self._decisions[name].scheme)
        self._record([item], self._write(name, packed), [])
        yield item.num_bytes


@pytest.mark.parametrize("scheme", [SCHEME, preset("FP8_BLOCK", quantize=["lm-head"])], ids=lambda s: s.label)
@pytest.mark.usefixtures("in_parts")
def test_parts_together_are_the_whole(
    source: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Scheme
) -> None:
    """The same codes as in one part, three solves, and one record with the errors of all outputs."""
    solve, parts = Solver.solve, []

    def watched(self: Solver, weight: Tensor, *arguments: Any) -> Any:
        if len(weight) in {128, 44} and weight.shape[1] == 128 and self.moments.num_rows == sum(LENGTHS):
            parts.append(weight)
        return solve(self, weight, *arguments)

    monkeypatch.setattr(Solver, "solve", watched)
    report = calibrate(source, tmp_path / "parts", [data], algorithm="gptq", scheme=scheme)
    assert [len(part) for part in parts[-3:]] == [128, 128, 44]
    monkeypatch.undo()
    whole = calibrate(source, tmp_path / "whole", [data], algorithm="gptq", scheme=scheme)
    assert weights_of(tmp_path / "parts").keys() == weights_of(tmp_path / "whole").keys()
    for name, tensor in weights_of(tmp_path / "whole").items():
        assert torch.equal(weights_of(tmp_path / "parts")[name], tensor), name
    assert not verify(tmp_path / "parts", source=source).problems
    found, expected = record_of(report), record_of(whole)
    for key in ("rounding_error", "output_error", "squared_outputs"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5), key  # float32 products summed in another order
    assert {key: found[key] for key in ("num_rows", "num_rounded", "damp_percent", "method")} == {
        key: expected[key] for key in ("num_rows", "num_rounded", "damp_percent", "method")
    }


def weights_of(out: Path) -> dict[str, Tensor]:
    return {name: value.view(torch.uint8) for name, value in load(out).lm_head.named_parameters()}


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_it_goes_on_at_the_part(source: Path, data: str, tmp_path: Path, after: int) -> None:
    """Interrupted within the head: the layers are not run again, and what is solved is not solved again."""
    calibrate(source, tmp_path / "reference", [data], scheme=SCHEME)
    out, num_others = tmp_path / "out", 3 + 3 + 4 * 3  # of the layers: a dense MLP, and an MoE
    with pytest.MonkeyPatch.context() as patch:
        name, number = ("_solve", num_others + after + 1) if after < 3 else ("sync", 3)
        stop_in(patch, Weights, name, number, interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrate(source, out, [data], scheme=SCHEME)
    solved: list[tuple[str, int]] = []
    solve = Weights._solve

    def watched(self: Weights, name: str, rows: Tensor, *arguments: Any) -> Any:
        solved.append((name, len(rows)))
        return solve(self, name, rows, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "_solve", watched)
        report = calibrate(source, out, [data], scheme=SCHEME, resume="required")
    assert solved == [("lm_head", length) for length in (128, 128, 44)[after:]]
    assert contents(out) == contents(tmp_path / "reference")
    assert record_of(report)["num_rows"] == sum(LENGTHS)


def test_a_tied_head_is_left_alone(data: str, tmp_path: Path) -> None:
    """It has no weight of its own."""
    source = tiny_checkpoint(tmp_path / "source", tie_word_embeddings=True)
    report = calibrate(source, tmp_path / "out", [data], scheme=preset("W4A16", group_size=32))
    assert not any(weight.role == "lm-head" for weight in report.weights)
