"""Text to token ids and back: a thin wrapper around transformers' AutoTokenizer, and streaming decode.

Two things are made explicit here. Whether <|begin_of_text|> goes in front is decided by this module, never by the
tokenizer file's post-processor: rendered chats start with it already, and a second one is a silent loss of quality.
And text comes out in pieces that end between characters: one character of UTF-8 may be spread over several tokens.

Shape letters: B rows, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama4_quant.checkpoint.json_files import one_line
from llama4_quant.errors import CheckpointError, UsageError
from llama4_quant.runtime.bounded import BoundedError, bounded

Message = Mapping[str, Any]
"""A role and a content: a text, or a list of {"type": "image"} and {"type": "text", "text": ...}."""

REPLACEMENT = "\ufffd"
"""What decoders give for bytes that are not UTF-8; at the end of a text: for a character that is not complete yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """Rows of different lengths, padded on the left: `input_ids` and `attention_mask` [B, T] int64, 0 = padding."""

    input_ids: Tensor
    attention_mask: Tensor


class Tokenizer:
    """Encodes, decodes and renders chats."""

    def __init__(self, wrapped: Any) -> None:
        """Wrap a fast tokenizer of transformers."""
        self._wrapped = wrapped

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Load `tokenizer.json` and what belongs to it from a checkpoint; code in the checkpoint is never run.

        Raises:
            UsageError: transformers is not installed.
            CheckpointError: there is no tokenizer, or it cannot be read.
        """
        try:
            from transformers import AutoTokenizer  # noqa: PLC0415 - an optional dependency, slow to import
        except ImportError as error:
            raise UsageError("text needs transformers' tokenizers; pip install 'llama4-quant[transformers]'") from error
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{folder}: no tokenizer.json; copy the tokenizer's files from the original checkpoint"
            )
        try:
            wrapped = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # damaged files raise nearly anything, from Rust too
            raise CheckpointError(
                f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {one_line(error)}); copy its files "
                "again"
            ) from error
        return cls(wrapped)

    @property
    def bos_token_id(self) -> int | None:
        """Of <|begin_of_text|>."""
        return self._special(self._wrapped.bos_token_id)

    @property
    def eos_token_id(self) -> int | None:
        """Of the token that ends a text; generation_config.json may name more."""
        return self._special(self._wrapped.eos_token_id)

    @property
    def pad_token_id(self) -> int | None:
        """Of padding, if the tokenizer has it."""
        return self._special(self._wrapped.pad_token_id)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        return self._wrapped.chat_template is not None

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Token ids; special tokens that are spelled out in the text become themselves.

        Args:
            text: any text.
            bos: put <|begin_of_text|> in front, unless the text starts with it or the tokenizer has none.
        """
        # verbose=False: no warning about texts longer than the model's context, which an evaluation cuts anyway
        ids: list[int] = self._wrapped.encode(text, add_special_tokens=False, verbose=False)
        if bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of token ids, without special tokens unless they are kept; broken UTF-8 becomes U+FFFD."""
        text: str = self._wrapped.decode(
            list(ids), skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False
        )
        return text

    def render_chat(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """A chat as text, with <|begin_of_text|> and one <|image|> per image.

        The template comes with the checkpoint: it runs in transformers' sandbox, with bounded time and memory.

        Args:
            messages: the chat so far.
            generation_prompt: end ready for the assistant's answer; without it, after the last message.

        Raises:
            UsageError: no template, no message, or the template refuses the messages or takes too long.
        """
        if not self.has_chat_template:
            raise UsageError("this checkpoint has no chat template; complete a plain prompt instead")
        if not messages:
            raise UsageError("a chat needs at least one message")
        conversation = [dict(message) for message in messages]
        try:
            return bounded(
                lambda: self._wrapped.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=generation_prompt
                )
            )
        except BoundedError as error:
            raise UsageError(f"the chat template does not take these messages: {one_line(error)}") from error

    @staticmethod
    def _special(token_id: object) -> int | None:
        return token_id if isinstance(token_id, int) else None


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> TokenBatch:
    """Make a rectangle of rows of token ids.

    Raises:
        UsageError: no rows, or an empty one.
    """
    if not rows or not all(rows):
        raise UsageError("a batch needs at least one prompt, and every prompt at least one token")
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, length - len(row) :] = torch.tensor(row)
        attention_mask[index, length - len(row) :] = 1
    return TokenBatch(input_ids=input_ids, attention_mask=attention_mask)


class StreamDecoder:
    """Decodes token by token; the pieces put together are `Tokenizer.decode` of all tokens.

    Holds back at most one unfinished character: a byte-level decoder gives exactly one U+FFFD for an unfinished
    character at the end of a text. Ids are decoded together from the last place where a piece ended with a finished
    character, so a token costs the same however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._num_given = 0

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; may be empty."""
        self._pending.append(token_id)
        text = self._tokenizer.decode(self._pending)
        if text.endswith(REPLACEMENT):
            return self._give(text[:-1])
        piece = self._give(text)
        self._pending, self._num_given = [], 0
        return piece

    def finish(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD."""
        piece = self._give(self._tokenizer.decode(self._pending)) if self._pending else ""
        self._pending, self._num_given = [], 0
        return piece

    def _give(self, text: str) -> str:
        piece = text[self._num_given :]
        self._num_given = len(text)
        return piece
