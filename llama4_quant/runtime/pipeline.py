"""A checkpoint ready to talk to: model, tokenizer, image processor and the checkpoint's generation defaults."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama4_quant.checkpoint.source import resolve
from llama4_quant.errors import UsageError
from llama4_quant.runtime.cache import KVCache
from llama4_quant.runtime.generate import TokenStream
from llama4_quant.runtime.image_files import ImageSource
from llama4_quant.runtime.loader import load
from llama4_quant.runtime.model import Llama4Model
from llama4_quant.runtime.processor import ImageProcessor, ProcessedImage, ProcessorSettings
from llama4_quant.runtime.sampling import GenerationSettings
from llama4_quant.runtime.streams import Completion, TextStream, TextStreams
from llama4_quant.runtime.timing import FinishReason, Timing
from llama4_quant.runtime.tokenizer import Message, Tokenizer, pad_left


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInputs:
    """Prompts as the model takes them.

    Attributes:
        input_ids: [B, P] int64, padded on the left.
        attention_mask: [B, P] int64, 0 = padding.
        pixel_values: [tiles, 3, S, S] bfloat16, of all rows, or None without images.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Completions:
    """What a batch of prompts was completed with.

    Attributes:
        rows: one for each prompt, in order.
        timing: of the whole batch.
    """

    rows: tuple[Completion, ...]
    timing: Timing

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each row."""
        return tuple(row.text for row in self.rows)

    @property
    def finish_reasons(self) -> tuple[FinishReason | None, ...]:
        """Why each row ended."""
        return tuple(row.finish_reason for row in self.rows)


class Pipeline:
    """Completes prompts and answers chats, with images.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        settings: the checkpoint's generation defaults; vary them with `dataclasses.replace`.
        processor: None for a text-only checkpoint.
    """

    def __init__(
        self,
        model: Llama4Model,
        tokenizer: Tokenizer,
        settings: GenerationSettings,
        processor: ImageProcessor | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        scheme: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = torch.bfloat16,
        *,
        revision: str | None = None,
        **settings: Any,
    ) -> "Pipeline":
        """Load everything from a local directory or a Hub id; arguments, also `settings`, and errors as of `load`."""
        folder = resolve(str(path_or_id), revision)
        return cls.around(load(folder, scheme, device, dtype, **settings), folder)

    @classmethod
    def around(cls, model: Llama4Model, folder: Path) -> "Pipeline":
        """Put a loaded model together with the other files of its checkpoint.

        Raises:
            CheckpointError: there is no tokenizer.
            ConfigError: generation or processor settings are damaged, or missing for a model with vision.
        """
        vision = model.config.vision
        return cls(
            model,
            Tokenizer.from_folder(folder),
            GenerationSettings.from_folder(folder),
            None if vision is None else ImageProcessor(ProcessorSettings.from_folder(folder, vision)),
        )

    def chat(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageSource] = (),
        settings: GenerationSettings | None = None,
    ) -> TextStream:
        """Answer the last message of a chat, as a stream of text.

        Args:
            messages: the chat so far; `user_message` makes one.
            images: one for each {"type": "image"} in the messages, in order.
            settings: instead of the checkpoint's.

        Raises:
            UsageError: images that cannot be read or are too few or many, no chat template, a prompt too long.
        """
        start = time.perf_counter()
        return self._stream(self.tokenizer.render_chat(messages), images, settings, start)

    def complete(
        self, prompt: str, images: Sequence[ImageSource] = (), settings: GenerationSettings | None = None
    ) -> TextStream:
        """Continue a plain prompt, with one `<|image|>` in it per image; otherwise as `chat`."""
        return self._stream(prompt, images, settings, time.perf_counter())

    def complete_batch(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[ImageSource]] | None = None,
        settings: GenerationSettings | None = None,
        *,
        first_row: int = 0,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Completions:
        """Continue several prompts at once.

        Args:
            prompts: plain, or rendered by `tokenizer.render_chat`.
            images: one list per prompt; None for no images.
            settings: instead of the checkpoint's.
            first_row: number of the first prompt. A row's random numbers depend on the seed and its number, so that a
                list of prompts gives the same answers in batches of any size.
            on_text: called with a row's number in this batch, from 0, and its next piece of text.

        Raises:
            UsageError: as for `chat`.
        """
        start = time.perf_counter()
        inputs = self.prepare(prompts, [()] * len(prompts) if images is None else images)
        numbers = range(first_row, first_row + len(prompts))
        streams = self.stream(inputs, settings, numbers=numbers, prepare_seconds=time.perf_counter() - start)
        for row, piece in streams:
            if on_text is not None:
                on_text(row, piece)
        return Completions(rows=streams.completions, timing=streams.timing)

    def stream(
        self,
        inputs: ModelInputs,
        settings: GenerationSettings | None = None,
        *,
        cache: KVCache | None = None,
        numbers: Sequence[int] | None = None,
        prepare_seconds: float = 0.0,
    ) -> TextStreams:
        """Text of all rows, piece by piece.

        Args:
            inputs: from `prepare`; with a cache, `pixel_values` of the images that are not in it.
            settings: instead of the checkpoint's.
            cache: of one that generated before, with the first tokens of these prompts.
            numbers: each row's number; None counts from 0.
            prepare_seconds: what to say in the timing.

        Raises:
            UsageError: a prompt too long.
        """
        settings = settings or self.settings
        tokens = TokenStream(
            self.model,
            inputs.input_ids,
            settings=settings,
            attention_mask=inputs.attention_mask,
            pixel_values=inputs.pixel_values,
            cache=cache,
            rows=numbers,
        )
        return TextStreams(
            tokens,
            self.tokenizer,
            num_prompt_tokens=inputs.attention_mask.sum(dim=1).tolist(),
            stop=settings.stop,
            prepare_seconds=prepare_seconds,
        )

    def _stream(
        self, prompt: str, images: Sequence[ImageSource], settings: GenerationSettings | None, start: float
    ) -> TextStream:
        inputs = self.prepare([prompt], [images])
        return TextStream(self.stream(inputs, settings, prepare_seconds=time.perf_counter() - start))

    def prepare(self, prompts: Sequence[str], images: Sequence[Sequence[ImageSource]]) -> ModelInputs:
        """Expand images, tokenize (with <|begin_of_text|>) and pad.

        Raises:
            UsageError: images for a text-only model, or that cannot be read, or too few or many of them.
        """
        if len(images) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts, but images for {len(images)}; give one list per prompt")
        processed = [self.process(sources) for sources in images]
        rows = [self.encode(prompt, row_images) for prompt, row_images in zip(prompts, processed, strict=True)]
        tiles = [image.tiles for row_images in processed for image in row_images]
        batch = pad_left(rows, self.tokenizer.pad_token_id or 0)
        return ModelInputs(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=torch.cat(tiles) if tiles else None,
        )

    def process(self, sources: Sequence[ImageSource]) -> list[ProcessedImage]:
        """Images as the model takes them.

        Raises:
            UsageError: the model is text-only, or an image cannot be read.
        """
        if not sources:
            return []
        processor = self.check_takes_images()
        return [processor.process(source) for source in sources]

    def check_takes_images(self) -> ImageProcessor:
        """What prepares images.

        Raises:
            UsageError: the model is text-only.
        """
        if self.processor is None:
            raise UsageError("this checkpoint is text-only: it takes no images")
        return self.processor

    def encode(self, prompt: str, images: Sequence[ProcessedImage] = ()) -> list[int]:
        """Token ids of a prompt, with <|begin_of_text|> in front and each image's tokens for its `<|image|>`.

        Raises:
            UsageError: too few or too many images.
        """
        expanded = prompt if self.processor is None else self.processor.expand(prompt, images)
        return self.tokenizer.encode(expanded, bos=True)


def user_message(text: str, num_images: int = 0) -> Message:
    """A chat message of the user's: images first, then text."""
    if num_images == 0:
        return {"role": "user", "content": text}
    return {
        "role": "user",
        "content": [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": text}],
    }
