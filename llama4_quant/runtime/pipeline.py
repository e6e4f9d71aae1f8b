"""A checkpoint ready to talk to: model, tokenizer, image processor and the checkpoint's generation defaults."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llama4_quant.checkpoint.source import resolve
from llama4_quant.errors import UsageError
from llama4_quant.runtime.generate import Timing, TokenStream, generate
from llama4_quant.runtime.image_files import ImageSource
from llama4_quant.runtime.loader import load
from llama4_quant.runtime.model import Llama4Model
from llama4_quant.runtime.processor import ImageProcessor, ProcessorSettings
from llama4_quant.runtime.sampling import GenerationSettings
from llama4_quant.runtime.tokenizer import Message, StreamDecoder, Tokenizer, pad_left


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
    """What a batch of prompts was completed with."""

    texts: tuple[str, ...]
    timing: Timing


class TextStream(Iterator[str]):
    """Yields text as soon as it is certain; ends where the model ends or at a limit.

    Attributes:
        token_ids: new tokens so far, without the one that ended the text.
    """

    def __init__(self, tokens: TokenStream, tokenizer: Tokenizer) -> None:
        """Read from a stream of one row."""
        self.token_ids: list[int] = []
        self._tokens = tokens
        self._decoder = StreamDecoder(tokenizer)

    def __next__(self) -> str:
        """The next piece of text, never empty."""
        for token in self._tokens:
            token_id = int(token)
            if token_id in self._tokens.eos_token_ids:
                break
            self.token_ids.append(token_id)
            if piece := self._decoder.push(token_id):
                return piece
        if piece := self._decoder.finish():
            return piece
        raise StopIteration

    @property
    def timing(self) -> Timing:
        """Of the tokens so far."""
        return self._tokens.timing


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
    ) -> "Pipeline":
        """Load everything from a local directory or a Hub id; arguments and errors as of `load`."""
        folder = resolve(str(path_or_id), revision)
        return cls.around(load(folder, scheme, device, dtype), folder)

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
        return self.complete(self.tokenizer.render_chat(messages), images, settings)

    def complete(
        self, prompt: str, images: Sequence[ImageSource] = (), settings: GenerationSettings | None = None
    ) -> TextStream:
        """Continue a plain prompt, with one `<|image|>` in it per image; otherwise as `chat`."""
        inputs = self.prepare([prompt], [images])
        stream = TokenStream(
            self.model, inputs.input_ids, settings=settings or self.settings, pixel_values=inputs.pixel_values
        )
        return TextStream(stream, self.tokenizer)

    def complete_batch(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[ImageSource]] | None = None,
        settings: GenerationSettings | None = None,
    ) -> Completions:
        """Continue several prompts at once; `images` has one list per prompt."""
        inputs = self.prepare(prompts, [()] * len(prompts) if images is None else images)
        generation = generate(
            self.model,
            inputs.input_ids,
            settings=settings or self.settings,
            attention_mask=inputs.attention_mask,
            pixel_values=inputs.pixel_values,
        )
        texts = tuple(self.tokenizer.decode(row) for row in generation.new_token_ids)
        return Completions(texts=texts, timing=generation.timing)

    def prepare(self, prompts: Sequence[str], images: Sequence[Sequence[ImageSource]]) -> ModelInputs:
        """Expand images, tokenize (with <|begin_of_text|>) and pad.

        Raises:
            UsageError: images for a text-only model, or that cannot be read, or too few or many of them.
        """
        if len(images) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts, but images for {len(images)}; give one list per prompt")
        tiles: list[Tensor] = []
        rows = []
        for prompt, sources in zip(prompts, images, strict=True):
            expanded, new_tiles = self._expand(prompt, sources)
            rows.append(self.tokenizer.encode(expanded, bos=True))
            tiles += new_tiles
        batch = pad_left(rows, self.tokenizer.pad_token_id or 0)
        return ModelInputs(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=torch.cat(tiles) if tiles else None,
        )

    def _expand(self, prompt: str, sources: Sequence[ImageSource]) -> tuple[str, list[Tensor]]:
        if self.processor is None:
            if sources:
                raise UsageError("this checkpoint is text-only: it takes no images")
            return prompt, []
        images = [self.processor.process(source) for source in sources]
        return self.processor.expand(prompt, images), [image.tiles for image in images]


def user_message(text: str, num_images: int = 0) -> Message:
    """A chat message of the user's: images first, then text."""
    if num_images == 0:
        return {"role": "user", "content": text}
    return {
        "role": "user",
        "content": [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": text}],
    }
