"""Comparing what vLLM said with what our runtime says, token by token, in units of what rounding explains."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm_rounding import Rounding

from llama4_quant.runtime.model import Llama4Model

MAX_RMS_SIGMAS = 1.5
"""Limit for the root mean square of all comparisons; more than 1 because branches may amplify what they inherit."""

MAX_SIGMAS = 8.0
"""Limit for a single log-probability. The noise has heavier tails than a normal distribution (an attention that
hesitates between two tokens passes on more, and FP8 has few, large flips), so that the largest of a thousand may pass
5."""

NEAR_TIE_SIGMAS = 4.0
"""Two tokens whose logits are closer than this may swap places."""

MIN_DECIDED = 0.9
"""Share of new tokens that must be no near ties: same text has to be the rule."""

HEADER = (
    f"{'':<50}|logprob diff|, nats  in sigmas\n"
    f"{'checkpoint':<24}{'same texts':>10}{'new':>7}{'decided':>9}{'mean':>9}{'max':>9}{'rms':>8}{'max':>8}"
    "  texts part: lead (sigma)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """vLLM's answer to one prompt; log-probabilities of prompt tokens (but the first), then of new ones."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parting:
    """The first new token on which the engines do not agree: our lead of our choice over theirs, and its sigma."""

    position: int
    gap: float
    sigma: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Both engines on one prompt.

    Attributes:
        num_same: new tokens before the texts part.
        num_decided: those of them whose runner-up is further behind than NEAR_TIE_SIGMAS.
        parting: None if the texts are the same.
        differences: vLLM's minus our log-probability of every compared token, in nats.
        sigmas: the same in sigmas.
    """

    num_same: int
    num_decided: int
    parting: Parting | None
    differences: Tensor
    sigmas: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """All prompts of one checkpoint."""

    name: str
    results: tuple[Comparison, ...]

    @property
    def partings(self) -> list[Parting]:
        """Of the prompts whose texts are not the same."""
        return [result.parting for result in self.results if result.parting is not None]

    @property
    def num_same(self) -> int:
        """New tokens that both engines agree on."""
        return sum(result.num_same for result in self.results)

    @property
    def decided(self) -> float:
        """Share of them that are no near ties."""
        return sum(result.num_decided for result in self.results) / max(1, self.num_same)

    @property
    def rms_and_max_sigmas(self) -> tuple[float, float]:
        """Of all log-probabilities' differences."""
        sigmas = torch.cat([result.sigmas for result in self.results])
        return float(sigmas.square().mean().sqrt()), float(sigmas.abs().max())

    @property
    def logprobs_agree(self) -> bool:
        """Whether rounding explains all differences."""
        rms, largest = self.rms_and_max_sigmas
        return rms <= MAX_RMS_SIGMAS and largest <= MAX_SIGMAS

    def failures(self) -> list[str]:
        """What is wrong, in sentences."""
        found = [
            f"{self.name}: texts part at new token {x.position}, where our choice leads by {x.gap:.3f} (sigma "
            f"{x.sigma:.3f})"
            for x in self.partings
            if x.gap > NEAR_TIE_SIGMAS * x.sigma
        ]
        if not self.logprobs_agree:
            found.append(f"{self.name}: log-probabilities differ by more than rounding explains")
        if self.decided < MIN_DECIDED:
            found.append(f"{self.name}: only {self.decided:.1%} of new tokens are no near ties; try more --steps")
        return found

    def row(self) -> str:
        """A line of the table."""
        nats = torch.cat([result.differences for result in self.results]).abs()
        rms, largest = self.rms_and_max_sigmas
        ties = ", ".join(f"{x.gap:.3f} ({x.sigma:.3f})" for x in self.partings) or "-"
        return (
            f"{self.name:<24}{len(self.results) - len(self.partings):>6}/{len(self.results):<3}{self.num_same:>7}"
            f"{self.decided:>9.1%}{float(nats.mean()):>9.4f}{float(nats.max()):>9.3f}{rms:>8.2f}{largest:>8.2f}  {ties}"
        )


@torch.inference_mode()
def continue_greedily(model: Llama4Model, prompt: Sequence[int], num_new: int) -> tuple[list[int], Tensor]:
    """Our runtime's text, and the logits [prompt + num_new - 1, V] that predict every token but the first."""
    cache = model.new_cache(1)
    rows = [model(torch.tensor([list(prompt)]), cache=cache)[0].float()]
    tokens = [int(rows[-1][-1].argmax())]
    while len(tokens) < num_new:
        rows.append(model(torch.tensor([tokens[-1:]]), cache=cache)[0].float())
        tokens.append(int(rows[-1][-1].argmax()))
    return tokens, torch.cat(rows)


def compare(model: Llama4Model, noise: Rounding, prompt: Sequence[int], theirs: Continuation) -> Comparison:
    """Let our runtime continue a prompt, and compare with what vLLM said."""
    ours, logits_TV = continue_greedily(model, prompt, len(theirs.tokens))
    new_TV = logits_TV[len(prompt) - 1 :]
    num_same = next((i for i, pair in enumerate(zip(ours, theirs.tokens, strict=True)) if len({*pair}) > 1), len(ours))
    tokens = [*prompt[1:], *ours[:num_same]]
    logprobs = logits_TV.log_softmax(dim=-1)[range(len(tokens)), tokens]
    sigmas = [noise.sigma_of_logprob(at, token) for at, token in zip(logits_TV, tokens, strict=False)]
    differences = torch.tensor(theirs.logprobs[: len(tokens)]) - logprobs
    leads = [_lead(noise, at, *at.topk(2).indices.tolist()) for at in new_TV[:num_same]]
    parting = None
    if num_same < len(ours):
        gap, sigma = _lead(noise, new_TV[num_same], ours[num_same], theirs.tokens[num_same])
        parting = Parting(position=num_same, gap=gap, sigma=sigma)
    return Comparison(
        num_same=num_same,
        num_decided=sum(gap > NEAR_TIE_SIGMAS * sigma for gap, sigma in leads),
        parting=parting,
        differences=differences,
        sigmas=differences / torch.tensor(sigmas),
    )


def _lead(noise: Rounding, logits_V: Tensor, first: int, second: int) -> tuple[float, float]:
    return float(logits_V[first] - logits_V[second]), noise.sigma_of_gap(logits_V, first, second)
