"""Measures against cases with a known answer and against a dense float64 oracle.

Bounds: everything is computed in float64, where a sum of n terms of order 1 is off by at most about n * 2^-53. The
tests allow 1e-12, which is far above that for the sizes here, and far below what float32 would reach.
"""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama4_quant.config import Llama4Config
from llama4_quant.errors import Llama4QuantError, UsageError
from llama4_quant.evaluation import NamedModel, evaluate
from llama4_quant.evaluation.checkpoints import ChunkedLogits
from llama4_quant.evaluation.divergence import token_agreements, token_divergences
from llama4_quant.evaluation.perplexity import CHUNK_ELEMENTS, token_losses
from llama4_quant.runtime.cache_formats import CacheDtype
from llama4_quant.runtime.model import Llama4Model

EXACT = {"rtol": 0.0, "atol": 1e-12}
V = 50


def constant(name: str, logits_V: Tensor) -> NamedModel:
    """A model that predicts the same distribution everywhere."""
    return NamedModel(name=name, logits=lambda ids: logits_V.expand(*ids.shape, -1))


def table(name: str, seed: int, dtype: torch.dtype = torch.float32) -> NamedModel:
    """A model whose prediction depends on the last token only."""
    logits_VV = (torch.randn(V, V, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    return NamedModel(name=name, logits=lambda ids: logits_VV[ids])


def windows(count: int = 5, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(V, (count, length), generator=torch.Generator().manual_seed(seed))


def oracle(
    model: NamedModel, reference: NamedModel, ids: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per token [W, L - 1]: loss, reference loss, KL, agreement; in dense NumPy float64 with no chunks."""

    def log_softmax(which: NamedModel) -> np.ndarray:
        logits = which.logits(ids)[:, :-1].double().numpy()
        shifted = logits - logits.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    log_q, log_p = log_softmax(model), log_softmax(reference)
    targets = ids[:, 1:, None].numpy()
    loss, reference_loss = (-np.take_along_axis(x, targets, axis=-1)[..., 0] for x in (log_q, log_p))
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return loss, reference_loss, divergence, log_q.argmax(axis=-1) == log_p.argmax(axis=-1)


# Known answers


def test_a_uniform_model_has_the_vocabulary_for_perplexity() -> None:
    result = evaluate(constant("uniform", torch.zeros(V)), windows())
    assert result.perplexity.value == pytest.approx(V, rel=1e-12)
    assert result.loss.value == pytest.approx(math.log(V), rel=1e-12)
    assert result.loss.standard_error == pytest.approx(0.0, abs=1e-12)


def test_a_sure_model_has_perplexity_one() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    following = 100.0 * torch.eye(V).roll(1, dims=1)
    result = evaluate(NamedModel(name="sure", logits=lambda rows: following[rows]), ids)
    assert result.perplexity.value == pytest.approx(1.0, rel=1e-12)


def test_divergence_of_two_known_distributions() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL(p||q) = 1/2 ln 2 - 1/4 ln 2 = ln(2) / 4."""
    p, q = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    result = evaluate(constant("q", q.log()), windows() % 3, reference=constant("p", p.log()))
    assert result.comparison is not None
    assert result.comparison.divergence.value == pytest.approx(math.log(2) / 4, abs=1e-12)
    assert result.comparison.agreement.value == 0.0


def test_the_direction_is_reference_to_model() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2): KL(p||q) = ln 2 - H(p); the other direction is ln(2) - ... another number."""
    p, q = torch.tensor([0.75, 0.25], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    found = token_divergences(q.log()[None], p.log()[None])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(found, torch.tensor([math.log(2) - entropy], dtype=torch.float64), **EXACT)


def test_logits_are_defined_up_to_a_constant() -> None:
    logits = torch.randn(4, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = token_divergences(logits + 7.5, logits)
    torch.testing.assert_close(found, torch.zeros(4, dtype=torch.float64), **EXACT)


def test_a_token_that_the_reference_excludes_counts_nothing() -> None:
    reference = torch.tensor([[0.0, 0.0, -torch.inf]])
    model = torch.tensor([[0.0, 0.0, 0.0]])
    expected = torch.tensor([math.log(3 / 2)], dtype=torch.float64)
    torch.testing.assert_close(token_divergences(model, reference), expected, **EXACT)
    assert token_divergences(reference, model).tolist() == [math.inf]


def test_agreement() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [5.0, 2.0, 3.0], [1.0, 1.0, 0.0]])
    reference = torch.tensor([[0.0, 0.0, 0.1], [0.0, 9.0, 0.0], [2.0, 1.0, 0.0]])
    assert token_agreements(logits, reference).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_against_itself_is_exactly_zero(dtype: torch.dtype) -> None:
    comparison = evaluate(table("a", 1, dtype), windows(), reference=table("b", 1, dtype)).comparison
    assert comparison is not None
    assert (comparison.divergence.value, comparison.divergence.standard_error) == (0.0, 0.0)
    assert (comparison.agreement.value, comparison.agreement.standard_error) == (1.0, 0.0)
    assert (comparison.loss_increase.value, comparison.loss_increase.standard_error) == (0.0, 0.0)


# The oracle


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_everything_against_the_oracle(batch_size: int) -> None:
    ids = windows()
    model, reference = table("model", 1), table("reference", 2)
    result = evaluate(model, ids, reference=reference, batch_size=batch_size)
    loss, reference_loss, divergence, agreement = oracle(model, reference, ids)
    assert result.comparison is not None
    for estimate, per_token in (
        (result.loss, loss),
        (result.comparison.loss_increase, loss - reference_loss),
        (result.comparison.divergence, divergence),
        (result.comparison.agreement, agreement.astype(float)),
    ):
        per_window = per_token.mean(axis=1)
        assert estimate.value == pytest.approx(per_token.mean(), abs=1e-12)
        assert estimate.standard_error == pytest.approx(per_window.std(ddof=1) / math.sqrt(5), abs=1e-12)
    assert result.perplexity.value == pytest.approx(np.exp(loss.mean()), rel=1e-12)
    assert result.comparison.reference_perplexity.value == pytest.approx(np.exp(reference_loss.mean()), rel=1e-12)
    assert result.comparison.divergence.value > 0.05  # two unrelated models: the comparison above is not of zeros


def test_chunks_do_not_change_the_result() -> None:
    """A vocabulary so large that a chunk holds 3 of 7 positions."""
    vocabulary = CHUNK_ELEMENTS // 3
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(7, vocabulary, generator=generator) for _ in range(2))
    targets = torch.randint(vocabulary, (7,), generator=generator)
    losses = torch.cat([token_losses(logits[i : i + 1], targets[i : i + 1]) for i in range(7)])
    divergences = torch.cat([token_divergences(logits[i : i + 1], reference[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(token_losses(logits, targets), losses, **EXACT)
    torch.testing.assert_close(token_divergences(logits, reference), divergences, **EXACT)


def test_small_divergences_are_resolved() -> None:
    """For q = p (1 + e d) with e = 1e-5, KL is e^2/2 * sum p d^2 + O(e^3): float32 would drown in 1e-7 noise."""
    generator = torch.Generator().manual_seed(0)
    logits, direction = (torch.randn(1, 1000, dtype=torch.float64, generator=generator) for _ in range(2))
    p = logits.softmax(dim=-1)
    variance = float((p * direction**2).sum() - (p * direction).sum() ** 2)
    found = float(token_divergences(logits + 1e-5 * direction, logits))
    # third order: e^3 / 6 * (third cumulant of d, about 1) < 1e-15; two log-normalisers near 7 round by 14 * 2^-53
    assert found == pytest.approx(0.5e-10 * variance, abs=5e-15)


# Counts and errors


def test_counts() -> None:
    calls: list[tuple[int, ...]] = []
    done: list[int] = []

    def logits(ids: Tensor) -> Tensor:
        calls.append(tuple(ids.shape))
        return torch.zeros(*ids.shape, V)

    result = evaluate(NamedModel(name="m", logits=logits), windows(5, 9), batch_size=2, progress=done.append)
    assert (result.num_windows, result.seq_length, result.num_tokens) == (5, 9, 40)
    assert calls == [(2, 9), (2, 9), (1, 9)]
    assert done == [2, 2, 1]
    assert result.comparison is None


def test_one_window_has_no_standard_error() -> None:
    result = evaluate(table("a", 1), windows(1), reference=table("b", 2))
    assert result.loss.standard_error is None
    assert result.perplexity.standard_error is None
    assert result.comparison is not None
    assert result.comparison.divergence.standard_error is None


def _with_nan(ids: Tensor) -> Tensor:
    logits = torch.zeros(*ids.shape, V)
    logits[ids == 0] = torch.nan
    return logits


def test_nan_is_an_error_that_names_model_and_window() -> None:
    ids = torch.ones(4, 5, dtype=torch.int64)
    ids[2, 1] = 0
    broken = NamedModel(name="broken", logits=_with_nan)
    with pytest.raises(Llama4QuantError, match="broken: the logits of window 2 hold NaN"):
        evaluate(broken, ids)
    with pytest.raises(Llama4QuantError, match="broken: the logits of window 2 hold NaN"):
        evaluate(table("fine", 1), ids, reference=broken, batch_size=2)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(0, 5, dtype=torch.int64), {}, "windows have shape"),
        (torch.zeros(2, 1, dtype=torch.int64), {}, "windows have shape"),
        (torch.zeros(2, 5, dtype=torch.int64), {"batch_size": 0}, "batch_size is 0"),
        (
            torch.zeros(2, 5, dtype=torch.int64),
            {"reference": constant("small", torch.zeros(3))},
            "must have the same vocabulary",
        ),
    ],
)
def test_errors(ids: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(constant("m", torch.zeros(V)), ids, **options)


# Our own model


def _tiny(seed: int) -> Llama4Model:
    text = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 32,
        "intermediate_size_mlp": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_local_experts": 4,
    }
    model = Llama4Model(
        Llama4Config.from_dict({"model_type": "llama4_text", **text}), dtype=torch.float32, device="cpu"
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.detach().normal_(0, 0.2, generator=generator)
    return model.eval()


def test_a_llama4_is_a_model() -> None:
    result = evaluate(
        NamedModel(name="model", logits=_tiny(0)), windows(), reference=NamedModel(name="same", logits=_tiny(0))
    )
    assert result.comparison is not None
    assert result.comparison.divergence.value == 0.0
    assert result.comparison.agreement.value == 1.0


# Logits in pieces

PIECES = {"rel": 0.0, "abs": 1e-12}
"""float64 means of the same numbers, with sums over the vocabulary in other blocks."""


def _in_pieces(model: NamedModel, sizes: list[int]) -> NamedModel:
    def pieces(ids: Tensor) -> Iterator[Tensor]:
        logits = model.logits(ids)
        assert isinstance(logits, Tensor)
        yield from torch.split(logits, [*sizes, ids.shape[1] - sum(sizes)], dim=1)

    return NamedModel(name=model.name, logits=pieces)


@pytest.mark.parametrize("sizes", [([3, 4], [1, 1]), ([8], [3, 3]), ([], [2])])
def test_pieces_score_what_the_whole_does(sizes: tuple[list[int], list[int]]) -> None:
    model, reference, ids = table("model", 1), table("reference", 2), windows(4, 9)
    whole = evaluate(model, ids, reference=reference, batch_size=3)
    found = evaluate(_in_pieces(model, sizes[0]), ids, reference=_in_pieces(reference, sizes[1]), batch_size=3)
    alone = evaluate(_in_pieces(model, sizes[0]), ids)
    assert found.comparison is not None
    assert whole.comparison is not None
    assert found.loss.value == pytest.approx(whole.loss.value, **PIECES)
    assert alone.loss.value == pytest.approx(whole.loss.value, **PIECES)
    assert found.comparison.divergence.value == pytest.approx(whole.comparison.divergence.value, **PIECES)
    assert found.comparison.agreement.value == whole.comparison.agreement.value
    assert found.comparison.loss_increase.value == pytest.approx(whole.comparison.loss_increase.value, **PIECES)


def test_pieces_that_stop_too_early_are_an_error() -> None:
    short = NamedModel(name="short", logits=lambda ids: [torch.zeros(*ids[:, :3].shape, V)])
    with pytest.raises(UsageError, match="short gives logits of 3 positions, expected 9"):
        evaluate(short, windows(2, 9))


def test_a_llama4_in_chunks_is_the_same_model() -> None:
    model, other, ids = _tiny(0), _tiny(1), windows(3, 23)
    whole = evaluate(NamedModel(name="model", logits=model), ids, reference=NamedModel(name="other", logits=other))
    assert whole.comparison is not None
    bound = 10 * 500 * 2**-24  # logits below 10, float32 sums of some 500 terms in two layers in another order
    for chunk_size in (1, 7, 100):
        named = NamedModel(name="model", logits=ChunkedLogits(model, chunk_size))
        reference = NamedModel(name="other", logits=ChunkedLogits(other, 5))
        found = evaluate(named, ids, reference=reference, batch_size=2)
        assert found.comparison is not None
        assert found.loss.value == pytest.approx(whole.loss.value, abs=bound)
        assert found.comparison.divergence.value == pytest.approx(whole.comparison.divergence.value, abs=bound)
    coded = NamedModel(name="int8", logits=ChunkedLogits(model, 100, CacheDtype.INT8))
    comparison = evaluate(coded, ids, reference=NamedModel(name="model", logits=model)).comparison
    assert comparison is not None
    assert 0 < comparison.divergence.value < 0.01  # the cache is used, and its codes are near


def test_memory_of_a_long_window_is_that_of_a_chunk() -> None:
    """No tensor has a logit for every position of the window."""
    model, seen = _tiny(0), _Largest()
    with seen:
        evaluate(NamedModel(name="model", logits=ChunkedLogits(model, 16)), windows(1, 2000))
    assert seen.num_elements < 0.7 * 2000 * V  # keys of a layer have 64,000


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator gives."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result
