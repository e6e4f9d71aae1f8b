"""Standard errors, JSON and the table."""

import json
import math

import numpy as np
import pytest
from rich.console import Console

from llama4_quant.evaluation import Comparison, Estimate, EvaluationResult, render


def _result(loss: Estimate, comparison: Comparison | None = None) -> EvaluationResult:
    return EvaluationResult(
        model="w4a16",
        num_windows=3,
        seq_length=100,
        num_tokens=297,
        loss=loss,
        perplexity=loss.exp(),
        comparison=comparison,
        seconds=1.5,
    )


def _text(result: EvaluationResult) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(render(result))
    return console.export_text()


def test_standard_error_of_a_mean() -> None:
    values = [2.0, 3.5, 1.25, 7.0]
    estimate = Estimate.of(values)
    assert estimate.value == np.mean(values)
    assert estimate.standard_error == pytest.approx(np.std(values, ddof=1) / np.sqrt(4), rel=1e-14)


def test_delta_method() -> None:
    """e^x has derivative e^x: at x = ln 10 an error of 0.02 becomes 0.2."""
    estimate = Estimate(value=math.log(10), standard_error=0.02).exp()
    assert estimate.value == pytest.approx(10, rel=1e-14)
    assert estimate.standard_error == pytest.approx(0.2, rel=1e-14)


def test_a_hopeless_model_overflows_to_infinity_and_null() -> None:
    result = _result(Estimate(value=1e4, standard_error=1.0))
    assert result.perplexity.value == math.inf
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["perplexity"] == {"value": None, "standard_error": None}
    assert data["loss"]["value"] == 1e4


def test_json_round_trip() -> None:
    comparison = Comparison(
        reference="bf16",
        reference_perplexity=Estimate(value=9.0, standard_error=0.5),
        loss_increase=Estimate(value=0.1, standard_error=0.01),
        divergence=Estimate(value=0.03, standard_error=0.001),
        agreement=Estimate(value=0.95, standard_error=None),
    )
    data = json.loads(json.dumps(_result(Estimate(value=2.0, standard_error=None), comparison).to_json()))
    assert data["num_tokens"] == 297
    assert data["loss"] == {"value": 2.0, "standard_error": None}
    assert data["comparison"]["divergence"] == {"value": 0.03, "standard_error": 0.001}
    assert data["comparison"]["agreement"] == {"value": 0.95, "standard_error": None}
    assert data["comparison"]["reference"] == "bf16"


def test_table_without_reference_and_with_one_window() -> None:
    text = _text(_result(Estimate(value=math.log(12.5), standard_error=None)))
    assert "297 tokens in 3 windows" in text
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:4]]
        for line in text.splitlines()
        if "│" in line
    }
    assert rows == {"perplexity": ["12.5000", "n/a"], "loss (nats/token)": ["2.52573", "n/a"]}


def test_table_with_reference() -> None:
    half = Estimate(value=0.5, standard_error=0.25)
    comparison = Comparison(
        reference="bf16", reference_perplexity=half, loss_increase=half, divergence=half, agreement=half
    )
    text = _text(_result(Estimate(value=0.0, standard_error=0.125), comparison))
    for name in ("perplexity of bf16", "loss increase", "KL to reference", "top-1 agreement"):
        assert name in text
    assert "0.500000" in text
    assert "0.250000" in text
