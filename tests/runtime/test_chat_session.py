"""Chats over several turns: every answer is what it would be without a cache, and little is computed for it."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from llama4_quant.errors import UsageError
from llama4_quant.runtime.chat import ChatSession, Reply
from llama4_quant.runtime.pipeline import Pipeline
from llama4_quant.runtime.timing import FinishReason
from llama4_quant.sample import SAMPLE_DIR, shapes

QUESTION = shapes.QUESTIONS[0]
CHUNK = 64
"""The sample's attention_chunk_size: further back, nothing can be taken back."""


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """In float32: a prompt computed in parts gives logits that differ by rounding, not by more than the best two do."""
    loaded = Pipeline.from_pretrained(SAMPLE_DIR, dtype="float32")
    assert loaded.model.config.text.attention_chunk_size == CHUNK
    return Pipeline(
        loaded.model, loaded.tokenizer, replace(loaded.settings, max_new_tokens=20), processor=loaded.processor
    )


def _image(index: int) -> Image.Image:
    return shapes.draw(shapes.scenes(held_out=True)[index], random.Random(index), tiles_high=1, tiles_wide=1)


def _say(session: ChatSession, text: str, *images: Image.Image | Path) -> tuple[str, Reply]:
    reply = session.send(text, images)
    return "".join(reply), reply


def _fresh(session: ChatSession, pipeline: Pipeline, *images: Image.Image, last: int = -1) -> str:
    """What the model answers to the chat so far without its last answer, all computed at once."""
    return "".join(pipeline.chat(session.messages[:last], images, session.settings))


def test_answers_are_those_of_the_whole_chat_and_new_tokens_are_few(pipeline: Pipeline) -> None:
    session = ChatSession(pipeline, system="You are a Python programmer.")
    before = 0
    for text in ("What is `len`?", "What is `os.path.join`?", "Return a new list", "What is a tuple?"):
        answer, reply = _say(session, text)
        assert answer == _fresh(session, pipeline) != ""
        timing, new = reply.timing, pipeline.encode(f"<|header_start|>user<|header_end|>\n\n{text}<|eot|>")
        assert timing.num_cached_tokens == before
        # The question, the header of the answer (4 tokens), the last token of the answer before, and its end.
        assert timing.num_prompt_tokens - before <= len(new) + 12 or before == 0
        before = session.num_cached_tokens
        assert before == timing.num_prompt_tokens + timing.num_new_tokens - 1
    assert before > 2 * CHUNK
    assert [message["role"] for message in session.messages] == ["system", *["user", "assistant"] * 4]


def test_images_are_computed_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = []
    features = pipeline.model.image_features
    monkeypatch.setattr(pipeline.model, "image_features", lambda pixels: tiles.append(len(pixels)) or features(pixels))
    session, images = ChatSession(pipeline), [_image(i) for i in range(3)]
    answers = [_say(session, QUESTION, images[0])[0], _say(session, "And what is a list?")[0]]
    answers.append(_say(session, QUESTION, *images[1:])[0])
    assert tiles == [1, 2]
    assert answers[0] == "".join(pipeline.chat(session.messages[:1], images[:1]))
    assert answers[1] == "".join(pipeline.chat(session.messages[:3], images[:1]))
    assert answers[2] == "".join(pipeline.chat(session.messages[:5], images))


def test_an_answer_that_tokenizes_otherwise_is_taken_back(pipeline: Pipeline) -> None:
    """A stop string leaves tokens in the cache that are not in the text; they are near the end, so the rest stays."""
    session = ChatSession(pipeline)
    whole, _ = _say(session, "What is `len`?")
    session.reset()
    session.settings = replace(pipeline.settings, stop=(whole[10:14],))
    answer, first = _say(session, "What is `len`?")
    assert answer == whole[: whole.index(whole[10:14])]
    assert first.completion.finish_reason is FinishReason.STOP
    num_cached = session.num_cached_tokens
    assert num_cached < CHUNK
    session.settings = pipeline.settings
    answer, second = _say(session, "What is a tuple?")
    assert answer == _fresh(session, pipeline)
    assert first.timing.num_prompt_tokens <= second.timing.num_cached_tokens < num_cached


@pytest.mark.parametrize("is_long", [False, True])
def test_another_system_message_changes_the_past(pipeline: Pipeline, is_long: bool) -> None:
    """Before the first chunk is full the common beginning stays; later it is gone from RoPE layers, so all is new."""
    session = ChatSession(pipeline, system="You are a Python programmer.")
    session.settings = replace(pipeline.settings, max_new_tokens=64 if is_long else 2, eos_token_ids=())
    _say(session, "What is a tuple?" if is_long else "Hi")
    assert (session.num_cached_tokens > CHUNK) == is_long
    session.system = "You are a poet."
    answer, reply = _say(session, "What is a tuple?")
    assert answer == _fresh(session, pipeline)
    assert (reply.timing.num_cached_tokens == 0) == is_long
    assert session.messages[0] == {"role": "system", "content": "You are a poet."}


def test_closing_keeps_what_there_is(pipeline: Pipeline) -> None:
    session = ChatSession(pipeline)
    reply = session.send("What is `len`?")
    pieces = [next(reply) for _ in range(4)]
    reply.close()
    assert list(reply) == []
    assert reply.completion.finish_reason is None
    assert session.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    answer, after = _say(session, "What is a tuple?")
    assert answer == _fresh(session, pipeline)
    assert after.timing.num_cached_tokens >= reply.timing.num_prompt_tokens


def test_a_question_without_an_answer_is_forgotten(pipeline: Pipeline) -> None:
    session = ChatSession(pipeline)
    session.send("What is `len`?").close()
    assert session.messages == []
    session.send("What is `len`?")  # nobody reads this one; the next closes it
    _say(session, "What is a tuple?")
    assert len(session.messages) == 2


def test_an_image_of_the_same_size_is_another_image(pipeline: Pipeline) -> None:
    """The tokens of both are the same; the first one's keys and values are in the cache when it is taken back."""
    session = ChatSession(pipeline)
    reply = session.send(QUESTION, [_image(1)])
    next(reply._streams._tokens)
    reply.close()
    assert session.messages == []
    assert session.num_cached_tokens > 0
    answer, reply = _say(session, QUESTION, _image(4))
    assert answer == _fresh(session, pipeline, _image(4))
    assert answer != "".join(pipeline.chat(session.messages[:1], [_image(1)], session.settings))
    first_patch = pipeline.prepare(["<|image|>"], [[_image(1)]]).input_ids[0].tolist().index(2046)
    assert 0 < reply.timing.num_cached_tokens <= first_patch + 10


@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_step_that_fails_costs_the_cache_alone(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    """An interruption in the middle of a layer: the answer so far stays, and the chat goes on as if computed anew."""
    session = ChatSession(pipeline)
    _say(session, "What is a tuple?")
    reply = session.send("What is `len`?")
    text = "".join(next(reply) for _ in range(num_steps))

    def interrupted(_x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.model.model.layers[2].post_attention_layernorm, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(reply)
    assert session.num_cached_tokens == 0
    assert len(session.messages) == (4 if num_steps else 2)
    assert session.messages[-1]["content"].startswith(text)
    answer, reply = _say(session, "Return a new list")
    assert answer == _fresh(session, pipeline)
    assert reply.timing.num_cached_tokens == 0


def test_errors_leave_the_chat_as_it_was(pipeline: Pipeline, tmp_path: Path) -> None:
    session = ChatSession(pipeline)
    _say(session, "What is `len`?")
    messages = session.messages
    for text, images, message in (
        ("x", [tmp_path / "none.png"], "no such file"),
        ("x" * 20_000, [], "max_position_embeddings is 8192"),
        ("<|patch|>", [_image(0)], "leave the names of special tokens out"),
    ):
        with pytest.raises(UsageError, match=message):
            session.send(text, images)
        assert session.messages == messages
    answer, _ = _say(session, "What is a tuple?")
    assert answer == _fresh(session, pipeline)


def test_reset(pipeline: Pipeline) -> None:
    session = ChatSession(pipeline, system="You are a poet.")
    first, _ = _say(session, "What is `len`?")
    session.reset()
    assert session.messages == [{"role": "system", "content": "You are a poet."}]
    assert (session.num_cached_tokens, session.num_cache_bytes) == (0, 0)
    assert _say(session, "What is `len`?")[0] == first


def test_sampled_answers_follow_from_seed_and_turn(pipeline: Pipeline) -> None:
    def answers(seed: int) -> list[str]:
        session = ChatSession(pipeline, settings=replace(pipeline.settings, temperature=1.0, seed=seed))
        return [_say(session, "What is `len`?")[0] for _ in range(2)]

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)
    assert len(set(answers(1))) == 2


def test_messages_name_image_files(pipeline: Pipeline, tmp_path: Path) -> None:
    _image(0).save(tmp_path / "a.png")
    session = ChatSession(pipeline)
    _say(session, QUESTION, tmp_path / "a.png", _image(1))
    content = [
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image"},
        {"type": "text", "text": QUESTION},
    ]
    assert session.messages[0] == {"role": "user", "content": content}
    assert session.num_cache_bytes == session._cache.num_bytes > 0
