"""The text that the sample is measured on: held-out documents of Python's documentation."""

from collections.abc import Iterable

from llama4_quant.python_text import Document

MAX_HELD_OUT_BYTES = 150_000
_MAX_SHARE_OF_ONE_DOCUMENT = 12_000


def held_out_text(documents: Iterable[Document]) -> str:
    """The shipped held-out file: the beginnings of the held-out documents, so that no single one dominates."""
    parts: list[str] = []
    room = MAX_HELD_OUT_BYTES
    for document in documents:
        text = _beginning(document)
        size = len((text + "\n\n").encode())
        if size <= room:
            parts.append(text)
            room -= size
    return "\n\n".join(parts) + "\n"


def _beginning(document: Document) -> str:
    text = document.text
    if len(text) <= _MAX_SHARE_OF_ONE_DOCUMENT:
        return text
    return text[: text.rindex("\n", 0, _MAX_SHARE_OF_ONE_DOCUMENT)].rstrip()
