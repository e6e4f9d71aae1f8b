"""Where records lie in text, JSON Lines and JSON files, of any content and size."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_quant.calibration import text_files
from llama4_quant.calibration.documents import RecordReader, TextDocument
from llama4_quant.calibration.text_files import TextFile, open_text_file, passages
from llama4_quant.errors import UsageError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.fixed_dictionaries({"text": st.text()}, optional={"more": JSON_VALUES}), min_size=1, max_size=6)


def opened(path: Path, passage_bytes: int = 4096) -> TextFile:
    return open_text_file(path, RecordReader(text_column="text", folder=path.parent), passage_bytes)


def texts(file: TextFile) -> list[str]:
    documents = list(file.read(range(file.num_records)))
    assert all(isinstance(document, TextDocument) for document in documents)
    return [document.text for document in documents if isinstance(document, TextDocument)]


@given(text=st.text(alphabet="ab\n é€😀", max_size=200), size=st.integers(4, 50))
def test_passages_cover_a_text_and_cut_no_character(text: str, size: int) -> None:
    data = text.encode()
    spans = list(passages(data, 0, size))
    assert "".join(data[start:end].decode() for start, end, _ in spans) == text
    assert all(0 < end - start <= size for start, end, _ in spans)
    assert [number for _, _, number in spans] == list(range(1, len(spans) + 1))


def test_passages_end_at_blank_lines_then_at_lines() -> None:
    data = b"one two\nthree\n\nfour\nfive six seven eight"
    assert [data[start:end] for start, end, _ in passages(data, 0, 20)] == [
        b"one two\nthree\n\n",
        b"four\n",
        b"five six seven eight",
    ]
    lines = b"aaaa\nbbbb\ncc"
    assert [lines[start:end] for start, end, _ in passages(lines, 0, 8)] == [b"aaaa\n", b"bbbb\ncc"]
    # Bytes that are no UTF-8 at all still make progress.
    assert [end for _, end, _ in passages(b"\x80" * 10, 0, 4)][-1] == 10


@given(records=RECORDS, indent=st.sampled_from([None, 1]), tail=st.sampled_from(["", "\n", " \n\t"]))
def test_a_json_array_is_cut_into_its_objects(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], indent: int | None, tail: str
) -> None:
    path = tmp_path_factory.mktemp("array") / "data.json"
    path.write_text(tail + json.dumps(records, indent=indent) + tail, encoding="utf-8")
    assert texts(opened(path)) == [record["text"] for record in records]


@given(records=RECORDS, separator=st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]), ends=st.booleans())
def test_json_lines_are_read_whatever_separates_them(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], separator: str, ends: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "data.jsonl"
    content = "\ufeff" + separator.join(map(json.dumps, records)) + (separator if ends else "")
    path.write_bytes(content.encode())
    file = opened(path)
    assert texts(file) == [record["text"] for record in records]
    assert [document.where for document in file.read([len(records) - 1])] == [
        f"{path}, line {1 + (len(records) - 1) * separator.count(chr(10))}"
    ]


def test_any_order_of_records(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in range(10)))
    file = opened(path)
    assert [document.text for document in file.read([7, 0, 7, 9]) if isinstance(document, TextDocument)] == list("7079")


def test_line_ends_of_text_become_newlines(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert texts(opened(path)) == ["one\ntwo"]


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl"])
def test_an_empty_file_has_no_records(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"empty{suffix}"
    path.touch()
    assert opened(path).num_records == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"text": "b"}', "goes wrong after item 2"),
        (b'[{"text": "a"} {"text": "b"}]', "item 2: expected an object in a JSON array, found b' ' before it"),
        (b'[{"text": "a"},, {"text": "b"}]', "item 2: expected an object"),
        (b'[1, {"text": "b"}]', "item 1: expected an object"),
        (b'[{"text": "a"}] {"text": "b"}', "goes wrong after item 1"),
        (b'[{"text": "a"},]', "goes wrong after item 1"),
        (b'[{"text": "a]', "goes wrong after item 0"),
        (b"[1, 2]", "goes wrong after item 0"),
        (b"[" + b" " * 70_000, "goes wrong after item 0"),
    ],
)
def test_a_damaged_json_array_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        opened(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 3: not valid JSON: .*; correct or remove it"),
        (b'{"text": "\xff"}', "line 3: expected UTF-8 text, found byte 0xff at 10"),
        (b'["text"]', "line 3: expected a JSON object"),
        (b'{"text": "a", "text": "b"}', "line 3: .*the key 'text' occurs twice"),
        (b'{"text": ' + b"[" * 100 + b"]" * 100 + b"}", "line 3: JSON nested more than 64 deep; correct or remove it"),
        (b'{"input_ids": [1' + b"0" * 5000 + b"]}", "line 3: not valid JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    file = opened(path)
    assert next(file.read([0])).where.endswith("line 1")
    with pytest.raises(UsageError, match=message):
        next(file.read([1]))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.txt, passage 1: expected UTF-8 text, found byte 0xe9 at 3"):
        next(opened(path).read([0]))


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", '\n{"text": "aaaaaaaa"}'), ("a.json", '[{"text": "aaaaaaaa"}]')]
)
def test_a_record_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str) -> None:
    monkeypatch.setattr(text_files, "MAX_RECORD_BYTES", 10)
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=r"(line 2|item 1): has more than 10 bytes"):
        opened(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", "{}\n{}\n{}\n"), ("a.json", "[{}, {}, {}]"), ("a.txt", "ab" * 9)]
)
def test_too_many_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str) -> None:
    monkeypatch.setattr(text_files, "MAX_RECORDS", 2)
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match="has more than 2 records"):
        opened(tmp_path / name, passage_bytes=4)


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    file = opened(path)
    path.write_text('{"text": "a"}\n')
    with pytest.raises(UsageError, match=r"line 2: the file is shorter than it was"):
        next(file.read([1]))


def test_no_permission_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file or directory"):
        opened(tmp_path / "absent.txt")


def test_indexing_a_large_file_takes_no_memory_for_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page is unmapped once, but for the last ones; what is read later is still right."""
    monkeypatch.setattr(text_files, "_RELEASE_BYTES", 2**16)
    released: list[tuple[int, int]] = []

    class Spy(text_files.mmap.mmap):
        def madvise(self, option: int, start: int, length: int) -> None:
            assert option == text_files.mmap.MADV_DONTNEED
            released.append((start, length))
            super().madvise(option, start, length)

    monkeypatch.setattr(text_files.mmap, "mmap", Spy)
    path = tmp_path / "data.jsonl"
    expected = [f"{number} " + "x" * 1000 for number in range(2000)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in expected))
    assert texts(opened(path)) == expected
    assert [start for start, _ in released] == [2**16 * index for index in range(len(released))]
    assert path.stat().st_size - 2**16 * len(released) <= 2 * 2**16


@given(
    content=st.lists(
        st.sampled_from([b"[", b"]", b"{", b"}", b'"', b"\\", b",", b":", b" ", b"\n", b"1", b'{"text": "a"}', b"\xff"])
    ).map(b"".join),
    suffix=st.sampled_from([".json", ".jsonl", ".txt"]),
)
def test_no_file_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    path = tmp_path_factory.mktemp("hostile") / f"data{suffix}"
    path.write_bytes((b"[" if suffix == ".json" else b"") + content)
    try:
        file = opened(path)
        outcomes = [document.where for document in file.read(range(file.num_records))]
    except UsageError as error:
        outcomes = [str(error)]
    assert all(outcome.startswith(str(path)) for outcome in outcomes)
