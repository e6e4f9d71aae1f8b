"""Records of calibration data, from files of strangers, parsed once into documents.

A record is a mapping with one of the columns `input_ids` (tokens, taken as they are), `messages` (a chat with roles),
`conversations` (the same as ShareGPT spells it) or `text` (or whatever column the user names), in this order of
precedence; null means absent. Images come in the column `images` (or `image`), or as parts of a chat's content.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_quant.checkpoint.json_files import shown
from llama4_quant.errors import UsageError
from llama4_quant.runtime.image_files import ImageSource
from llama4_quant.runtime.processor import ImageTokens
from llama4_quant.runtime.tokenizer import Message

IMAGE_MARK = ImageTokens().image
"""Where an image goes in a text; LLaVA's `<image>` means the same in a record that has images."""

COLUMNS = ("input_ids", "messages", "conversations", "images", "image")
"""All that is read of a record, besides the text."""

_ANY_MARK = re.compile(rf"{re.escape(IMAGE_MARK)}|<image>")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDocument:
    """Token ids that somebody else chose; one sample, as it is."""

    where: str
    input_ids: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDocument:
    """A text with one `<|image|>` for each of its images."""

    where: str
    text: str
    images: tuple[ImageSource, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatDocument:
    """Messages as chat templates take them, with one image part or `<|image|>` for each image."""

    where: str
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = ()


Document = TokenDocument | TextDocument | ChatDocument


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordReader:
    """What a file's records mean.

    Attributes:
        text_column: where plain text is.
        folder: what paths of images are relative to; None if the records cannot point to files.
    """

    text_column: str
    folder: Path | None

    def document(self, record: Mapping[str, Any], where: str) -> Document:
        """Parse one record; `where` opens every error message.

        Raises:
            UsageError: no known column, a value of the wrong type, or an image that is not there.
        """
        if record.get("input_ids") is not None:
            return TokenDocument(where=where, input_ids=_token_ids(record["input_ids"], where))
        images = tuple(self._image(value, where) for value in _image_values(record))
        if record.get("messages") is not None:
            return self._chat(_items(record["messages"], "messages", where), images, where)
        if record.get("conversations") is not None:
            turns = _items(record["conversations"], "conversations", where)
            return self._chat([_from_sharegpt(turn, where) for turn in turns], images, where)
        if record.get(self.text_column) is not None:
            text = _string(record[self.text_column], self.text_column, where)
            return TextDocument(where=where, text=_with_marks(text, len(images)), images=images)
        wanted = ", ".join(dict.fromkeys(("input_ids", "messages", "conversations", self.text_column)))
        raise UsageError(
            f"{where}: expected one of {wanted}, found {shown(sorted(map(str, record)))}; name the column that holds "
            "text with --text-column"
        )

    def _chat(self, values: Sequence[Any], images: tuple[ImageSource, ...], where: str) -> ChatDocument:
        own: list[ImageSource | None] = []
        messages = [self._message(value, own, where) for value in values]
        if own:
            return ChatDocument(where=where, messages=tuple(messages), images=_fill(own, images, where))
        return ChatDocument(where=where, messages=tuple(_with_images(messages, len(images))), images=images)

    def _message(self, value: Any, own: list[ImageSource | None], where: str) -> dict[str, Any]:
        """One message; images of its parts are appended to `own`, None for a part that only marks a place."""
        if not isinstance(value, Mapping):
            raise UsageError(f"{where}: expected messages with role and content, found {shown(value)}")
        message = {str(key): item for key, item in value.items() if item is not None}
        message["role"] = _string(message.get("role"), "role", where)
        content = message.get("content")
        if isinstance(content, list):
            message["content"] = [self._part(part, own, where) for part in content]
        else:
            message["content"] = _string(content, "content", where)
        return message

    def _part(self, part: Any, own: list[ImageSource | None], where: str) -> dict[str, str]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            return {"type": "text", "text": _string(part.get("text"), "text", where)}
        if kind != "image":
            raise UsageError(
                f'{where}: expected content parts like {{"type": "text", "text": ...}} or '
                f'{{"type": "image", "path": FILE}}, found {shown(part)}'
            )
        given = [part[key] for key in ("path", "image") if part.get(key) is not None]
        own.append(self._image(given[0], where) if given else None)
        return {"type": "image"}

    def _image(self, value: Any, where: str) -> ImageSource:
        """A path, or what Parquet files hold: {"bytes": content or null, "path": name or null}."""
        if isinstance(value, Mapping):
            content = value.get("bytes")
            if isinstance(content, bytes):
                return content
            value = value.get("path")
        name = _string(value, "image", where)
        if self.folder is None:
            raise UsageError(f"{where}: the image is a path, {shown(name)}, expected its content; use local files")
        path = self.folder / name
        if not _is_file(path):  # a named pipe would block for ever
            raise UsageError(
                f"{where}: image {shown(name)}: there is no such file in {self.folder}; paths of images are relative "
                "to the file that names them"
            )
        return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        return False


def _token_ids(value: Any, where: str) -> list[int]:
    ids = _items(value, "input_ids", where)
    wrong = next((item for item in ids if type(item) is not int), None)
    if wrong is not None or not ids:
        raise UsageError(
            f"{where}: input_ids: expected one or more integers, found {shown(wrong) if ids else 'an empty list'}"
        )
    return ids


def _image_values(record: Mapping[str, Any]) -> list[Any]:
    images = record.get("images")
    if images is None:
        images = record.get("image")
    if images is None:
        return []
    return images if isinstance(images, list) else [images]


def _from_sharegpt(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise UsageError(f"{where}: conversations: expected objects with from and value, found {shown(turn)}")
    if "role" in turn and "content" in turn:  # some data sets call messages conversations
        return dict(turn)
    role = _SHAREGPT_ROLES.get(str(turn.get("from")))
    if role is None:
        raise UsageError(
            f"{where}: conversations: from is {shown(turn.get('from'))}, expected one of {', '.join(_SHAREGPT_ROLES)}"
        )
    return {"role": role, "content": turn.get("value")}


def _with_marks(text: str, num_images: int) -> str:
    """The text with `<|image|>` where its images go; in front if it does not say where."""
    if num_images == 0:
        return text
    marked, num_marks = _ANY_MARK.subn(IMAGE_MARK, text)
    return marked if num_marks else IMAGE_MARK * num_images + text


def _with_images(messages: list[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Messages with places for images that are listed beside them: at marks, else before the first user message."""
    if num_images == 0:
        return messages
    marked = [_marked(message) for message in messages]
    if marked != messages or any(IMAGE_MARK in str(message["content"]) for message in messages):
        return marked
    for index, message in enumerate(messages):
        if message["role"] == "user":
            content = message["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            messages[index] = {**message, "content": [*({"type": "image"} for _ in range(num_images)), *parts]}
            break
    return messages


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, list):
        return {**message, "content": [{**part, "text": _ANY_MARK.sub(IMAGE_MARK, part["text"])} for part in content]}
    return {**message, "content": _ANY_MARK.sub(IMAGE_MARK, content)}


def _fill(own: Sequence[ImageSource | None], images: Sequence[ImageSource], where: str) -> tuple[ImageSource, ...]:
    """Image parts without a file take the record's images, in order."""
    rest = iter(images)
    filled = [next(rest, None) if image is None else image for image in own]
    num_missing = filled.count(None)
    num_left = len(list(rest))
    if num_missing or num_left:
        places = sum(image is None for image in own)
        raise UsageError(
            f"{where}: {places} image part(s) without a path for {len(images)} image(s) listed beside the messages; "
            "give one image per part"
        )
    return tuple(image for image in filled if image is not None)


def _items(value: Any, column: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{where}: {column}: expected a list, found {shown(value)}")
    return value


def _string(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where}: {column}: expected a string, found {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{where}: {column}: holds half a surrogate pair, so it is not Unicode text") from None
    return value
