"""Token by token: prefill the prompt once, then feed every new token back, with a KV cache.

A batch runs in lock step. Prompts are padded on the left, so that all rows end in the same column and their next
tokens are computed together; a row that has ended is filled with padding until the longest one ends.

Shape letters: B rows, P prompt columns, L new columns, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.errors import UsageError
from llama4_quant.runtime.cache import KVCache
from llama4_quant.runtime.model import Llama4Model, Logits
from llama4_quant.runtime.penalties import TokenHistory
from llama4_quant.runtime.sampling import GenerationSettings, RowRandom, log_probabilities, select_tokens
from llama4_quant.runtime.timing import FinishReason, Timing

_RESERVED_COLUMNS = 256
"""Columns of cache allocated ahead; it grows by itself when generation goes on for longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A finished generation.

    Attributes:
        sequences: [B, P + L] int64: the prompts as given, then the new tokens, padded on the right.
        new_token_ids: per row, without padding and without the token that ended it.
        finish_reasons: per row, why it ended.
        logprobs: per row, of each of `new_token_ids` under the model; None unless the settings ask for them.
    """

    sequences: Tensor
    new_token_ids: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason, ...]
    logprobs: tuple[tuple[float, ...], ...] | None
    timing: Timing


class TokenStream(Iterator[Tensor]):
    """Yields the next token of every row, [B] int64, until all rows have ended or a limit is reached.

    An ended row yields padding. The limits are `max_new_tokens` and the model's `max_position_embeddings`. Stop strings
    are texts, of which this class knows nothing: who finds one calls `close`.

    Attributes:
        eos_token_ids: what ends a row.
        is_open: [B] bool: rows that have not ended yet.
        cache: the prompts and all tokens but the last.
        logprobs: [B] float32 of the last tokens under the model; None unless the settings ask for them.
    """

    def __init__(
        self,
        model: Llama4Model,
        input_ids: Tensor,
        *,
        settings: GenerationSettings,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        cache: KVCache | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Prepare; nothing is computed before the first token is asked for.

        Args:
            model: any Llama 4.
            input_ids: [B, P] integers, padded on the left.
            settings: what to generate.
            attention_mask: [B, P], 0 = padding; None for no padding.
            pixel_values: [tiles, 3, S, S], the tiles of all rows' images, row by row, that are not in the cache.
            cache: holds the first columns of `input_ids` already, at most P - 1; None for an empty one.
            rows: each row's number, which with the seed decides its random numbers; None counts from 0.

        Raises:
            UsageError: the prompt is empty, leaves no position for a new token, or is all in the cache.
        """
        text = model.config.text
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise UsageError(f"input_ids have shape {list(input_ids.shape)}, expected [rows, tokens] with a token")
        batch_size, num_columns = input_ids.shape
        num_free = text.max_position_embeddings - num_columns
        if num_free < 1:
            raise UsageError(
                f"the prompt has {num_columns} tokens and the model's max_position_embeddings is "
                f"{text.max_position_embeddings}; shorten the prompt"
            )
        num_cached = 0 if cache is None else cache.length
        if num_cached >= num_columns:
            raise UsageError(f"the cache holds {num_cached} columns, expected fewer than the prompt's {num_columns}")
        self._model = model
        self._prompt = input_ids.to(model.device)
        self._attention_mask = None if attention_mask is None else attention_mask.to(model.device)
        self._pixel_values = pixel_values
        self._settings = settings
        self._num_left = min(settings.max_new_tokens, num_free)
        self.cache = cache or model.new_cache(
            batch_size, num_columns + min(self._num_left, _RESERVED_COLUMNS), settings.kv_cache_dtype
        )
        self._random = RowRandom(settings.seed, range(batch_size) if rows is None else rows)
        self._history: TokenHistory | None = None
        self.logprobs: Tensor | None = None
        self._last: Tensor | None = None
        self.eos_token_ids = text.eos_token_ids if settings.eos_token_ids is None else settings.eos_token_ids
        self._eos = torch.tensor(self.eos_token_ids, dtype=torch.int64, device=model.device)
        self._pad_token_id = _pad_token_id(settings.pad_token_id, text.pad_token_id, self.eos_token_ids)
        self.is_open = torch.ones(batch_size, dtype=torch.bool, device=model.device)
        self._stopped: set[int] = set()
        self._num_prompt_tokens = input_ids.numel() if attention_mask is None else int(attention_mask.sum())
        self._num_cached = num_cached
        self._num_cached_tokens = num_cached * batch_size - (0 if cache is None else sum(cache.padding))
        self._num_new_tokens = 0
        self._seconds = [0.0, 0.0]

    def __next__(self) -> Tensor:
        """Compute one more token of every row."""
        if self._num_left == 0 or not bool(self.is_open.any()):
            raise StopIteration
        start = time.perf_counter()
        is_first = self._last is None
        tokens = self._step()
        self._num_left -= 1
        self._num_new_tokens += int(self.is_open.sum())  # waits for the device, so the clock is right
        self.is_open &= ~torch.isin(tokens, self._eos)
        self._last = tokens
        self._seconds[0 if is_first else 1] += time.perf_counter() - start
        return tokens

    def close(self, row: int) -> None:
        """End a row, because a stop string has come up in its text."""
        self.is_open[row] = False
        self._stopped.add(row)

    @property
    def finish_reasons(self) -> tuple[FinishReason, ...]:
        """Per row, why it ended; of a row that is still open, at a limit."""
        ended = (FinishReason.LENGTH if is_open else FinishReason.EOS for is_open in self.is_open.tolist())
        return tuple(FinishReason.STOP if row in self._stopped else reason for row, reason in enumerate(ended))

    @property
    def timing(self) -> Timing:
        """Of the steps taken so far."""
        num_first = 0 if self._last is None else self._prompt.shape[0]
        return Timing(
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_new_tokens=self._num_new_tokens,
            num_decoded_tokens=self._num_new_tokens - num_first,
            prefill_seconds=self._seconds[0],
            decode_seconds=self._seconds[1],
        )

    @torch.inference_mode()
    def _step(self) -> Tensor:
        if self._last is None:
            logits = self._model.prefill(
                self._prompt[:, self._num_cached :],
                pixel_values=self._pixel_values,
                attention_mask=self._attention_mask,
                cache=self.cache,
                chunk_size=self._settings.prefill_chunk_size,
            )
        else:
            logits = self._model(self._last[:, None], cache=self.cache, logits=Logits.LAST)
        tokens = self._choose(logits[:, -1])
        return torch.where(self.is_open, tokens, self._pad_token_id)

    def _choose(self, logits_BV: Tensor) -> Tensor:
        if not self._settings.has_penalties:
            tokens_B = select_tokens(logits_BV, self._settings, self._random)
        else:
            if self._history is None:
                self._history = TokenHistory(
                    self._prompt, self._attention_mask, self._settings, num_tokens=logits_BV.shape[-1]
                )
            tokens_B = select_tokens(self._history.penalize(logits_BV), self._settings, self._random)
            self._history.add(tokens_B)
        if self._settings.logprobs:
            self.logprobs = log_probabilities(logits_BV, tokens_B)
        return tokens_B


def generate(
    model: Llama4Model,
    input_ids: Tensor,
    *,
    settings: GenerationSettings,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Generation:
    """Generate until every row has ended or a limit is reached.

    Arguments and errors are those of `TokenStream`; `on_token` is called with the next token of every row, [B] int64,
    as soon as it is there. Stop strings are an error: they need a tokenizer, which `Pipeline` has.
    """
    if settings.stop:
        raise UsageError("stop strings need a tokenizer: use Pipeline, or settings without `stop`")
    stream = TokenStream(model, input_ids, settings=settings, attention_mask=attention_mask, pixel_values=pixel_values)
    columns, logprob_columns = [], []
    for tokens in stream:
        columns.append(tokens)
        if stream.logprobs is not None:
            logprob_columns.append(stream.logprobs)
        if on_token is not None:
            on_token(tokens)
    new_BL = torch.stack(columns, dim=1)
    rows = tuple(_until(row, stream.eos_token_ids) for row in new_BL.tolist())
    logprobs = torch.stack(logprob_columns, dim=1).tolist() if logprob_columns else []
    return Generation(
        sequences=torch.cat([input_ids.to(new_BL.device), new_BL], dim=1),
        new_token_ids=rows,
        finish_reasons=stream.finish_reasons,
        logprobs=tuple(tuple(of[: len(row)]) for of, row in zip(logprobs, rows, strict=True)) if logprobs else None,
        timing=stream.timing,
    )


def _until(row: list[int], eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens before the first one that ends a row."""
    end = next((index for index, token in enumerate(row) if token in eos_token_ids), len(row))
    return tuple(row[:end])


def _pad_token_id(wished: int | None, of_model: int | None, eos_token_ids: tuple[int, ...]) -> int:
    """The first that is a token; files say -1 for none."""
    candidates = [wished, of_model, *eos_token_ids, 0]
    return next(token for token in candidates if token is not None and token >= 0)
