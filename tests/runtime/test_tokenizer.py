"""Tokenizer wrapper, padding and streaming decode, on a byte-level BPE tokenizer that is made here."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from llama4_quant.errors import CheckpointError, UsageError
from llama4_quant.runtime.tokenizer import StreamDecoder, Tokenizer, pad_left

BOS, EOS, IMAGE = "<|begin_of_text|>", "<|eot|>", "<|image|>"
TEMPLATE = (
    "{{- bos_token }}{%- for m in messages %}[{{ m['role'] }}]"
    "{%- if m['content'] is string %}{{ m['content'] }}"
    "{%- else %}{%- for c in m['content'] %}{{ '<|image|>' if c['type'] == 'image' else c['text'] }}{%- endfor %}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}[assistant]{%- endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 bytes, a few merges, and three special tokens."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(["the cat and the dog and the caf\u00e9 \U0001f600\U0001f601 " * 20], trainer)
    raw.add_special_tokens([AddedToken(token, special=True) for token in (BOS, EOS, IMAGE)])
    path = tmp_path_factory.mktemp("tokenizer")
    raw.save(str(path / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(special))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_token_id == tokenizer.encode(BOS, bos=False)[0]
    assert tokenizer.eos_token_id == tokenizer.encode(EOS, bos=False)[0]
    assert tokenizer.pad_token_id is None


@pytest.mark.parametrize(
    "text", ["", "the cat", "  two  spaces .\n\ttab ", "caf\u00e9 \U0001f600 \u4e2d\u6587", "a , b ' s"]
)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


def test_begin_of_text_comes_once(tokenizer: Tokenizer) -> None:
    bos = tokenizer.bos_token_id
    plain = tokenizer.encode("the cat", bos=False)
    assert bos not in plain
    assert tokenizer.encode("the cat", bos=True) == [bos, *plain]
    assert tokenizer.encode(f"{BOS}the cat", bos=True) == [bos, *plain]
    assert tokenizer.encode("", bos=True) == [bos]


def test_special_tokens_are_kept_when_asked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"the{IMAGE}cat{EOS}", bos=False)
    assert tokenizer.decode(ids) == "thecat"
    assert tokenizer.decode(ids, keep_special=True) == f"the{IMAGE}cat{EOS}"


def test_chat(tokenizer: Tokenizer) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
    assert tokenizer.render_chat(messages) == f"{BOS}[system]be brief[user]{IMAGE}what?[assistant]"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, [{"role": "user", "content": "x"}], "no chat template"),
        (TEMPLATE, [], "at least one message"),
        ("{{ raise_exception('roles must alternate') }}", [{"role": "user", "content": "x"}], "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", [{"role": "user", "content": "x"}], "does not take these messages"),
    ],
    ids=["none", "empty", "refused", "sandbox"],
)
def test_chat_errors(
    folder: Path, tmp_path: Path, template: str | None, messages: list[dict[str, str]], message: str
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UsageError, match=message):
        Tokenizer.from_folder(tmp_path).render_chat(messages)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        Tokenizer.from_folder(tmp_path)


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'llama4-quant\[transformers\]'"):
        Tokenizer.from_folder(folder)


# Padding


def test_pad_left() -> None:
    batch = pad_left([[5], [6, 7, 8]], pad_token_id=9)
    assert torch.equal(batch.input_ids, torch.tensor([[9, 9, 5], [6, 7, 8]]))
    assert torch.equal(batch.attention_mask, torch.tensor([[0, 0, 1], [1, 1, 1]]))


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_empty_rows(rows: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="at least one"):
        pad_left(rows, 0)


# Streaming


def _stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.finish()]


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    """U+4E2D was not in the training text: its three bytes are three tokens."""
    ids = tokenizer.encode("\u4e2d!", bos=False)
    assert len(ids) == 4
    assert _stream(tokenizer, ids) == ["", "", "\u4e2d", "!", ""]


def test_an_unfinished_character_is_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\u4e2d", bos=False)[:-1]
    assert _stream(tokenizer, ids) == ["a", "", "", "\ufffd"]


def test_text_that_holds_the_replacement_character(tokenizer: Tokenizer) -> None:
    text = "a\ufffdb\ufffd"
    pieces = _stream(tokenizer, tokenizer.encode(text, bos=False))
    assert "".join(pieces) == text


@given(ids=st.lists(st.integers(0, 302), max_size=40))
@settings(deadline=None, max_examples=300)
def test_pieces_make_the_whole_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Any ids, broken UTF-8 and special tokens included; and nothing is taken back or held for longer than needed."""
    pieces = _stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    for count in range(len(ids)):
        so_far = "".join(pieces[: count + 1])
        whole = tokenizer.decode(ids[: count + 1])
        assert whole in (so_far, so_far + "\ufffd")
