"""How the next token is chosen from logits.

Each row of a batch has random numbers of its own, so what a row becomes does not depend on the rows beside it.

Shape letters: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama4_quant.checkpoint.json_fields import Fields
from llama4_quant.checkpoint.json_files import read_json, shown
from llama4_quant.errors import ConfigError, Llama4QuantError, UsageError
from llama4_quant.runtime.cache_formats import CacheDtype

MAX_STOP_STRINGS, MAX_STOP_LENGTH = 64, 1024
"""Of texts that end a row: their number, and the characters of each."""

_NUCLEUS = 1024
"""Tokens among which those of `top_p` are looked for first."""


DEFAULT_PREFILL_CHUNK_SIZE = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """What to generate and when to stop.

    Attributes:
        max_new_tokens: at most so many per row.
        temperature: logits are divided by it; 0 takes the most probable token (greedy).
        top_k: sample among the k most probable tokens only; None for all.
        top_p: sample among the fewest most probable tokens whose probabilities (after top_k) sum to at least this.
        min_p: sample among tokens that are at least this fraction as probable as the most probable one.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that the row's prompt or
            answer holds; 1 changes nothing. Greedy too, as are the next two.
        presence_penalty: is taken off the logits of tokens that the row's answer holds.
        frequency_penalty: is taken off the logits of a token as often as the row's answer holds it.
        stop: texts that end a row; its text ends before them.
        seed: of the random numbers; the same seed, prompt and row number give the same text.
        eos_token_ids: tokens that end a row; None for those of the model's config.json.
        prefill_chunk_size: columns of a prompt that are computed at a time, which bounds memory and changes nothing
            else but the order of some sums; None for all at once.
        kv_cache_dtype: how keys and values are kept: "auto" (fp8 for a checkpoint with scales for it, else the model's
            dtype), "bf16", or in one byte "fp8" or "int8".
        pad_token_id: what an ended row is filled with; None for the model's, or else its first eos token.
        logprobs: also give the log-probability of every chosen token.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    eos_token_ids: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    prefill_chunk_size: int | None = DEFAULT_PREFILL_CHUNK_SIZE
    kv_cache_dtype: str = CacheDtype.AUTO
    logprobs: bool = False

    def __post_init__(self) -> None:
        CacheDtype.parse(self.kv_cache_dtype)
        rules = {
            f"max_new_tokens is {self.max_new_tokens}, expected at least 1": self.max_new_tokens >= 1,
            f"temperature is {self.temperature}, expected 0 (greedy) to 100": 0 <= self.temperature <= 100,
            f"top_k is {self.top_k}, expected at least 1": self.top_k is None or self.top_k >= 1,
            f"prefill_chunk_size is {self.prefill_chunk_size}, expected at least 1": self.prefill_chunk_size is None
            or self.prefill_chunk_size >= 1,
            f"top_p is {self.top_p}, expected above 0 and at most 1": 0 < self.top_p <= 1,
            f"min_p is {self.min_p}, expected 0 to 1": 0 <= self.min_p <= 1,
            f"repetition_penalty is {self.repetition_penalty}, expected 0.01 to 100; 1 is none": (
                0.01 <= self.repetition_penalty <= 100
            ),
            f"presence_penalty is {self.presence_penalty}, expected -100 to 100": -100 <= self.presence_penalty <= 100,
            f"frequency_penalty is {self.frequency_penalty}, expected -100 to 100": (
                -100 <= self.frequency_penalty <= 100
            ),
            f"seed is {self.seed}, expected 0 to 2^63 - 1": 0 <= self.seed < 2**63,
            f"stop is {shown(self.stop)}, expected a tuple of texts, none of them empty": (
                isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
            ),
        }
        for message, holds in rules.items():
            if not holds:
                raise UsageError(message)

    @property
    def has_penalties(self) -> bool:
        """Whether choosing depends on the tokens before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @classmethod
    def from_folder(cls, folder: Path) -> "GenerationSettings":
        """A checkpoint's defaults: `generation_config.json`, where the file and the key exist.

        `do_sample` false or absent is temperature 0. Absent `top_k` and `top_p` do not limit (transformers would take
        its own 50 best for the former).

        Raises:
            ConfigError: the file is damaged or a value is of the wrong type.
            UsageError: a value is out of range.
        """
        path = folder / "generation_config.json"
        fields = Fields(read_json(path) if path.exists() else {}, path.name)
        do_sample = fields.boolean("do_sample", default=False)
        return cls(
            max_new_tokens=fields.integer("max_new_tokens", cls().max_new_tokens),
            temperature=fields.number("temperature", 1.0) if do_sample else 0.0,
            top_k=fields.integer("top_k", 0, low=0) or None,
            top_p=fields.number("top_p", 1.0),
            min_p=fields.number("min_p", 0.0, low=0.0),
            repetition_penalty=fields.number("repetition_penalty", 1.0),
            stop=_stop_strings(fields),
            eos_token_ids=fields.integers("eos_token_id") or None,
            pad_token_id=fields.optional_integer("pad_token_id", None, low=-1),
        )


def _stop_strings(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop_strings")
    texts = [] if value is None else value if isinstance(value, list) else [value]
    are_sound = all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in texts)
    if len(texts) > MAX_STOP_STRINGS or not are_sound:
        raise ConfigError(
            f"{fields.where}: stop_strings is {shown(value)}, expected at most {MAX_STOP_STRINGS} texts of 1 to "
            f"{MAX_STOP_LENGTH} characters"
        )
    return tuple(texts)


class RowRandom:
    """Random numbers for each row of a batch, from a seed and the row's number alone, on every device the same."""

    def __init__(self, seed: int, rows: Sequence[int]) -> None:
        """Start the sequences of rows with these numbers."""
        self._generators = [np.random.default_rng((seed, row)) for row in rows]

    def uniform(self) -> Tensor:
        """The next number of every row: [B] float64, at least 0 and below 1."""
        return torch.tensor([generator.random() for generator in self._generators], dtype=torch.float64)


def select_tokens(logits_BV: Tensor, settings: GenerationSettings, random: RowRandom) -> Tensor:
    """Choose one token per row.

    Args:
        logits_BV: [B, V], any floating dtype, with penalties applied.
        settings: greedy, or how to sample.
        random: of B rows; one number of each is used, none when greedy.

    Returns:
        [B] int64.

    Raises:
        Llama4QuantError: the logits hold NaN.
    """
    if bool(logits_BV.isnan().any()):
        raise Llama4QuantError(
            "the model's logits hold NaN: weights or activations overflowed; try float32, or check the checkpoint"
        )
    if settings.temperature == 0:
        return logits_BV.argmax(dim=-1)
    return _draw(probabilities(logits_BV, settings), random.uniform())


def _draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token in whose part of the sum of probabilities the number falls; never one of probability 0."""
    sums_BV = probabilities_BV.cumsum(dim=-1, dtype=torch.float64)
    # A parallel sum may be off by a rounding, and so rise where a probability is 0.
    sums_BV = sums_BV.masked_fill(probabilities_BV == 0, 0.0)
    # In float64 u < 1 makes u * total < total, so there is such a token; argmax gives the first.
    target_B1 = uniform_B.to(sums_BV.device).unsqueeze(1) * sums_BV.amax(dim=-1, keepdim=True)
    return (sums_BV > target_B1).to(torch.uint8).argmax(dim=-1)


def probabilities(logits_BV: Tensor, settings: GenerationSettings) -> Tensor:
    """What is sampled from at a temperature above 0: temperature first, then top_k, top_p, min_p, as in transformers.

    Tokens that tie with the last one to stay do so too (logits in bfloat16 often do). Holtzman et al. 2019, "The
    curious case of neural text degeneration" (top-p); Nguyen et al. 2024, arXiv 2407.01082 (min-p).

    Returns:
        [B, V] float32, rows sum to 1.
    """
    shifted_BV = logits_BV.to(torch.float32) - logits_BV.amax(dim=-1, keepdim=True)  # so that no temperature overflows
    scaled_BV = shifted_BV / settings.temperature
    if settings.top_k is not None and settings.top_k < scaled_BV.shape[-1]:
        kth_B1 = scaled_BV.topk(settings.top_k, dim=-1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < kth_B1, -torch.inf)
    probabilities_BV = scaled_BV.softmax(dim=-1)
    if settings.top_p < 1:
        probabilities_BV = probabilities_BV.masked_fill(
            probabilities_BV < _least(probabilities_BV, settings.top_p), 0.0
        )
    if settings.min_p > 0:
        least_B1 = settings.min_p * probabilities_BV.amax(dim=-1, keepdim=True)
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < least_B1, 0.0)
    return probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)


def _least(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """The smallest of the fewest largest probabilities that sum to at least `top_p`: [B, 1]."""
    num_tokens = probabilities_BV.shape[-1]
    # Sorting Llama 4's 202,048 takes 20 times as long as finding the largest of them, which nearly always suffice.
    sorted_BK = probabilities_BV.topk(min(_NUCLEUS, num_tokens), dim=-1).values
    if bool((sorted_BK.sum(dim=-1) < top_p).any()):
        sorted_BK = probabilities_BV.sort(dim=-1, descending=True).values
    sum_before_BK = sorted_BK.cumsum(dim=-1) - sorted_BK
    num_kept_B1 = (sum_before_BK < top_p).sum(dim=-1, keepdim=True)  # at least one, for the first sum is 0
    return sorted_BK.gather(1, num_kept_B1 - 1)


def log_probabilities(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    """Of one token per row under the model itself, before penalties, temperature and limits: [B] float32."""
    logits_BV = logits_BV.to(torch.float32)
    chosen_B = logits_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)
    return chosen_B - logits_BV.logsumexp(dim=-1)
