"""What records mean, and which ones are refused."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_quant.calibration.documents import ChatDocument, Document, RecordReader, TextDocument, TokenDocument
from llama4_quant.errors import UsageError

IMAGE = {"type": "image"}


@pytest.fixture
def reader(tmp_path: Path) -> RecordReader:
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "b.png").write_bytes(b"b")
    return RecordReader(text_column="text", folder=tmp_path)


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def user(*parts: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def chat(document: Document) -> tuple[list[Any], list[str]]:
    """Messages, and names of images."""
    assert isinstance(document, ChatDocument)
    return list(document.messages), [Path(str(image)).name for image in document.images]


def test_columns_in_order_of_precedence(reader: RecordReader) -> None:
    everything = {
        "input_ids": [1, 2],
        "messages": [{"role": "user", "content": "m"}],
        "conversations": [{"from": "human", "value": "c"}],
        "text": "t",
    }
    assert reader.document(everything, "here") == TokenDocument(where="here", input_ids=[1, 2])
    without_ids = {**everything, "input_ids": None}
    assert chat(reader.document(without_ids, "here")) == ([{"role": "user", "content": "m"}], [])
    only_sharegpt = {**without_ids, "messages": None}
    assert chat(reader.document(only_sharegpt, "here")) == ([{"role": "user", "content": "c"}], [])
    assert reader.document({**only_sharegpt, "conversations": None}, "here") == TextDocument(where="here", text="t")


def test_text_column_by_another_name(tmp_path: Path) -> None:
    reader = RecordReader(text_column="body", folder=tmp_path)
    assert reader.document({"body": "b", "text": "t"}, "here") == TextDocument(where="here", text="b")


def test_sharegpt_roles(reader: RecordReader) -> None:
    turns = [{"from": name, "value": name} for name in ("system", "human", "gpt", "user", "assistant", "chatgpt")]
    messages, _ = chat(reader.document({"conversations": turns}, "here"))
    roles = ["system", "user", "assistant", "user", "assistant", "assistant"]
    assert messages == [{"role": role, "content": turn["from"]} for role, turn in zip(roles, turns, strict=True)]
    as_messages = [{"role": "user", "content": "u"}]
    assert chat(reader.document({"conversations": as_messages}, "here"))[0] == as_messages


def test_null_keys_of_messages_are_dropped(reader: RecordReader) -> None:
    """Arrow fills in every key that any message has; templates take a null tool call for a tool call."""
    record = {"messages": [{"role": "user", "content": "m", "tool_calls": None, "name": "n"}]}
    assert chat(reader.document(record, "here"))[0] == [{"role": "user", "content": "m", "name": "n"}]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("see", "<|image|><|image|>see"),
        ("<|image|> and <|image|>", None),
        ("<image>\nand<image>", "<|image|>\nand<|image|>"),
    ],
)
def test_places_of_images_in_text(reader: RecordReader, given: str, expected: str | None) -> None:
    document = reader.document({"text": given, "images": ["a.png", "b.png"]}, "here")
    assert isinstance(document, TextDocument)
    assert document.text == (expected or given)
    assert [Path(str(image)).name for image in document.images] == ["a.png", "b.png"]


def test_a_text_about_html_keeps_its_marks(reader: RecordReader) -> None:
    assert reader.document({"text": "<image>"}, "here") == TextDocument(where="here", text="<image>")


def test_image_parts_with_their_own_files(reader: RecordReader) -> None:
    record = {"messages": [user({"type": "image", "path": "b.png"}, text("t"), {"type": "image", "image": "a.png"})]}
    assert chat(reader.document(record, "here")) == ([user(IMAGE, text("t"), IMAGE)], ["b.png", "a.png"])


def test_image_parts_that_take_listed_images(reader: RecordReader) -> None:
    parts = user(IMAGE, text("t"), {"type": "image", "path": "a.png"}, {**IMAGE, "path": None})
    record = {"messages": [parts], "images": ["b.png", "a.png"]}
    assert chat(reader.document(record, "here")) == (
        [user(IMAGE, text("t"), IMAGE, IMAGE)],
        ["b.png", "a.png", "a.png"],
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("look", [IMAGE, text("look")]),
        ([text("look")], [IMAGE, text("look")]),
        ("<image>\nlook", "<|image|>\nlook"),
        ("look <|image|>", "look <|image|>"),
        ([text("<image>")], [text("<|image|>")]),
    ],
)
def test_listed_images_go_to_marks_or_in_front(reader: RecordReader, content: Any, expected: Any) -> None:
    system = {"role": "system", "content": "s"}
    record = {"messages": [system, {"role": "user", "content": content}], "image": "a.png"}
    messages, images = chat(reader.document(record, "here"))
    assert messages == [system, {"role": "user", "content": expected}]
    assert images == ["a.png"]


def test_encoded_images(reader: RecordReader) -> None:
    document = reader.document({"text": "t", "images": [{"bytes": b"png", "path": None}]}, "here")
    assert document == TextDocument(where="here", text="<|image|>t", images=(b"png",))
    by_path = reader.document({"text": "t", "images": [{"bytes": None, "path": "a.png"}]}, "here")
    assert isinstance(by_path, TextDocument)
    assert Path(str(by_path.images[0])).name == "a.png"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p"}, r"expected one of input_ids, messages, conversations, text, found \['prompt'\]"),
        ({}, "expected one of"),
        ({"text": None}, "expected one of"),
        ({"text": 5}, "text: expected a string, found 5"),
        ({"text": "\ud800"}, "text: holds half a surrogate pair"),
        ({"input_ids": []}, "input_ids: expected one or more integers, found an empty list"),
        ({"input_ids": [1, True]}, "input_ids: expected one or more integers, found True"),
        ({"input_ids": [1, 2.0]}, "input_ids: expected one or more integers, found 2.0"),
        ({"input_ids": [[1]]}, r"input_ids: expected one or more integers, found \[1\]"),
        ({"input_ids": "1 2"}, "input_ids: expected a list, found '1 2'"),
        ({"messages": "hi"}, "messages: expected a list, found 'hi'"),
        ({"messages": ["hi"]}, "expected messages with role and content, found 'hi'"),
        ({"messages": [{"content": "c"}]}, "role: expected a string, found None"),
        ({"messages": [{"role": "user"}]}, "content: expected a string, found None"),
        ({"messages": [user({"type": "video"})]}, "expected content parts like"),
        ({"messages": [{"role": "user", "content": ["c"]}]}, "expected content parts like"),
        ({"messages": [user({"type": "text"})]}, "text: expected a string, found None"),
        ({"messages": [user(IMAGE)]}, r"1 image part\(s\) without a path for 0 image\(s\) listed"),
        ({"messages": [user(IMAGE)], "images": ["a.png", "b.png"]}, r"1 image part\(s\) without a path for 2 image"),
        ({"conversations": [{"from": "tool", "value": "v"}]}, "conversations: from is 'tool', expected one of human"),
        ({"conversations": ["v"]}, "conversations: expected objects with from and value"),
        ({"text": "t", "images": ["c.png"]}, "image 'c.png': there is no such file in"),
        ({"text": "t", "images": ["a" * 5000]}, "image 'aaa.*: there is no such file"),
        ({"text": "t", "images": ["\0"]}, "image .*: there is no such file"),
        ({"text": "t", "images": [None]}, "image: expected a string, found None"),
        ({"text": "t", "images": [{"bytes": None}]}, "image: expected a string, found None"),
    ],
)
def test_records_that_are_refused(reader: RecordReader, record: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^file, line 7: {message}"):
        reader.document(record, "file, line 7")


def test_a_data_set_without_files_has_no_paths() -> None:
    reader = RecordReader(text_column="text", folder=None)
    with pytest.raises(UsageError, match=r"the image is a path, 'a\.png', expected its content"):
        reader.document({"text": "t", "image": {"bytes": None, "path": "a.png"}}, "here")


KEYS = ("input_ids", "messages", "conversations", "text", "images", "image", "role", "content", "from", "value", "type")
WORDS = st.sampled_from(["user", "human", "text", "image", "<image>", "<|image|>", "", "../..", "\ud800"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=4) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "path", "bytes"]), inner),
    max_leaves=12,
)


@given(record=st.dictionaries(st.sampled_from(KEYS), ANYTHING))
def test_no_record_raises_anything_else(record: dict[str, Any]) -> None:
    reader = RecordReader(text_column="text", folder=Path(__file__).parent)
    try:
        outcome = reader.document(record, "here").where
    except UsageError as error:
        outcome = str(error)
    assert outcome.startswith("here")
