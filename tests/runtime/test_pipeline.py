"""Text and images in, text out, with the sample model that ships in the package, and against transformers' generate."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image
from transformers import Llama4ForConditionalGeneration

from llama4_quant.errors import CheckpointError, UsageError
from llama4_quant.runtime.pipeline import Pipeline, user_message
from llama4_quant.runtime.sampling import GenerationSettings
from llama4_quant.runtime.streams import TextStream
from llama4_quant.runtime.timing import FinishReason
from llama4_quant.sample import SAMPLE_DIR, shapes

QUESTION = shapes.QUESTIONS[0]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained(SAMPLE_DIR, dtype="float32")


@pytest.fixture(scope="module")
def reference() -> Llama4ForConditionalGeneration:
    return Llama4ForConditionalGeneration.from_pretrained(SAMPLE_DIR, dtype=torch.float32).eval()


def _image(index: int, *canvas: int) -> Image.Image:
    scene = shapes.scenes(held_out=True)[index]
    tiles_high, tiles_wide = canvas or (1, 1)
    return shapes.draw(scene, random.Random(index), tiles_high=tiles_high, tiles_wide=tiles_wide)


def _read(stream: TextStream) -> str:
    return "".join(stream)


def test_defaults_come_from_the_checkpoint(pipeline: Pipeline) -> None:
    assert pipeline.settings.temperature == 0
    assert pipeline.settings.eos_token_ids == pipeline.model.config.text.eos_token_ids
    assert pipeline.processor is not None
    assert pipeline.processor.settings.tile_size == shapes.TILE_SIDE


def test_image_tokens_are_those_of_training(pipeline: Pipeline) -> None:
    assert pipeline.processor is not None
    for canvas in ((1, 1), (1, 2), (2, 1), (2, 2)):
        expanded = pipeline.processor.expand("<|image|>", [pipeline.processor.process(_image(0, *canvas))])
        assert expanded == shapes.image_prompt(*canvas)


@pytest.mark.parametrize("canvases", [[], [(1, 1)], [(2, 2)], [(1, 2), (1, 1)]], ids=["text", "one", "tiles", "two"])
def test_greedy_answer_is_that_of_transformers(
    pipeline: Pipeline, reference: Llama4ForConditionalGeneration, canvases: list[tuple[int, int]]
) -> None:
    """Token for token in float32: logits agree within 1e-4 of their deviation, and the two best are further apart."""
    images = [_image(index, *canvas) for index, canvas in enumerate(canvases)]
    message = user_message(QUESTION if images else "What is `os.path.join`?", len(images))
    inputs = pipeline.prepare([pipeline.tokenizer.render_chat([message])], [images])
    pixels = {} if inputs.pixel_values is None else {"pixel_values": inputs.pixel_values.float()}
    mask = inputs.attention_mask
    sequences = reference.generate(inputs.input_ids, attention_mask=mask, do_sample=False, max_new_tokens=24, **pixels)
    expected = sequences[0, inputs.input_ids.shape[1] :].tolist()
    stream = pipeline.chat([message], images, replace(pipeline.settings, max_new_tokens=24))
    text = _read(stream)
    ended = [token for token in expected if token in pipeline.model.config.text.eos_token_ids]
    assert stream.token_ids == expected[: len(expected) - len(ended)]
    assert len(stream.token_ids) > 3
    assert text == pipeline.tokenizer.decode(stream.token_ids)


def test_text_streams_in_pieces(pipeline: Pipeline) -> None:
    stream = pipeline.complete("The list", settings=replace(pipeline.settings, max_new_tokens=20, eos_token_ids=()))
    pieces = list(stream)
    assert len(pieces) > 10
    assert all(pieces)
    assert "".join(pieces) == pipeline.tokenizer.decode(stream.token_ids)
    assert len(stream.token_ids) == stream.timing.num_new_tokens == 20
    assert list(stream) == []


def test_a_batch_gives_what_its_rows_give_alone(pipeline: Pipeline) -> None:
    """Rows of different lengths, with none, one and two images, in one left-padded batch."""
    images = [[], [_image(1)], [_image(2, 1, 2), _image(3)]]
    prompts = [pipeline.tokenizer.render_chat([user_message(QUESTION, len(row))]) for row in images]
    settings = replace(pipeline.settings, max_new_tokens=16)
    batch = pipeline.complete_batch(prompts, images, settings)
    alone = tuple(_read(pipeline.complete(prompt, row, settings)) for prompt, row in zip(prompts, images, strict=True))
    assert batch.texts == alone
    assert len(set(alone)) == 3


# Ends, and what is known of them


LISTS = ("The list", "Return a new string object with", "A dictionary")


def _long(pipeline: Pipeline, **settings: object) -> GenerationSettings:
    return replace(pipeline.settings, max_new_tokens=24, eos_token_ids=(), **settings)


def test_a_stop_string_ends_the_text_before_it(pipeline: Pipeline) -> None:
    """Any stretch of the answer, also one that begins and ends inside tokens."""
    whole = _read(pipeline.complete(LISTS[0], settings=_long(pipeline)))
    for start, length in ((1, 1), (3, 7), (20, 12), (len(whole) - 3, 3)):
        stop = whole[start : start + length]
        stream = pipeline.complete(LISTS[0], settings=_long(pipeline, stop=("\x00never", stop)))
        assert _read(stream) == whole[: whole.index(stop)]
        assert stream.finish_reason is FinishReason.STOP
        assert pipeline.tokenizer.decode(stream.token_ids).startswith(whole[: whole.index(stop) + length])


def test_a_stop_string_that_does_not_come_holds_nothing_back(pipeline: Pipeline) -> None:
    whole = _read(pipeline.complete(LISTS[0], settings=_long(pipeline)))
    stream = pipeline.complete(LISTS[0], settings=_long(pipeline, stop=(whole[-5:] + "\x00",)))
    assert _read(stream) == whole
    assert stream.finish_reason is FinishReason.LENGTH


def test_rows_stop_one_by_one(pipeline: Pipeline) -> None:
    """Each row ends as it does alone: by a stop string, at a limit, by itself."""
    alone = [_read(pipeline.complete(prompt, settings=_long(pipeline))) for prompt in LISTS]
    stop = alone[0][10:14]
    assert stop not in alone[1]
    settings = _long(pipeline, stop=(stop,))
    eos = pipeline.prepare([alone[1]], [[]]).input_ids[0, 6].item()
    settings = replace(settings, eos_token_ids=(eos,))
    pieces: list[tuple[int, str]] = []
    batch = pipeline.complete_batch(LISTS, settings=settings, on_text=lambda row, text: pieces.append((row, text)))
    for index, (prompt, row) in enumerate(zip(LISTS, batch.rows, strict=True)):
        stream = pipeline.complete(prompt, settings=settings)
        assert "".join(text for number, text in pieces if number == index) == row.text == _read(stream)
        assert row == stream.completion
        assert row.num_prompt_tokens == len(pipeline.encode(prompt))
    assert batch.finish_reasons[:2] == (FinishReason.STOP, FinishReason.EOS)
    assert batch.timing.num_new_tokens == sum(row.num_new_tokens for row in batch.rows)


def test_random_numbers_belong_to_rows(pipeline: Pipeline) -> None:
    """Six prompts in one batch, or in batches of four and two, or one by one: the same texts."""
    settings = _long(pipeline, temperature=1.0, seed=11)
    prompts = [LISTS[0], *LISTS, LISTS[0], LISTS[2]]

    def texts(*borders: int) -> list[str]:
        parts = [(prompts[a:b], a) for a, b in pairwise(borders)]
        batches = [pipeline.complete_batch(part, settings=settings, first_row=first) for part, first in parts]
        return [text for batch in batches for text in batch.texts]

    together = texts(0, 6)
    assert texts(0, 4, 6) == together
    assert texts(*range(7)) == together
    assert len(set(together)) == len(prompts)  # also where prompts are equal


def test_logprobs_of_a_batch(pipeline: Pipeline) -> None:
    settings = replace(pipeline.settings, max_new_tokens=8, logprobs=True)
    batch = pipeline.complete_batch(LISTS, settings=settings)
    for row in batch.rows:
        assert row.logprobs is not None
        assert len(row.logprobs) == len(row.token_ids)
        assert all(logprob <= 0 for logprob in row.logprobs)
    assert pipeline.complete_batch(LISTS[:1], settings=replace(settings, logprobs=False)).rows[0].logprobs is None


def test_timing_counts_preparation(pipeline: Pipeline) -> None:
    stream = pipeline.chat([user_message(QUESTION, 1)], [_image(0)])
    next(stream)
    timing = stream.timing
    assert timing.prepare_seconds > 0
    assert timing.first_token_seconds == timing.prepare_seconds + timing.prefill_seconds
    assert timing.prefill_tokens_per_second == timing.num_prompt_tokens / timing.prefill_seconds


def test_prompts_start_with_one_begin_of_text(pipeline: Pipeline) -> None:
    bos = pipeline.tokenizer.bos_token_id
    chat = pipeline.tokenizer.render_chat([user_message("Hello")])
    for prompt in ("plain", chat):
        ids = pipeline.prepare([prompt], [[]]).input_ids[0].tolist()
        assert ids[0] == bos
        assert ids.count(bos) == 1


def test_chat_template_equals_training_format(pipeline: Pipeline) -> None:
    """What the sample was trained on, word for word."""
    expected = f"<|begin_of_text|><|header_start|>user<|header_end|>\n\n<|image|>{QUESTION}<|eot|>"
    expected += "<|header_start|>assistant<|header_end|>\n\n"
    assert pipeline.tokenizer.render_chat([user_message(QUESTION, 1)]) == expected


def test_quantized_on_the_fly(pipeline: Pipeline) -> None:
    """The scheme and the dtype reach the loader; nothing else changes."""
    quantized = Pipeline.from_pretrained(SAMPLE_DIR, "W4A16", "cpu", torch.float32)
    packed = [name for name, tensor in quantized.model.state_dict().items() if tensor.dtype is torch.int32]
    assert packed
    assert not [name for name in packed if not name.endswith("weight_packed")]
    ids = pipeline.prepare(["The list"], [[]]).input_ids
    with torch.inference_mode():
        found = quantized.model(ids)
        assert found.dtype is torch.float32
        assert not torch.equal(found, pipeline.model(ids))
    assert quantized.settings == pipeline.settings


# Errors


def test_more_images_than_places(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"the prompt has 0 <\|image\|> placeholder\(s\) for 1 image"):
        pipeline.chat([user_message("What?")], [_image(0)])


def test_fewer_images_than_places(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"the prompt has 2 <\|image\|> placeholder\(s\) for 1 image"):
        pipeline.chat([user_message("What?", 2)], [_image(0)])


def test_images_for_a_text_only_model(pipeline: Pipeline) -> None:
    text_only = Pipeline(pipeline.model, pipeline.tokenizer, pipeline.settings)
    with pytest.raises(UsageError, match="text-only: it takes no images"):
        text_only.chat([user_message("What?", 1)], [_image(0)])


def test_one_list_of_images_per_prompt(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match="2 prompts, but images for 1"):
        pipeline.complete_batch(["a", "b"], [[]])


def test_no_such_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        Pipeline.from_pretrained("./nowhere")
