"""A chat in which every turn computes its new tokens only.

The whole chat is rendered and tokenized again each turn, for only the checkpoint's template knows how messages go
together, and what it makes of earlier messages may change (many templates trim them). The KV cache is kept as far as
the tokens, and the images behind image tokens, are the same; the rest is taken back. A RoPE layer keeps the newest
chunk alone, so a difference that lies further back than that cannot be taken back, and all is computed again.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama4_quant.errors import UsageError
from llama4_quant.runtime.cache import KVCache
from llama4_quant.runtime.image_files import ImageSource
from llama4_quant.runtime.pipeline import ModelInputs, Pipeline, user_message
from llama4_quant.runtime.processor import ProcessedImage
from llama4_quant.runtime.sampling import GenerationSettings
from llama4_quant.runtime.streams import Completion, TextStreams
from llama4_quant.runtime.timing import Timing
from llama4_quant.runtime.tokenizer import Message


@dataclass(frozen=True, kw_only=True, slots=True)
class _Picture:
    """An image of the chat; no other one ever has its serial number."""

    serial: int
    image: ProcessedImage
    path: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prompt:
    """A rendered chat.

    Attributes:
        ids: its tokens.
        keys: what tells them apart: an id, or for a token of an image -1 - serial.
        spans: of each picture the columns of its first and its last image token.
    """

    ids: list[int]
    keys: list[int]
    spans: list[tuple[int, int]]


class Reply(Iterator[str]):
    """Yields an answer piece by piece; the chat goes on with it once it has ended, or was closed."""

    def __init__(self, streams: TextStreams, on_end: Callable[[Completion, KVCache | None], None]) -> None:
        """Read from streams of one row.

        Args:
            streams: the row.
            on_end: called once, with the answer and the cache, or None if a step failed: then nothing is known of it.
        """
        self._streams = streams
        self._on_end = on_end
        self._is_over = False

    def __next__(self) -> str:
        """The next piece of text, never empty."""
        if self._is_over:
            raise StopIteration
        try:
            return next(self._streams)[1]
        except StopIteration:
            self.close()
            raise
        except BaseException:
            self._end(is_sound=False)
            raise

    def close(self) -> None:
        """End the answer here. What there is of it stays in the chat; if that is nothing, the question goes too."""
        self._end(is_sound=True)

    @property
    def completion(self) -> Completion:
        """All that is known so far."""
        return self._streams.completions[0]

    @property
    def timing(self) -> Timing:
        """Of the tokens so far."""
        return self._streams.timing

    def _end(self, *, is_sound: bool) -> None:
        if not self._is_over:
            self._is_over = True
            self._on_end(self.completion, self._streams.cache if is_sound else None)


class ChatSession:
    """A chat with a model, one answer at a time.

    Attributes:
        system: the system message, or None; may be changed at any time.
        settings: how to generate; may be changed at any time.
    """

    def __init__(
        self, pipeline: Pipeline, *, settings: GenerationSettings | None = None, system: str | None = None
    ) -> None:
        """Begin an empty chat; `settings` instead of the checkpoint's."""
        self.system = system
        self.settings = settings or pipeline.settings
        self._pipeline = pipeline
        self._serials = itertools.count()
        self._history: list[Message] = []
        self._pictures: list[_Picture] = []
        self._cache: KVCache | None = None
        self._cached_keys: list[int] = []
        self._reply: Reply | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The chat so far, system message included; an image that came as a file has its `path`."""
        paths = iter(picture.path for picture in self._pictures)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *({**message, "content": _with_paths(message["content"], paths)} for message in self._history)]

    @property
    def num_cached_tokens(self) -> int:
        """Tokens whose keys and values are kept for the next turn."""
        return len(self._cached_keys)

    @property
    def num_cache_bytes(self) -> int:
        """Bytes of these keys and values, as allocated."""
        return 0 if self._cache is None else self._cache.num_bytes

    @property
    def max_tokens(self) -> int:
        """As long as a chat can get."""
        return self._pipeline.model.config.text.max_position_embeddings

    def check_takes_images(self) -> None:
        """See whether messages may come with images.

        Raises:
            UsageError: the model is text-only.
        """
        self._pipeline.check_takes_images()

    def send(self, text: str, images: Sequence[ImageSource] = ()) -> Reply:
        """Say something, with images in front if there are any, and get the answer.

        The random numbers of an answer follow from the seed and the number of answers before it.

        Raises:
            UsageError: an image that cannot be read, a chat that the template refuses, or one longer than the model's
                context. The chat is then as it was before.
        """
        if self._reply is not None:
            self._reply.close()
        try:
            self._reply = self._ask(user_message(text, len(images)), images)
        except Exception:
            raise
        except BaseException:  # an interruption: anything may be half done
            self._forget()
            raise
        return self._reply

    def reset(self) -> None:
        """Forget all but the system message."""
        if self._reply is not None:
            self._reply.close()
        self._history, self._pictures = [], []
        self._forget()

    def _ask(self, message: Message, images: Sequence[ImageSource]) -> Reply:
        start = time.perf_counter()
        pictures = [
            _Picture(serial=next(self._serials), image=image, path=_path(source))
            for image, source in zip(self._pipeline.process(images), images, strict=True)
        ]
        everyone = [*self._pictures, *pictures]
        prompt = self._render([*self._history, message], everyone)
        num_kept = self._keep(prompt)
        shown = zip(everyone, prompt.spans, strict=True)
        tiles = [picture.image.tiles for picture, (first, _) in shown if first >= num_kept]
        streams = self._pipeline.stream(
            ModelInputs(
                input_ids=torch.tensor([prompt.ids]),
                attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.int64),
                pixel_values=torch.cat(tiles) if tiles else None,
            ),
            self.settings,
            cache=self._cache,
            numbers=[len(self._history) // 2],
            prepare_seconds=time.perf_counter() - start,
        )
        return Reply(streams, partial(self._answered, message, pictures, prompt.keys))

    def _answered(
        self,
        message: Message,
        pictures: Sequence[_Picture],
        keys: Sequence[int],
        completion: Completion,
        cache: KVCache | None,
    ) -> None:
        """The reply to a message has ended; `keys` are those of the prompt."""
        self._reply = None
        self._forget()
        if completion.text or completion.finish_reason is not None:
            self._history += [message, {"role": "assistant", "content": completion.text}]
            self._pictures += pictures
        if cache is not None:
            # The last token was given, but not yet computed with.
            self._cached_keys = [*keys, *completion.token_ids][: cache.length]
            self._cache = cache

    def _render(self, history: Sequence[Message], pictures: Sequence[_Picture]) -> _Prompt:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        text = self._pipeline.tokenizer.render_chat([*system, *history])
        ids = self._pipeline.encode(text, [picture.image for picture in pictures])
        keys, spans = list(ids), []
        places = [column for column, token in enumerate(ids) if token == self._pipeline.model.config.image_token_index]
        sizes = [picture.image.tiles.shape[0] * self._tokens_per_tile() for picture in pictures]
        if pictures and len(places) != sum(sizes):
            raise UsageError(
                f"the chat has {len(places)} image tokens and its images make {sum(sizes)}; leave the names of special "
                "tokens out of messages"
            )
        for picture, size in zip(pictures, sizes, strict=True):
            own, places = places[:size], places[size:]
            spans.append((own[0], own[-1]))
            for column in own:
                keys[column] = -1 - picture.serial
        return _Prompt(ids=ids, keys=keys, spans=spans)

    def _tokens_per_tile(self) -> int:
        assert self._pipeline.processor is not None
        return self._pipeline.processor.settings.tokens_per_tile

    def _keep(self, prompt: _Prompt) -> int:
        """Take the cache back to what it has in common with a prompt; gives the number of its tokens."""
        pairs = zip(self._cached_keys, prompt.keys, strict=False)
        num_same = next((column for column, (a, b) in enumerate(pairs) if a != b), len(self._cached_keys))
        num_same = min(num_same, len(prompt.keys) - 1)  # the last token has to be computed, for its logits
        # An image is computed as a whole or not at all.
        num_same = next((first for first, last in prompt.spans if first < num_same <= last), num_same)
        if self._cache is None or num_same == 0 or not self._cache.rewind(num_same):
            self._forget()
            return 0
        self._cached_keys = self._cached_keys[:num_same]
        return num_same

    def _forget(self) -> None:
        self._cache, self._cached_keys = None, []


def _path(source: ImageSource) -> str | None:
    return str(source) if isinstance(source, (str, Path)) else None


def _with_paths(content: Any, paths: Iterator[str | None]) -> Any:
    """A message's content, its images with the next paths."""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        path = next(paths) if part["type"] == "image" else None
        parts.append(dict(part) if path is None else {**part, "path": path})
    return parts
