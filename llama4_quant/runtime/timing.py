"""What is said about a generation afterwards: why rows ended, and where the time went."""

from dataclasses import dataclass, fields
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a row ended."""

    EOS = "eos"
    """The model ended it."""
    STOP = "stop"
    """A stop string came up."""
    LENGTH = "length"
    """`max_new_tokens`, or the model's last position."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Where the time of a generation went.

    Attributes:
        num_prompt_tokens: of all rows, without padding.
        num_cached_tokens: those of them that were in the cache already.
        num_new_tokens: of all rows, without padding, with the tokens that ended them.
        num_decoded_tokens: those of them that took a step of their own: all but each row's first.
        prefill_seconds: until the first token of every row.
        decode_seconds: all later steps together; time that the caller takes between steps is not counted.
        prepare_seconds: before prefill: rendering, tokenizing, images; 0 where the caller came with tokens.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    num_new_tokens: int
    num_decoded_tokens: int
    prefill_seconds: float
    decode_seconds: float
    prepare_seconds: float = 0.0

    @property
    def first_token_seconds(self) -> float:
        """From the prompt to the first token."""
        return self.prepare_seconds + self.prefill_seconds

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens of all rows that were computed, per second; None before the first token."""
        computed = self.num_prompt_tokens - self.num_cached_tokens
        return computed / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Decoded tokens of all rows per second; None if there was no decode step."""
        return self.num_decoded_tokens / self.decode_seconds if self.num_decoded_tokens else None


def total(first: Timing, second: Timing) -> Timing:
    """Of two batches, one after the other."""
    return Timing(**{field.name: getattr(first, field.name) + getattr(second, field.name) for field in fields(Timing)})
