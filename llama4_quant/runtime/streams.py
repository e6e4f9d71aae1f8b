"""Text of generated tokens, row by row, as soon as it is certain."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llama4_quant.runtime.cache import KVCache
from llama4_quant.runtime.generate import TokenStream
from llama4_quant.runtime.stopping import StopFinder
from llama4_quant.runtime.timing import FinishReason, Timing
from llama4_quant.runtime.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What one prompt was completed with.

    Attributes:
        text: up to the end, or to a stop string.
        finish_reason: why it ended; None if it was not read to its end.
        num_prompt_tokens: with the tokens of images.
        num_new_tokens: with the token that ended it.
        token_ids: the new tokens, without the one that ended the text; those of a stop string are among them.
        logprobs: of each of these tokens under the model, before penalties, temperature and limits; None unless asked
            for.
    """

    text: str
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_new_tokens: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None


class _Row:
    """One row's text so far."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.pieces: list[str] = []
        self.finish_reason: FinishReason | None = None
        self._decoder = StreamDecoder(tokenizer)
        self._stop = StopFinder(stop)

    def push(self, token_id: int) -> str:
        """The text that is certain now; the row has ended if that is what a stop string does."""
        self.token_ids.append(token_id)
        return self._keep(self._stop.push(self._decoder.push(token_id)))

    def finish(self, reason: FinishReason) -> str:
        """What was held back, now that no more tokens come."""
        piece = self._stop.push(self._decoder.finish()) + self._stop.finish()
        self.finish_reason = reason
        return self._keep(piece)

    def _keep(self, piece: str) -> str:
        if self._stop.found is not None:
            self.finish_reason = FinishReason.STOP
        if piece:
            self.pieces.append(piece)
        return piece


class TextStreams(Iterator[tuple[int, str]]):
    """Yields (row, piece of its text) for all rows of a batch; ends where all rows have ended."""

    def __init__(
        self,
        tokens: TokenStream,
        tokenizer: Tokenizer,
        *,
        num_prompt_tokens: Sequence[int],
        stop: Sequence[str] = (),
        prepare_seconds: float = 0.0,
    ) -> None:
        """Read from a stream of tokens; `num_prompt_tokens` has one number per row."""
        self._tokens = tokens
        self._num_prompt_tokens = num_prompt_tokens
        self._prepare_seconds = prepare_seconds
        self._rows = [_Row(tokenizer, stop) for _ in num_prompt_tokens]
        self._ready: deque[tuple[int, str]] = deque()
        self._is_over = False

    def __next__(self) -> tuple[int, str]:
        """The next piece, never empty."""
        while not self._ready:
            if self._is_over:
                raise StopIteration
            self._advance()
        return self._ready.popleft()

    @property
    def timing(self) -> Timing:
        """Of the tokens so far, of all rows."""
        return replace(self._tokens.timing, prepare_seconds=self._prepare_seconds)

    @property
    def cache(self) -> KVCache:
        """Holds the prompts and all tokens but the last."""
        return self._tokens.cache

    @property
    def token_ids(self) -> list[list[int]]:
        """New tokens of each row so far, without the one that ended it."""
        return [row.token_ids for row in self._rows]

    @property
    def completions(self) -> tuple[Completion, ...]:
        """What there is so far, row by row."""
        return tuple(
            Completion(
                text="".join(row.pieces),
                finish_reason=row.finish_reason,
                num_prompt_tokens=num_prompt_tokens,
                num_new_tokens=len(row.token_ids) + (row.finish_reason is FinishReason.EOS),
                token_ids=tuple(row.token_ids),
                logprobs=tuple(row.logprobs) if self._tokens.logprobs is not None else None,
            )
            for row, num_prompt_tokens in zip(self._rows, self._num_prompt_tokens, strict=True)
        )

    def _advance(self) -> None:
        """One more token of every row that is open."""
        tokens = next(self._tokens, None)
        if tokens is None:
            self._is_over = True
            for index, row in self._open():
                self._give(index, row.finish(FinishReason.LENGTH))
            return
        ids = tokens.tolist()
        logprobs = None if self._tokens.logprobs is None else self._tokens.logprobs.tolist()
        for index, row in self._open():
            if ids[index] in self._tokens.eos_token_ids:
                self._give(index, row.finish(FinishReason.EOS))
                continue
            if logprobs is not None:
                row.logprobs.append(logprobs[index])
            self._give(index, row.push(ids[index]))
            if row.finish_reason is not None:
                self._tokens.close(index)

    def _open(self) -> list[tuple[int, _Row]]:
        return [(index, row) for index, row in enumerate(self._rows) if row.finish_reason is None]

    def _give(self, index: int, piece: str) -> None:
        if piece:
            self._ready.append((index, piece))


class TextStream(Iterator[str]):
    """Yields one row's text as soon as it is certain; ends where the model ends, at a stop string, or at a limit."""

    def __init__(self, rows: TextStreams) -> None:
        """Read from streams of one row."""
        self._rows = rows

    def __next__(self) -> str:
        """The next piece of text, never empty."""
        return next(self._rows)[1]

    @property
    def token_ids(self) -> list[int]:
        """New tokens so far, without the one that ended the text."""
        return self._rows.token_ids[0]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the text ended; None before it does."""
        return self.completion.finish_reason

    @property
    def completion(self) -> Completion:
        """All that is known so far."""
        return self._rows.completions[0]

    @property
    def timing(self) -> Timing:
        """Of the tokens so far."""
        return self._rows.timing
