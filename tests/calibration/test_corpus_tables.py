"""Parquet files and data sets of the Hub give what the same records in JSON Lines give."""

import sys
from pathlib import Path
from typing import Any

import pytest
from corpus_files import corpus, numbered, rows, write_image, write_lines

from llama4_quant.calibration import tables
from llama4_quant.calibration.documents import ChatDocument, RecordReader, TextDocument
from llama4_quant.calibration.tables import open_parquet
from llama4_quant.errors import UsageError

CHAT = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer.", "name": "n"}]


def write_parquet(path: Path, records: list[dict[str, Any]], row_group_size: int | None = None) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=row_group_size)
    return str(path)


@pytest.mark.parametrize("row_group_size", [None, 7, 1])
def test_parquet_gives_what_json_lines_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_group_size: int | None
) -> None:
    monkeypatch.setattr(tables, "_BATCH_ROWS", 10)
    records = [{"id": number, "text": text} for number, text in enumerate(numbered(100))]
    table = corpus(write_parquet(tmp_path / "data.parquet", records, row_group_size))
    assert rows(table) == rows(corpus(write_lines(tmp_path / "data.jsonl", records)))
    assert table.description.sources == (f"{tmp_path / 'data.parquet'}: 100 rows",)


def test_rows_in_any_order(tmp_path: Path) -> None:
    records = [{"text": str(number)} for number in range(10)]
    path = write_parquet(tmp_path / "data.parquet", records, row_group_size=3)
    table = open_parquet(Path(path), RecordReader(text_column="text", folder=tmp_path))
    documents = list(table.read([8, 0, 3, 8]))
    assert [document.text for document in documents if isinstance(document, TextDocument)] == ["8", "0", "3", "8"]
    assert documents[0].where == f"{path}, row 9"


def test_chats_and_ids_in_parquet(tmp_path: Path) -> None:
    """Arrow gives every message every key, with nulls, and every row every column."""
    path = write_parquet(tmp_path / "chat.parquet", [{"messages": CHAT, "text": None}, {"messages": None, "text": "t"}])
    table = open_parquet(Path(path), RecordReader(text_column="text", folder=tmp_path))
    chat, text = table.read([0, 1])
    assert isinstance(chat, ChatDocument)
    assert list(chat.messages) == CHAT
    assert isinstance(text, TextDocument)
    ids = [[number] * 3 for number in range(30)]
    assert rows(corpus(write_parquet(tmp_path / "ids.parquet", [{"input_ids": row} for row in ids], 4))) == ids


def test_images_inside_parquet(tmp_path: Path) -> None:
    name = write_image(tmp_path / "a.png", 1)
    content = (tmp_path / name).read_bytes()
    inside = write_parquet(
        tmp_path / "inside.parquet", [{"text": "t", "images": [{"bytes": content, "path": "x.png"}]}]
    )
    beside = write_lines(tmp_path / "beside.jsonl", [{"text": "t", "images": [name]}])
    (from_parquet,), (from_file,) = corpus(inside), corpus(beside)
    assert from_parquet.input_ids.tolist() == from_file.input_ids.tolist()
    assert from_parquet.pixel_values is not None
    assert from_file.pixel_values is not None
    assert from_parquet.pixel_values.equal(from_file.pixel_values)


def test_a_column_by_name(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data.parquet", [{"body": text, "url": "u"} for text in numbered(20)])
    with pytest.raises(
        UsageError, match=r"data\.parquet: expected a column input_ids, .*, found body, url; .*--text-column"
    ):
        corpus(path)
    other = write_lines(tmp_path / "data.jsonl", [{"body": text} for text in numbered(20)])
    assert rows(corpus(path, text_column="body")) == rows(corpus(other, text_column="body"))


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_parquet(path, [{"text": text} for text in numbered(50)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match=r"data\.parquet: cannot be read as Parquet \(Arrow"):
        corpus(str(path))
    path.write_bytes(data[:4] + b"\xff" * 400 + data[404:])
    with pytest.raises(UsageError, match=r"data\.parquet: cannot be read as Parquet"):
        corpus(str(path))


def test_row_groups_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROW_GROUP_BYTES", 2000)
    path = write_parquet(tmp_path / "data.parquet", [{"text": text, "other": text * 9} for text in numbered(100)])
    with pytest.raises(UsageError, match=r"row group 1 has [\d,]+ bytes, expected at most 2,000"):
        corpus(path)
    assert rows(corpus(write_parquet(tmp_path / "small.parquet", [{"text": text} for text in numbered(100)], 2)))


@pytest.mark.parametrize("number", [5, "words"])
def test_a_row_of_the_wrong_type_is_named(tmp_path: Path, number: object) -> None:
    path = write_parquet(tmp_path / "data.parquet", [{"input_ids": number}])
    with pytest.raises(UsageError, match=r"data\.parquet, row 1: input_ids: expected a list"):
        corpus(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `org/name` is a data set: `datasets` takes local folders by the same name."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    return tmp_path / "org" / "name"


def test_a_hub_data_set_gives_what_a_file_gives(hub: Path) -> None:
    records = [{"text": text, "id": number} for number, text in enumerate(numbered(60))]
    for split in ("train", "test"):
        write_lines(hub / f"{split}.jsonl", records if split == "train" else records[:40])
    whole, part = hub.parent / "whole.jsonl", hub.parent / "part.jsonl"
    write_lines(whole, records)
    write_lines(part, records[:40])
    assert rows(corpus("hub:org/name")) == rows(corpus(str(whole)))
    for spec in ("hub:org/name:test", "hub:org/name:train[:40]", "hub:org/name:default:test"):
        opened = corpus(spec)
        assert rows(opened) == rows(corpus(str(part)))
        assert opened.description.sources == (f"{spec}: 40 rows",)


def test_a_hub_data_set_of_images(hub: Path) -> None:
    datasets = pytest.importorskip("datasets")
    content = (hub / write_image(hub / "a.png", 1)).read_bytes()
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    rows_in = {"text": ["t"], "image": [{"bytes": content, "path": None}]}
    datasets.Dataset.from_dict(rows_in, features=features).to_parquet(str(hub / "train.parquet"))
    (hub / "a.png").rename(hub.parent / "a.png")
    beside = write_lines(hub.parent / "beside.jsonl", [{"text": "t", "images": ["a.png"]}])
    (given,), (expected,) = corpus("hub:org/name"), corpus(beside)
    assert given.input_ids.tolist() == expected.input_ids.tolist()
    assert given.pixel_values is not None
    assert expected.pixel_values is not None
    assert given.pixel_values.equal(expected.pixel_values)


def test_a_split_that_is_not_there(hub: Path) -> None:
    write_lines(hub / "train.jsonl", [{"text": "t"}])
    with pytest.raises(UsageError, match=r'^hub:org/name:other: cannot be loaded \(ValueError: .*"other"'):
        corpus("hub:org/name:other")


@pytest.mark.parametrize("spec", ["hub:", "hub:a/b/c", "hub:a:b:c:d", "hub:a:b[", "hub:../x"])
def test_names_of_data_sets_are_checked(spec: str) -> None:
    with pytest.raises(UsageError, match=r"^hub:.*: expected hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT"):
        corpus(spec)


def test_without_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"Parquet files need pyarrow; pip install 'llama4-quant\[datasets\]'"):
        corpus(str(tmp_path / "a.parquet"))
    with pytest.raises(UsageError, match=r"hub:org/name: needs datasets; pip install 'llama4-quant\[datasets\]'"):
        corpus("hub:org/name")
