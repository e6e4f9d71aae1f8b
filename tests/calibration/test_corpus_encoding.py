"""Samples are what the runtime would feed to the model: tokens, chat templates, images; packing loses nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus_files import corpus, numbered, rows, text_only_checkpoint, write_image, write_lines
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llama4_quant.calibration.encoding import Encoder, Packer
from llama4_quant.errors import ConfigError, UsageError
from llama4_quant.runtime.generate import GenerationSettings
from llama4_quant.runtime.pipeline import Pipeline
from llama4_quant.runtime.tokenizer import Tokenizer
from llama4_quant.sample import SAMPLE_DIR, shapes

BOS = 1
DOCUMENTS = st.lists(st.lists(st.integers(2, 9), max_size=20), max_size=12)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(SAMPLE_DIR)


def prepared(prompt: str, images: list[Path]) -> tuple[list[int], torch.Tensor]:
    """What `Pipeline.prepare` gives for one prompt; it needs no weights."""
    encoder = Encoder.from_folder(SAMPLE_DIR, 64)
    pipeline = Pipeline(None, encoder.tokenizer, GenerationSettings(), encoder.processor)  # type: ignore[arg-type]
    inputs = pipeline.prepare([prompt], [images])
    assert inputs.pixel_values is not None
    return inputs.input_ids[0].tolist(), inputs.pixel_values


# Packing


@given(documents=DOCUMENTS, length=st.integers(2, 9))
def test_packing_covers_the_text(documents: list[list[int]], length: int) -> None:
    packer = Packer(length, BOS)
    marked = [[BOS, *document] for document in documents]
    packed = [sample for document in marked for sample in packer.push(document)]
    stream = [token for document in marked for token in document]
    position = 0
    for sample in packed:
        assert len(sample) == length
        assert sample[0] == BOS
        # Inserted only where the text does not have it at this place.
        given_ids = sample if stream[position] == BOS else sample[1:]
        assert stream[position : position + len(given_ids)] == given_ids
        position += len(given_ids)
    assert packer.num_pending == len(stream) - position
    assert packer.num_pending < length


@given(documents=DOCUMENTS, length=st.integers(2, 9))
def test_packing_without_a_begin_of_text(documents: list[list[int]], length: int) -> None:
    packer = Packer(length, None)
    packed = [token for document in documents for sample in packer.push(document) for token in sample]
    stream = [token for document in documents for token in document]
    assert packed == stream[: len(stream) // length * length]


def test_texts_are_tokenized_with_one_begin_of_text_each(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = numbered(40)
    path = write_lines(tmp_path / "data.jsonl", [{"text": text} for text in ["", *texts, " \n"]])
    samples = rows(corpus(path, num_samples=10_000))
    whole = [tokenizer.encode(text, bos=True) for text in texts]
    # The stream without begin-of-text is the documents in some order: cut it into them.
    stream = [token for row in samples for token in row if token != tokenizer.bos_token_id]
    bodies = {tuple(ids[1:]) for ids in whole}
    found, start = 0, 0
    while match := next((body for body in bodies if tuple(stream[start : start + len(body)]) == body), None):
        bodies.remove(match)
        found, start = found + 1, start + len(match)
    assert found >= len(texts) - 2  # what the last, unfinished sample had is dropped
    assert len(stream) - start < max(map(len, whole))
    assert all(row[0] == tokenizer.bos_token_id and len(row) == 64 for row in samples)


# Chats


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "Question?"), ("assistant", "Answer.")],
        [
            ("system", "Be brief."),
            ("user", " Trimmed \n"),
            ("assistant", "Yes."),
            ("user", "And?"),
            ("assistant", "é."),
        ],
        [("user", "Alone, without an answer")],
    ],
    ids=["pair", "system", "alone"],
)
def test_chats_are_rendered_as_transformers_renders_them(tmp_path: Path, turns: list[tuple[str, str]]) -> None:
    """A sample of just the right length is the whole chat."""
    plain = [{"role": role, "content": text} for role, text in turns]
    parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in turns]
    expected = AutoTokenizer.from_pretrained(SAMPLE_DIR).apply_chat_template(plain, tokenize=True)["input_ids"]
    for record in ({"messages": plain}, {"messages": parts}, {"conversations": sharegpt}):
        path = write_lines(tmp_path / "data.jsonl", [record])
        assert rows(corpus(path, max_seq_length=len(expected))) == [expected]
        with pytest.raises(UsageError, match=f"too little text: {len(expected)} tokens"):
            corpus(path, max_seq_length=len(expected) + 1)


# Images


@pytest.mark.parametrize("canvas", [(1, 1), (2, 2), (1, 2)])
def test_images_in_text_are_those_of_the_pipeline(tmp_path: Path, canvas: tuple[int, int]) -> None:
    name = write_image(tmp_path / "a.png", 3, canvas)
    path = write_lines(tmp_path / "data.jsonl", [{"text": "A caption.", "images": [name]}])
    (sample,) = corpus(path)
    ids, pixels = prepared("<|image|>A caption.", [tmp_path / "a.png"])
    assert sample.input_ids.tolist() == ids
    assert sample.pixel_values is not None
    assert torch.equal(sample.pixel_values, pixels)
    assert sample.num_images == 1


def test_images_in_chats_are_those_of_the_pipeline(tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = [tmp_path / write_image(tmp_path / f"{n}.png", n, (1, 1 + n)) for n in range(2)]
    question = {"type": "text", "text": shapes.QUESTIONS[0]}
    content = [{"type": "image", "path": "0.png"}, question, {"type": "image", "path": "1.png"}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}, {"role": "assistant", "content": "A ring."}]
    path = write_lines(tmp_path / "data.jsonl", [{"messages": messages}])
    (sample,) = corpus(path, max_seq_length=128)
    ids, pixels = prepared(tokenizer.render_chat(messages, generation_prompt=False), files)
    assert sample.input_ids.tolist() == ids
    assert sample.pixel_values is not None
    assert torch.equal(sample.pixel_values, pixels)
    assert sample.num_images == 2


def test_text_after_an_image_is_cut_at_the_limit(tmp_path: Path) -> None:
    name = write_image(tmp_path / "a.png", 0)
    path = write_lines(tmp_path / "data.jsonl", [{"text": numbered(1, 100)[0], "images": [name]}])
    (whole,) = corpus(path, max_seq_length=1000)
    (cut,) = corpus(path, max_seq_length=20)
    assert len(whole.input_ids) > 100
    assert cut.input_ids.tolist() == whole.input_ids[:20].tolist()
    image_end = 8  # begin of text, image start, image, 4 patches, image end
    (shortest,) = corpus(path, max_seq_length=image_end)
    assert shortest.input_ids.tolist() == whole.input_ids[:image_end].tolist()
    with pytest.raises(
        UsageError, match=r"line 1: up to the end of its last image it has 8 tokens, and a sample has 7; "
    ):
        corpus(path, max_seq_length=image_end - 1)


def test_too_many_images_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not an image")
    path = write_lines(tmp_path / "data.jsonl", [{"text": "t", "images": ["a.png"] * 17}])
    with pytest.raises(UsageError, match=r"line 1: 17 image\(s\) take 68 tokens or more, and a sample has 64"):
        corpus(path)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not an image")
    path = write_lines(tmp_path / "data.jsonl", [{"text": "t", "images": ["a.png"]}])
    with pytest.raises(UsageError, match=r"data\.jsonl, line 1: image .*a\.png: cannot be read as an image"):
        corpus(path)


def test_more_places_than_images(tmp_path: Path) -> None:
    name = write_image(tmp_path / "a.png", 0)
    path = write_lines(tmp_path / "data.jsonl", [{"text": "<|image|><|image|>", "images": [name]}])
    with pytest.raises(UsageError, match=r"line 1: the prompt has 2 <\|image\|> placeholder\(s\) for 1 image"):
        corpus(path)


def test_images_for_a_text_only_model(tmp_path: Path) -> None:
    folder = text_only_checkpoint(tmp_path / "model")
    name = write_image(tmp_path / "a.png", 0)
    path = write_lines(tmp_path / "data.jsonl", [{"text": "t", "images": [name]}])
    with pytest.raises(UsageError, match="line 1: this checkpoint is text-only: it takes no images"):
        corpus(path, folder=folder)
    text = write_lines(tmp_path / "text.jsonl", [{"text": text} for text in numbered(20)])
    assert rows(corpus(text, folder=folder)) == rows(corpus(text))


@pytest.mark.parametrize("record", [{"text": "Spelled out: <|patch|>"}, {"input_ids": [1, 2046]}])
def test_patch_tokens_without_an_image(tmp_path: Path, record: dict[str, Any]) -> None:
    path = write_lines(tmp_path / "data.jsonl", [record])
    with pytest.raises(UsageError, match=r"line 1: has 1 tokens <\|patch\|> \(id 2046\), .* expected 0"):
        corpus(path)


def test_a_template_that_refuses_the_messages(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{"messages": []}])
    with pytest.raises(UsageError, match="line 1: a chat needs at least one message"):
        corpus(path)


# Pretokenized


def test_pretokenized_records_pass_through_exactly(tmp_path: Path) -> None:
    ids = [[5], [7, 2047, 0], list(range(64)), [9] * 10]
    path = write_lines(tmp_path / "data.jsonl", [{"input_ids": row} for row in ids])
    (tmp_path / "array.json").write_text(json.dumps([{"input_ids": row} for row in ids]))
    for seed in (0, 1):
        assert rows(corpus(path, seed=seed)) == ids
        assert rows(corpus(str(tmp_path / "array.json"), seed=seed)) == ids
    assert rows(corpus(path, num_samples=2).samples()) == ids[:2]
    assert rows(corpus(path, num_samples=2).samples(2, 9)) == ids[2:]
    assert all(sample.input_ids.dtype is torch.int64 for sample in corpus(path))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2048], r"input_ids\[1\] is 2048, expected 0 to 2047"),
        ([-1], r"input_ids\[0\] is -1, expected 0 to 2047"),
        ([2**70], r"input_ids\[0\] is 1180591620717411303424, expected 0 to 2047"),
        ([1] * 65, "has 65 tokens, and pretokenized samples are not cut; give --max-seq-length 65"),
    ],
)
def test_pretokenized_records_that_do_not_fit(tmp_path: Path, ids: list[int], message: str) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{"input_ids": [1]}, {"input_ids": ids}])
    with pytest.raises(UsageError, match=f"line 2: {message}"):
        corpus(path)


# The checkpoint


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = text_only_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    path = write_lines(tmp_path / "data.jsonl", [{"text": text} for text in numbered(20)])
    with pytest.raises(ConfigError, match=r"the tokenizer gives token \d+, but .* vocab_size is 100"):
        corpus(path, folder=folder)


def test_samples_longer_than_the_model_takes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{"text": "t"}])
    with pytest.raises(UsageError, match="max_seq_length is 8,193, expected at most the model's 8,192 positions"):
        corpus(path, max_seq_length=8193)
