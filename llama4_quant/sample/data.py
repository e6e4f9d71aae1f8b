"""Training batches: windows of text, and chats (image captions, questions about Python names).

Every batch is a pure function of a `random.Random`, so a resumed run sees the batches it would have seen.

Legend: B rows, L positions, N tiles, C channels, S tile side.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from llama4_quant.python_text import Document
from llama4_quant.sample import shapes
from llama4_quant.sample.routed import IGNORED
from llama4_quant.sample.tokenizer import BOS, EOS, EOT, PAD, token_id

_MAX_ANSWER_CHARACTERS = 100
# Mostly one tile; some wide, tall and two-by-two images.
CANVASES = ((1, 1),) * 6 + ((1, 2), (2, 1), (2, 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What the model is called with: ids [B, L], labels [B, L] (the next token, or `IGNORED`), tiles [N, C, S, S]."""

    ids: Tensor
    labels: Tensor
    pixels: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """One question with its answer, as text, and the tiles [N, C, S, S] of the image that the question shows."""

    question: str
    answer: str
    pixels: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """Everything that batches are drawn from."""

    tokenizer: Tokenizer
    stream: Tensor
    questions: tuple[Chat, ...]
    scenes: tuple[shapes.Scene, ...]


def prepare(documents: Sequence[Document], tokenizer: Tokenizer) -> TrainingData:
    """Tokenize the training documents into one stream, each between <|begin_of_text|> and <|end_of_text|>."""
    end = token_id(tokenizer, EOS)
    ids = [token for e in tokenizer.encode_batch([d.text for d in documents]) for token in (*e.ids, end)]
    return TrainingData(
        tokenizer=tokenizer,
        stream=torch.tensor(ids),
        questions=tuple(_questions(documents)),
        scenes=shapes.scenes(held_out=False),
    )


def text_batch(data: TrainingData, rng: random.Random, *, rows: int, length: int) -> Batch:
    """Windows of the stream at random places; half of them start with <|begin_of_text|>, as evaluation windows do."""
    starts = [rng.randrange(len(data.stream) - length) for _ in range(rows)]
    windows = torch.stack([data.stream[start : start + length + 1] for start in starts])
    windows[: rows // 2, 0] = token_id(data.tokenizer, BOS)
    return Batch(ids=windows[:, :-1], labels=windows[:, 1:])


def chat_batch(data: TrainingData, rng: random.Random, *, captions: int, questions: int) -> Batch:
    """Chats of both kinds, padded on the right; only answers are learned.

    All images of a batch have the same number of tiles, half as many images where there are several tiles: so that rows
    are about equally long and little is spent on padding.
    """
    canvas = rng.choice(CANVASES)
    num_images = captions if canvas == (1, 1) else captions // 2
    chats = [caption_chat(rng.choice(data.scenes), rng, canvas=canvas) for _ in range(num_images)]
    chats += rng.sample(data.questions, min(questions, len(data.questions)))
    pixels = [chat.pixels for chat in chats if chat.pixels is not None]
    rows = [_encode(chat, data.tokenizer) for chat in chats]
    length = max(len(ids) for ids, _ in rows) - 1
    ids_BL = torch.full((len(rows), length), token_id(data.tokenizer, PAD))
    labels_BL = torch.full((len(rows), length), IGNORED)
    for row, (ids, answer_start) in enumerate(rows):
        ids_BL[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels_BL[row, answer_start - 1 : len(ids) - 1] = torch.tensor(ids[answer_start:])
    return Batch(ids=ids_BL, labels=labels_BL, pixels=torch.cat(pixels) if pixels else None)


def caption_chat(
    scene: shapes.Scene, rng: random.Random, *, canvas: tuple[int, int] = (1, 1), question: str | None = None
) -> Chat:
    """Draw a scene and ask for its caption."""
    image = shapes.draw(scene, rng, tiles_high=canvas[0], tiles_wide=canvas[1])
    asked = question or rng.choice(shapes.QUESTIONS)
    return Chat(question=shapes.image_prompt(*canvas) + asked, answer=scene.caption, pixels=shapes.tiles(image))


def prompt_text(question: str) -> str:
    """One user turn up to where the assistant answers, in the chat template's format (without <|begin_of_text|>)."""
    return f"<|header_start|>user<|header_end|>\n\n{question}<|eot|><|header_start|>assistant<|header_end|>\n\n"


def _encode(chat: Chat, tokenizer: Tokenizer) -> tuple[list[int], int]:
    prompt = tokenizer.encode(prompt_text(chat.question)).ids
    answer = tokenizer.encode(chat.answer + EOT, add_special_tokens=False).ids
    return prompt + answer, len(prompt)


def _questions(documents: Sequence[Document]) -> list[Chat]:
    chats = []
    for document in documents:
        if document.name.startswith("topic:"):
            continue
        for entry in document.entries:
            answer = " ".join(entry.text.split("\n\n")[0].split())
            if len(answer) <= _MAX_ANSWER_CHARACTERS:
                chats.append(Chat(question=f"What is `{entry.name}`?", answer=answer))
    return chats
