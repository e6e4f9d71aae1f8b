"""Which tokens can be chosen and how often, against distributions worked out by hand or in NumPy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama4_quant.errors import ConfigError, Llama4QuantError, UsageError
from llama4_quant.runtime.penalties import TokenHistory
from llama4_quant.runtime.sampling import (
    GenerationSettings,
    RowRandom,
    _draw,
    log_probabilities,
    probabilities,
    select_tokens,
)

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


def test_top_p_keeps_ties_whatever_the_rows_beside() -> None:
    """A flat row needs more than the 1,024 largest; ties at the border of the other stay together all the same."""
    peaked, flat = torch.full((1, 5000), -20.0), torch.zeros(1, 5000)
    peaked[0, [7, 4000, 9]] = torch.tensor([2.0, 1.0, 1.0])
    settings = GenerationSettings(temperature=1.0, top_p=0.7)
    alone, together = probabilities(peaked, settings), probabilities(torch.cat([flat, peaked]), settings)
    assert alone[0].nonzero().flatten().tolist() == [7, 9, 4000]
    assert torch.equal(together[1:], alone)
    assert bool((together[0] > 0).all())


def test_a_wide_nucleus_is_sorted_whole() -> None:
    """3,000 tokens of falling probability: half of the sum is in more than 1,024 of them."""
    weights = torch.linspace(2, 1, 3000, dtype=torch.float64)
    kept = probabilities(weights.log()[None], GenerationSettings(temperature=1.0, top_p=0.5))[0] > 0
    expected = int((weights.cumsum(0) - weights < weights.sum() / 2).sum())
    assert kept.sum() == expected > 1024
    assert bool(kept[:expected].all())


@pytest.mark.parametrize(("min_p", "kept"), [(0.2, 4), (0.26, 3), (0.49, 3), (0.51, 2), (0.74, 2), (0.76, 1), (1.0, 1)])
def test_min_p(min_p: float, kept: int) -> None:
    """0.4 is the most probable: the others are 0.75, 0.5 and 0.25 of it."""
    expected = P.masked_fill(P.sort(descending=True).values[0, kept - 1] > P, 0.0)
    torch.testing.assert_close(_probabilities(min_p=min_p), expected / expected.sum())


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


class CountedRandom(RowRandom):
    """Counts how often it was asked."""

    num_asked = 0

    def uniform(self) -> torch.Tensor:
        self.num_asked += 1
        return super().uniform()


def test_greedy_takes_the_largest_and_no_random_numbers() -> None:
    random = CountedRandom(1, range(2))
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    assert select_tokens(logits, GenerationSettings(), random).tolist() == [1, 0]
    assert random.num_asked == 0
    select_tokens(logits, GenerationSettings(temperature=1.0), random)
    assert random.num_asked == 1


def test_frequencies() -> None:
    """10,000 rows: a share's standard error is at most sqrt(0.25 / 1e4) = 0.005; five of them."""
    logits = P.log().expand(10_000, 4)
    drawn = select_tokens(logits, GenerationSettings(temperature=1.0), RowRandom(3, range(10_000)))
    shares = torch.bincount(drawn, minlength=4) / 10_000
    assert (shares - P[0]).abs().max() < 0.025


def test_frequencies_of_one_row() -> None:
    """The numbers of one row, one after the other, are as good as those of many."""
    random = RowRandom(5, [7])
    settings = GenerationSettings(temperature=1.0)
    drawn = torch.cat([select_tokens(P.log(), settings, random) for _ in range(10_000)])
    assert (torch.bincount(drawn, minlength=4) / 10_000 - P[0]).abs().max() < 0.025


def test_same_seed_same_tokens() -> None:
    settings = GenerationSettings(temperature=1.0)
    logits = torch.zeros(64, 1000)
    first, again, other = (select_tokens(logits, settings, RowRandom(seed, range(64))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set(first.tolist())) > 32  # rows differ; 64 of 1000 with chance 1/1000 each repeat about twice


def test_a_row_is_drawn_by_its_number_alone() -> None:
    settings = GenerationSettings(temperature=1.0, top_k=500)
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    together = select_tokens(logits, settings, RowRandom(9, range(8)))
    for rows in ([3], [6, 2], [7, 0, 4, 1]):
        assert select_tokens(logits[rows], settings, RowRandom(9, rows)).tolist() == together[rows].tolist()


@given(
    uniform=st.one_of(st.sampled_from([0.0, 1 - 2**-53]), st.floats(0, 1, exclude_max=True)), seed=st.integers(0, 99)
)
def test_drawing_inverts_the_sums(uniform: float, seed: int) -> None:
    """Also at both ends, where tokens of probability 0 are next to those that can be drawn."""
    weights = np.random.default_rng(seed).integers(0, 4, 12).astype(np.float64)
    weights[5] += 1
    expected = int(np.searchsorted(np.cumsum(weights), uniform * weights.sum(), side="right"))
    found = int(_draw(torch.tensor(weights)[None], torch.tensor([uniform], dtype=torch.float64)))
    assert found == expected
    assert weights[found] > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan(temperature: float) -> None:
    settings = GenerationSettings(temperature=temperature)
    with pytest.raises(Llama4QuantError, match="logits hold NaN"):
        select_tokens(torch.tensor([[0.0, torch.nan]]), settings, RowRandom(0, [0]))


def test_log_probabilities_are_the_models() -> None:
    found = log_probabilities(torch.cat([P.log() + 3, P.log() - 5]).to(torch.float64), torch.tensor([1, 3]))
    torch.testing.assert_close(found, torch.tensor([0.4, 0.3]).log())


# Penalties


def _penalized(logits: list[float], **penalties: float) -> list[float]:
    """Tokens 0 and 1 are in the prompt (5 is its padding), 1 and 3 in the answer, 3 twice."""
    settings = GenerationSettings(**penalties)
    history = TokenHistory(torch.tensor([[5, 0, 1]]), torch.tensor([[0, 1, 1]]), settings, len(logits))
    for token in (3, 1, 3):
        history.add(torch.tensor([token]))
    return history.penalize(torch.tensor([logits])).tolist()[0]


def test_repetition_penalty() -> None:
    found = _penalized([2.0, -2.0, 2.0, 3.0, -3.0, 1.0], repetition_penalty=2.0)
    assert found == [1.0, -4.0, 2.0, 1.5, -3.0, 1.0]


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    assert _penalized([2.0] * 6, presence_penalty=0.5) == [2.0, 1.5, 2.0, 1.5, 2.0, 2.0]
    assert _penalized([2.0] * 6, frequency_penalty=0.5) == [2.0, 1.5, 2.0, 1.0, 2.0, 2.0]
    assert _penalized([2.0] * 6, frequency_penalty=-0.5, presence_penalty=0.25) == [2.0, 2.25, 2.0, 2.75, 2.0, 2.0]


def test_rows_have_histories_of_their_own() -> None:
    settings = GenerationSettings(repetition_penalty=2.0, frequency_penalty=1.0)
    history = TokenHistory(torch.tensor([[0], [1]]), None, settings, 3)
    history.add(torch.tensor([2, 0]))
    assert history.penalize(torch.full((2, 3), 4.0)).tolist() == [[2.0, 4.0, 1.0], [1.0, 2.0, 4.0]]


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
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": 1000.0},
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


def test_everything_a_file_can_say(tmp_path: Path) -> None:
    values = {"min_p": 0.05, "repetition_penalty": 1.1, "stop_strings": ["###", "User:"]}
    expected = GenerationSettings(min_p=0.05, repetition_penalty=1.1, stop=("###", "User:"))
    assert _from_folder(tmp_path, values) == expected
    assert _from_folder(tmp_path, {"stop_strings": "###", "min_p": 0.0}) == GenerationSettings(stop=("###",))
    assert _from_folder(tmp_path, {"stop_strings": None, "min_p": None}) == GenerationSettings()


@pytest.mark.parametrize("stop", [[""], [3], ["x"] * 65, ["x" * 1025], {"a": 1}])
def test_stop_strings_of_a_file_are_bounded(tmp_path: Path, stop: object) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: stop_strings is"):
        _from_folder(tmp_path, {"stop_strings": stop})


@pytest.mark.parametrize("stop", ["###", ("",), ("a", 3), ["a"]])
def test_stop_is_a_tuple_of_texts(stop: object) -> None:
    with pytest.raises(UsageError, match=r"stop is .*, expected a tuple of texts"):
        GenerationSettings(stop=stop)  # type: ignore[arg-type]
