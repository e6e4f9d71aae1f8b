"""Documents to token ids and tiles of pixels, exactly as the runtime would feed them to the model.

Shape letters: N tiles, S side of a tile, L positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from llama4_quant.calibration.documents import ChatDocument, Document, TextDocument, TokenDocument
from llama4_quant.config import Llama4Config
from llama4_quant.errors import ConfigError, UsageError
from llama4_quant.runtime.processor import ImageProcessor, ProcessedImage, ProcessorSettings
from llama4_quant.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One document.

    Attributes:
        is_sample: it is a sample of its own; otherwise it is packed together with others.
        pixel_values: [N, 3, S, S] bfloat16, or None without images.
        num_images: of which these are the tiles.
    """

    input_ids: Sequence[int]
    is_sample: bool
    pixel_values: Tensor | None = None
    num_images: int = 0


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Tokenizer, chat template and image processor of one checkpoint."""

    folder: Path
    processor: ImageProcessor | None
    config: Llama4Config
    max_length: int

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded when there is text: pretokenized samples need none, and importing transformers takes a second.

        Raises:
            CheckpointError: there is none.
            UsageError: transformers is not installed.
        """
        return Tokenizer.from_folder(self.folder)

    @classmethod
    def from_folder(cls, folder: Path, max_length: int) -> "Encoder":
        """Read a checkpoint's config.json and, if it has vision, processor settings.

        Raises:
            ConfigError: config.json or the processor's settings cannot be used.
            UsageError: the model does not take samples of this length.
        """
        config = Llama4Config.from_file(folder / "config.json")
        longest = config.text.max_position_embeddings
        if max_length > longest:
            raise UsageError(f"max_seq_length is {max_length:,}, expected at most the model's {longest:,} positions")
        vision = config.vision
        processor = None if vision is None else ImageProcessor(ProcessorSettings.from_folder(folder, vision))
        return cls(folder=folder, processor=processor, config=config, max_length=max_length)

    def encode(self, document: Document) -> Encoded:
        """Tokens of a document; a blank one has none.

        Raises:
            UsageError: the template, the processor or the model does not take it; or it is too long to be one sample.
        """
        try:
            return self._encode(document)
        except UsageError as error:
            raise UsageError(f"{document.where}: {error}") from error

    def _encode(self, document: Document) -> Encoded:
        if isinstance(document, TokenDocument):
            self._check_tokens(document.input_ids)
            self._check_patches(document.input_ids, 0)
            return Encoded(input_ids=document.input_ids, is_sample=True)
        if isinstance(document, TextDocument) and not document.images and not document.text.strip():
            return Encoded(input_ids=(), is_sample=False)
        prompt = self._prompt(document)
        images = self._images(document)
        if images and self.processor is not None:
            prompt = self.processor.expand(prompt, images)
        ids = self.tokenizer.encode(prompt, bos=True)
        self._check_vocabulary(ids)
        self._check_patches(ids, sum(len(image.tiles) for image in images))
        if not images:
            return Encoded(input_ids=ids, is_sample=False)
        pixel_values = torch.cat([image.tiles for image in images])
        return Encoded(input_ids=self._cut(ids), is_sample=True, pixel_values=pixel_values, num_images=len(images))

    def _prompt(self, document: ChatDocument | TextDocument) -> str:
        if isinstance(document, TextDocument):
            return document.text
        return self.tokenizer.render_chat(document.messages, generation_prompt=False)

    def _images(self, document: ChatDocument | TextDocument) -> list[ProcessedImage]:
        if not document.images:
            return []
        if self.processor is None:
            raise UsageError("this checkpoint is text-only: it takes no images; give text alone")
        least = len(document.images) * self.processor.settings.tokens_per_tile
        if least > self.max_length:  # before any is decoded
            raise self._too_long(f"{len(document.images)} image(s) take {least:,} tokens or more")
        return [self.processor.process(image) for image in document.images]

    def _cut(self, ids: list[int]) -> list[int]:
        """Without what is beyond the sample's length, which must not reach into an image."""
        if len(ids) <= self.max_length:
            return ids
        last_patch = len(ids) - 1 - ids[::-1].index(self.config.image_token_index or 0)
        needed = last_patch + 2  # with the token that ends the image
        if needed > self.max_length:
            raise self._too_long(f"up to the end of its last image it has {needed:,} tokens")
        return ids[: self.max_length]

    def _too_long(self, what: str) -> UsageError:
        return UsageError(
            f"{what}, and a sample has {self.max_length:,}; give a larger --max-seq-length, smaller images or fewer"
        )

    def _check_tokens(self, ids: Sequence[int]) -> None:
        vocab_size = self.config.text.vocab_size
        wrong = next((index for index, token in enumerate(ids) if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UsageError(
                f"input_ids[{wrong}] is {ids[wrong]}, expected 0 to {vocab_size - 1}; tokenize with this checkpoint's "
                "tokenizer"
            )
        if len(ids) > self.max_length:
            raise UsageError(
                f"has {len(ids):,} tokens, and pretokenized samples are not cut; give --max-seq-length {len(ids)}"
            )

    def _check_vocabulary(self, ids: Sequence[int]) -> None:
        if max(ids) >= self.config.text.vocab_size:
            raise ConfigError(
                f"the tokenizer gives token {max(ids)}, but config.json says that vocab_size is "
                f"{self.config.text.vocab_size}; copy the tokenizer that belongs to this checkpoint"
            )

    def _check_patches(self, ids: Sequence[int], num_tiles: int) -> None:
        """The model puts one feature of an image in the place of every such token."""
        if self.processor is None or self.config.image_token_index is None:
            return
        expected = num_tiles * self.processor.settings.tokens_per_tile
        found = ids.count(self.config.image_token_index)
        if found != expected:
            raise UsageError(
                f"has {found:,} tokens {self.processor.settings.tokens.patch} (id {self.config.image_token_index}), "
                f"which stand for pixels of images, expected {expected:,}; take them out, and show images as images"
            )


class Packer:
    """Cuts the tokens of many documents into samples of exactly one length.

    Documents are put one after another, each with <|begin_of_text|> in front. Every sample starts with that token, as
    every prompt of the model does, and as the evaluation's windows do: where a sample starts inside a document, it is
    inserted. Without it the first token, whichever it is, would take its part as the position that attention rests on,
    and its outsized activations would be calibrated on. What does not fill a sample at the end is dropped.
    """

    def __init__(self, length: int, bos_token_id: int | None) -> None:
        self._length = length
        self._bos = bos_token_id
        self._pending: list[int] = []

    @property
    def num_pending(self) -> int:
        """Tokens that no sample has yet."""
        return len(self._pending)

    def push(self, input_ids: Sequence[int]) -> Iterator[list[int]]:
        """Add a document; gives the samples, of exactly the packer's length, that are full."""
        self._pending += input_ids
        start = 0
        while start < len(self._pending):
            head = [] if self._bos is None or self._pending[start] == self._bos else [self._bos]
            end = start + self._length - len(head)
            if end > len(self._pending):
                break
            yield [*head, *self._pending[start:end]]
            start = end
        del self._pending[:start]
