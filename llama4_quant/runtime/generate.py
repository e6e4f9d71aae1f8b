"""Token by token: prefill the prompt once, then feed every new token back, with a KV cache.

A batch runs in lock step. Prompts are padded on the left, so that all rows end in the same column and their next
tokens are computed together; a row that has ended is filled with padding until the longest one ends.

Shape letters: B rows, P prompt columns, L new columns, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_quant.errors import UsageError
from llama4_quant.runtime.model import Llama4Model, Logits
from llama4_quant.runtime.sampling import GenerationSettings, select_tokens

_RESERVED_COLUMNS = 256
"""Columns of cache allocated ahead; it grows by itself when generation goes on for longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Where the time of a generation went.

    Attributes:
        num_prompt_tokens: of all rows, without padding.
        num_new_tokens: of all rows, without padding, with the tokens that ended them.
        num_decoded_tokens: those of them that took a step of their own: all but each row's first.
        prefill_seconds: until the first token of every row.
        decode_seconds: all later steps together; time that the caller takes between steps is not counted.
    """

    num_prompt_tokens: int
    num_new_tokens: int
    num_decoded_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Decoded tokens of all rows per second; None if there was no decode step."""
        return self.num_decoded_tokens / self.decode_seconds if self.num_decoded_tokens else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A finished generation.

    Attributes:
        sequences: [B, P + L] int64: the prompts as given, then the new tokens, padded on the right.
        new_token_ids: per row, without padding and without the token that ended it.
        ended: per row, whether it ended by itself, not at a limit.
    """

    sequences: Tensor
    new_token_ids: tuple[tuple[int, ...], ...]
    ended: tuple[bool, ...]
    timing: Timing


class TokenStream(Iterator[Tensor]):
    """Yields the next token of every row, [B] int64, until all rows have ended or a limit is reached.

    An ended row yields padding. The limits are `max_new_tokens` and the model's `max_position_embeddings`.

    Attributes:
        eos_token_ids: what ends a row.
        is_open: [B] bool: rows that have not ended yet.
    """

    def __init__(
        self,
        model: Llama4Model,
        input_ids: Tensor,
        *,
        settings: GenerationSettings,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> None:
        """Prepare; nothing is computed before the first token is asked for.

        Args:
            model: any Llama 4.
            input_ids: [B, P] integers, padded on the left.
            settings: what to generate.
            attention_mask: [B, P], 0 = padding; None for no padding.
            pixel_values: [tiles, 3, S, S], the tiles of all rows' images, row by row.

        Raises:
            UsageError: the prompt is empty, or leaves no position for a new token.
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
        self._model = model
        self._prompt = input_ids.to(model.device)
        self._attention_mask = None if attention_mask is None else attention_mask.to(model.device)
        self._pixel_values = pixel_values
        self._settings = settings
        self._num_left = min(settings.max_new_tokens, num_free)
        self._cache = model.new_cache(batch_size, num_columns + min(self._num_left, _RESERVED_COLUMNS))
        self._generator = torch.Generator(model.device).manual_seed(settings.seed)
        self._last: Tensor | None = None
        self.eos_token_ids = text.eos_token_ids if settings.eos_token_ids is None else settings.eos_token_ids
        self._eos = torch.tensor(self.eos_token_ids, dtype=torch.int64, device=model.device)
        self._pad_token_id = _pad_token_id(settings.pad_token_id, text.pad_token_id, self.eos_token_ids)
        self.is_open = torch.ones(batch_size, dtype=torch.bool, device=model.device)
        self._num_prompt_tokens = input_ids.numel() if attention_mask is None else int(attention_mask.sum())
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

    @property
    def timing(self) -> Timing:
        """Of the steps taken so far."""
        num_first = 0 if self._last is None else self._prompt.shape[0]
        return Timing(
            num_prompt_tokens=self._num_prompt_tokens,
            num_new_tokens=self._num_new_tokens,
            num_decoded_tokens=self._num_new_tokens - num_first,
            prefill_seconds=self._seconds[0],
            decode_seconds=self._seconds[1],
        )

    @torch.inference_mode()
    def _step(self) -> Tensor:
        if self._last is None:
            logits = self._model(
                self._prompt,
                pixel_values=self._pixel_values,
                attention_mask=self._attention_mask,
                cache=self._cache,
                logits=Logits.LAST,
            )
        else:
            logits = self._model(self._last[:, None], cache=self._cache, logits=Logits.LAST)
        tokens = select_tokens(logits[:, -1], self._settings, self._generator)
        return torch.where(self.is_open, tokens, self._pad_token_id)


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
    as soon as it is there.
    """
    stream = TokenStream(model, input_ids, settings=settings, attention_mask=attention_mask, pixel_values=pixel_values)
    columns = []
    for tokens in stream:
        columns.append(tokens)
        if on_token is not None:
            on_token(tokens)
    new_BL = torch.stack(columns, dim=1)
    rows = [_until(row, stream.eos_token_ids) for row in new_BL.tolist()]
    return Generation(
        sequences=torch.cat([input_ids.to(new_BL.device), new_BL], dim=1),
        new_token_ids=tuple(rows),
        ended=tuple(not is_open for is_open in stream.is_open.tolist()),
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
