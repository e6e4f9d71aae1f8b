"""Which tokens can be chosen and how often, against distributions worked out by hand or in NumPy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama4_quant.errors import ConfigError, Llama4QuantError, UsageError
from llama4_quant.runtime.sampling import GenerationSettings, probabilities, select_tokens

P = torch.tensor([[0.1, 0.4, 0.2, 0.3]])


def _probabilities(**settings: float) -> torch.Tensor:
    return probabilities(P.log(), GenerationSettings(**{"temperature": 1.0, **settings}))


def test_plain() -> None:
    torch.testing.assert_close(_probabilities(), P)


def test_temperature() -> None:
    """softmax(log p / T) = p^(1/T), normalised."""
    torch.testing.assert_close(_probabilities(temperature=0.5), P**2 / (P**2).sum())


def test_top_k() -> None:
    torch.testing.assert_close(_probabilities(top_k=2), torch.tensor([[0, 0.4, 0, 0.3]]) / 0.7)
    torch.testing.assert_close(_probabilities(top_k=99), P)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.89, 3), (0.91, 4)]
)
def test_top_p(top_p: float, kept: int) -> None:
    by_rank = torch.tensor([[0.0, 0.4, 0.2, 0.3]]) if kept == 3 else P.clone()
    if kept == 2:
        by_rank = torch.tensor([[0, 0.4, 0, 0.3]])
    if kept == 1:
        by_rank = torch.tensor([[0, 0.4, 0, 0]])
    torch.testing.assert_close(_probabilities(top_p=top_p), by_rank / by_rank.sum())


def test_top_p_counts_after_top_k() -> None:
    """Of the best three, 0.4/0.9 = 0.44 and 0.7/0.9 = 0.78: at 0.75 two stay, of all four it would be three."""
    torch.testing.assert_close(_probabilities(top_k=3, top_p=0.75), torch.tensor([[0, 0.4, 0, 0.3]]) / 0.7)


@pytest.mark.parametrize("temperature", [1e-30, 1e-4])
def test_cold_is_greedy_and_finite(temperature: float) -> None:
    logits = torch.tensor([[3e4, -3e4, 3e4 - 512]], dtype=torch.bfloat16)
    expected = torch.tensor([[1.0, 0.0, 0.0]])
    assert torch.equal(probabilities(logits, GenerationSettings(temperature=temperature)), expected)


@given(st.integers(0, 2**32), st.integers(1, 9), st.floats(0.05, 1.0), st.floats(0.1, 5.0))
def test_against_numpy(seed: int, top_k: int, top_p: float, temperature: float) -> None:
    logits = np.random.default_rng(seed).standard_normal((3, 8)) * 3
    settings = GenerationSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    found = probabilities(torch.tensor(logits, dtype=torch.float64), settings).numpy()
    for row, found_row in zip(logits, found, strict=True):
        order = np.argsort(-row)
        weights = np.exp((row - row.max()) / temperature)[order][:top_k]
        weights /= weights.sum()
        kept = 1 + int((np.cumsum(weights)[:-1] < top_p).sum())
        expected = np.zeros(8)
        expected[order[:kept]] = weights[:kept] / weights[:kept].sum()
        if np.abs(np.cumsum(weights)[:-1] - top_p).min(initial=1.0) > 1e-5:  # float32 may round over the border
            np.testing.assert_allclose(found_row, expected, rtol=2e-5, atol=1e-7)


# Choosing


def test_greedy_takes_the_largest_and_no_random_numbers() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    assert select_tokens(logits, GenerationSettings(), generator).tolist() == [1, 0]
    assert torch.equal(generator.get_state(), before)


def test_frequencies() -> None:
    """10,000 draws: a share's standard error is at most sqrt(0.25 / 1e4) = 0.005; five of them."""
    generator = torch.Generator().manual_seed(3)
    drawn = select_tokens(P.log().expand(10_000, 4), GenerationSettings(temperature=1.0), generator)
    shares = torch.bincount(drawn, minlength=4) / 10_000
    assert (shares - P[0]).abs().max() < 0.025


def test_same_seed_same_tokens() -> None:
    settings = GenerationSettings(temperature=1.0)
    logits = torch.zeros(64, 1000)
    first, again, other = (select_tokens(logits, settings, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan(temperature: float) -> None:
    with pytest.raises(Llama4QuantError, match="logits hold NaN"):
        select_tokens(torch.tensor([[0.0, torch.nan]]), GenerationSettings(temperature=temperature), torch.Generator())


# Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}, expected"):
        GenerationSettings(**wrong)


def _from_folder(folder: Path, values: dict[str, object]) -> GenerationSettings:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return GenerationSettings.from_folder(folder)


def test_as_scout_has_it(tmp_path: Path) -> None:
    values = {
        "bos_token_id": 200000,
        "do_sample": True,
        "eos_token_id": [200001, 200007, 200008],
        "pad_token_id": 200018,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    assert _from_folder(tmp_path, values) == GenerationSettings(
        temperature=0.6, top_p=0.9, eos_token_ids=(200001, 200007, 200008), pad_token_id=200018
    )


def test_without_sampling_it_is_greedy(tmp_path: Path) -> None:
    assert _from_folder(tmp_path, {"temperature": 0.6, "eos_token_id": 7}) == GenerationSettings(eos_token_ids=(7,))


def test_no_file(tmp_path: Path) -> None:
    assert GenerationSettings.from_folder(tmp_path) == GenerationSettings()


def test_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: top_p is '0\.9'"):
        _from_folder(tmp_path, {"top_p": "0.9"})
