"""Experts that see no token, three tokens, or half of them; and topping up the calibration set for them."""

import json
from pathlib import Path

import pytest
import torch
from calibrated_runs import calibrate, exact_matmul
from lopsided_model import NEVER, NUM_EXPERTS, POPULAR, RARE, draw_tokens, expert_of, make_lopsided, router_inputs
from resilience.resilience_tools import STAGING, contents

from llama4_quant.calibration.expert_survey import MAX_FACTOR, Survey
from llama4_quant.calibration.weights import Weights
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.report import Report
from llama4_quant.errors import OutputError
from llama4_quant.evaluation.measure import NamedModel, evaluate
from llama4_quant.runtime.loader import load
from llama4_quant.sample import SAMPLE_DIR
from llama4_quant.scheme import preset

SCHEME = preset("W4A16", group_size=32, quantize=["attention"])
HELD_OUT = [draw_tokens(64, 8, 1000 + number) for number in range(24)]


def write_samples(path: Path, samples: list[list[int]]) -> str:
    path.write_text("".join(json.dumps({"input_ids": sample}) + "\n" for sample in samples))
    return str(path)


def few_rare(path: Path) -> str:
    """512 tokens, of which three go to the rare expert."""
    return write_samples(path, [draw_tokens(64, 1 if number < 3 else 0, number) for number in range(8)])


def expert_errors(source: Path, out: Path) -> dict[tuple[int, int], float]:
    """|error| / |output| of each expert on its held-out rows, as the original model routes them, by (layer, expert)."""
    errors = {}
    for layer in range(2):
        x_TH = router_inputs(source, layer, HELD_OUT)
        exact, stored = (load(path, dtype="float32").model.layers[layer] for path in (source, out))
        # Equalized checkpoints have powers of two in the norm's gain, which the router's and experts' inputs share.
        gain_H = stored.post_attention_layernorm.weight / exact.post_attention_layernorm.weight
        with torch.inference_mode():
            logits_TE = exact.feed_forward.router(x_TH)
            for expert in range(NUM_EXPERTS):
                rows = torch.nonzero(logits_TE.argmax(dim=1) == expert).squeeze(1)
                if len(rows):
                    scored_RH = x_TH[rows] * logits_TE[rows, expert, None].sigmoid()
                    counts = torch.zeros(NUM_EXPERTS, dtype=torch.int64)
                    counts[expert] = len(rows)
                    expected = exact.feed_forward.experts(scored_RH, counts)
                    found = stored.feed_forward.experts(scored_RH * gain_H, counts)
                    errors[layer, expert] = float((found - expected).norm() / expected.norm())
    return errors


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lopsided_routing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Finite, reported, and better than RTN on rows that were not seen, for every expert that has data."""
    exact_matmul(monkeypatch)
    source, data = make_lopsided(tmp_path / "source", seed=seed), few_rare(tmp_path / "few.jsonl")
    convert(source, tmp_path / "rtn", scheme=SCHEME)
    rounded = expert_errors(source, tmp_path / "rtn")
    assert {expert for _, expert in rounded} == set(range(NUM_EXPERTS)) - {NEVER}
    for algorithm in ("gptq", "best"):
        out = tmp_path / algorithm
        report = calibrate(source, out, [data], algorithm=algorithm, scheme=SCHEME)
        check_report(report)
        found = expert_errors(source, out)
        for place, error in found.items():
            assert error < rounded[place] * (1 if place[1] == RARE else 0.75), (algorithm, place)
        never = load(out, dtype="float32").model.layers[0].feed_forward.experts.gate_proj.stored(NEVER)
        assert never["weight_packed"].ne(-2004318072).any()  # eight codes of zero


def check_report(report: Report) -> None:
    calibration = report.calibration
    assert calibration is not None
    for layer in calibration.layers:
        rows = layer.rows_per_expert
        assert rows[POPULAR] >= 0.45 * sum(rows)
        assert (rows[RARE], rows[NEVER]) == (3, 0)
        assert sum(rows) == 512
    notes = " ".join(calibration.notes)
    assert "No token was routed to 2 experts (layer 0 expert 2, layer 1 expert 2): rounded to nearest" in notes
    assert "Few tokens were routed to 2 experts (layer 0 expert 1: 3, layer 1 expert 1: 3)" in notes
    for weight in report.weights:
        record = weight.calibration
        if record is None or ".experts." not in weight.name:
            continue
        expert = int(weight.name.split(".experts.")[1].split(".")[0])
        if expert == NEVER:
            assert (record.method, record.num_rows, record.num_prior_rows) == ("rtn", 0, 0)
            assert record.note == "no token was routed here: rounded to nearest"
            assert record.rounding_error is record.output_error is record.damp_percent is None
        else:
            assert record.num_prior_rows == 256
            assert record.note.startswith("few tokens for so many inputs")
            assert record.damp_percent is not None
            assert record.damp_percent > (1 if expert == RARE else 0)
            assert record.output_error is not None
            assert record.output_error < record.rounding_error


def test_few_samples_of_real_text(tmp_path: Path) -> None:
    """4 samples of 128 tokens: every algorithm still beats rounding to nearest on the sample model.

    `python -m pytest -s` prints the figures of docs/calibration.md.
    """
    scheme = preset("W4A16", group_size=64, quantize=["attention"])
    windows = torch.tensor(sample_windows())
    reference = NamedModel(name="bf16", logits=load(SAMPLE_DIR))
    divergences = {}
    for algorithm in ("rtn", "gptq", "best"):
        out = tmp_path / algorithm
        if algorithm == "rtn":
            convert(SAMPLE_DIR, out, scheme=scheme)
        else:
            calibrate(SAMPLE_DIR, out, [], algorithm=algorithm, scheme=scheme, num_samples=4, max_seq_length=128)
        result = evaluate(NamedModel(name=algorithm, logits=load(out)), windows, reference=reference, batch_size=8)
        assert result.comparison is not None
        divergences[algorithm] = result.comparison.divergence.value
        print(algorithm, f"KL {divergences[algorithm]:.5f}")
    assert divergences["gptq"] < 0.85 * divergences["rtn"]
    assert divergences["best"] < 0.85 * divergences["rtn"]


def sample_windows() -> list[list[int]]:
    """The first windows of the sample's held-out text."""
    from llama4_quant.evaluation.windows import token_windows  # noqa: PLC0415 - needed here alone
    from llama4_quant.runtime.tokenizer import Tokenizer  # noqa: PLC0415

    tokenizer = Tokenizer.from_folder(SAMPLE_DIR)
    text = (SAMPLE_DIR.parent / "held_out.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, bos=False)
    windows = token_windows(ids, seq_length=256, num_windows=24, bos_token_id=tokenizer.bos_token_id)
    return windows.tolist()


def topped_up(tmp_path: Path, wanted: int, *, name: str = "out", **settings: object) -> Report:
    source = tmp_path / "source"
    if not source.exists():
        make_lopsided(source)
    # The calibration set has three rare tokens; then samples without any, and some with one or two.
    counts = [1, 1, 1, 0, 0, 2, 0, 1, 0, 0, 2, 0, 2, 0, 1, 0, 2, 2, 2, 2]
    data = write_samples(tmp_path / "data.jsonl", [draw_tokens(64, count, n) for n, count in enumerate(counts)])
    return calibrate(
        source, tmp_path / name, [data], scheme=SCHEME, num_samples=4, min_tokens_per_expert=wanted, **settings
    )


def test_samples_are_added_until_experts_have_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of samples 4 to 15 those with rare tokens, in order, until there are eight: 5, 7, 10."""
    exact_matmul(monkeypatch)
    chosen = []
    choose = Survey.choose

    def watched(self: Survey, *arguments: object) -> object:
        chosen.append(choose(self, *arguments))
        return chosen[-1]

    monkeypatch.setattr(Survey, "choose", watched)
    # Expert 2 never has tokens, so that everything that may be looked at is.
    report = topped_up(tmp_path, 8)
    numbers = chosen[0][0].numbers
    assert numbers == (0, 1, 2, 3, 5, 7, 10)
    calibration = report.calibration
    assert calibration is not None
    assert (calibration.num_samples, calibration.num_tokens) == (7, 7 * 64)
    assert all(layer.rows_per_expert[RARE] >= 7 for layer in calibration.layers)  # the quantized model routes its way
    (note,) = [note for note in calibration.notes if "(--min-tokens-per-expert)" in note]
    assert note == (
        "2 of 12 experts have fewer than 8 tokens (--min-tokens-per-expert), the least layer 0 expert 2 with 0: "
        "3 of 12 further samples were added to the 4 asked for, and at most 4 times as many are looked at."
    )
    assert max(numbers) < MAX_FACTOR * 4
    assert not (tmp_path / "out" / STAGING).exists()


def test_enough_tokens_at_once(tmp_path: Path) -> None:
    """One token for every expert: only the expert that never has any is missed, so all is looked at, none is kept."""
    report = topped_up(tmp_path, 1)
    assert report.calibration is not None
    assert report.calibration.num_samples == 4
    assert any("0 of 12 further samples were added to the 4 asked for" in note for note in report.calibration.notes)


def test_the_data_may_end(tmp_path: Path) -> None:
    source = make_lopsided(tmp_path / "source")
    data = write_samples(tmp_path / "data.jsonl", [draw_tokens(64, 1, number) for number in range(5)])
    report = calibrate(source, tmp_path / "out", [data], scheme=SCHEME, num_samples=4, min_tokens_per_expert=9)
    assert report.calibration is not None
    assert report.calibration.num_samples == 5
    assert any(note.endswith("1 of 1 further samples were added to the 4 asked for, and the data ends there.")
               for note in report.calibration.notes)  # fmt: skip


def test_a_resumed_conversion_keeps_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topped_up(tmp_path, 8, name="reference")
    quantize, count = Weights.quantize, 0

    def stops(self: Weights, *arguments: object) -> object:
        nonlocal count
        count += 1
        if count in {3, 9}:
            raise KeyboardInterrupt
        return quantize(self, *arguments)

    monkeypatch.setattr(Weights, "quantize", stops)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            topped_up(tmp_path, 8)
        chosen = json.loads((tmp_path / "out" / STAGING / "calibration" / "samples.json").read_text())
        assert chosen["numbers"] == [0, 1, 2, 3, 5, 7, 10]
        assert not list((tmp_path / "out" / STAGING / "calibration").glob("survey*"))
    with pytest.raises(OutputError, match="calibration min_tokens_per_expert was 8, is 9"):
        topped_up(tmp_path, 9)
    monkeypatch.setattr(Survey, "_choose", None)  # not asked again
    topped_up(tmp_path, 8)
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


def test_an_interrupted_survey_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = topped_up(tmp_path, 8, name="reference").calibration
    done = []

    def progress(what: str, num_bytes: int) -> None:
        done.append(what)
        if num_bytes == 0 and "layers.1." in what and len(done) > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        topped_up(tmp_path, 8, progress=progress)
    assert list((tmp_path / "out" / STAGING / "calibration").glob("survey-*/state.json"))
    assert topped_up(tmp_path, 8).calibration == expected
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


def test_the_tokens_decide_the_expert() -> None:
    """Of the construction itself: half go to one expert, none to another."""
    tokens = [token for sample in HELD_OUT for token in sample]
    shares = [sum(expert_of(token) == expert for token in tokens) / len(tokens) for expert in range(NUM_EXPERTS)]
    assert shares[POPULAR] == 0.5
    assert shares[NEVER] == 0
    assert shares[RARE] == 0.125
