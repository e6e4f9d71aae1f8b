"""The stream of samples: order, turns, counts, fingerprints, notes, and where it ends."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_files import corpus, numbered, rows, write_image, write_lines

from llama4_quant import python_text
from llama4_quant.calibration import sources
from llama4_quant.calibration.corpus import CalibrationSettings
from llama4_quant.calibration.sources import BuiltInText, shuffled
from llama4_quant.errors import UsageError
from llama4_quant.runtime.tokenizer import Tokenizer
from llama4_quant.sample import SAMPLE_DIR

DESCRIBE = """
import sys, json
from pathlib import Path
from llama4_quant.calibration.corpus import CalibrationSettings, open_corpus
corpus = open_corpus(Path(sys.argv[1]), CalibrationSettings(data=tuple(sys.argv[2:]), num_samples=4, max_seq_length=64))
rows = [sample.input_ids.tolist() for sample in corpus]
print(json.dumps([corpus.description.to_json(), rows]))
"""


@pytest.fixture
def texts(tmp_path: Path) -> str:
    return write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in numbered(100)])


# Order


def test_the_same_in_every_process(tmp_path: Path, texts: str) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    for index, text in enumerate(numbered(30, words=80)):
        (folder / f"{index}.txt").write_text(text)
    found = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", DESCRIBE, str(SAMPLE_DIR), texts, str(folder)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
        found.append(json.loads(result.stdout))
    here = corpus(texts, str(folder))
    assert found[0] == found[1] == [here.description.to_json(), rows(here)]


def test_order_is_the_same_everywhere_and_for_ever() -> None:
    """Golden: computed with SplitMix64 on Python integers below; a change would change everybody's samples."""
    assert shuffled(8, 0, 0).tolist() == _sorted_by_splitmix(8, "0 0") == [4, 6, 3, 7, 1, 0, 2, 5]
    assert shuffled(1000, 7, 2).tolist() == _sorted_by_splitmix(1000, "7 2")
    assert shuffled(0, 0, 0).tolist() == []
    assert np.array_equal(np.sort(shuffled(5000, 1, 0)), np.arange(5000))


def _sorted_by_splitmix(num: int, name: str) -> list[int]:
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")

    def key(number: int) -> int:
        z = (start + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    return sorted(range(num), key=key)


def test_the_seed_decides_the_order(texts: str) -> None:
    assert rows(corpus(texts, seed=1)) == rows(corpus(texts, seed=1))
    assert rows(corpus(texts, seed=1)) != rows(corpus(texts, seed=2))


def test_top_up_goes_on_where_the_calibration_set_ends(texts: str) -> None:
    opened = corpus(texts, num_samples=10)
    everything = rows(opened)
    assert len(everything) > 30
    assert rows(opened.samples()) == everything[:10]
    assert rows(opened.samples(10, 25)) == everything[10:25]
    assert rows(opened.samples(10, 10_000)) == everything[10:]
    # Every document has a number of its own, so no window of text occurs twice.
    windows = {tuple(row[1:20]) for row in everything}
    assert len(windows) == len(everything)
    # More samples do not change the first ones.
    assert rows(corpus(texts, num_samples=20).samples())[:10] == everything[:10]


# Sources


def test_sources_take_turns_by_tokens(tmp_path: Path) -> None:
    short = write_lines(tmp_path / "short.jsonl", [{"input_ids": [1] * 5}] * 100)
    long = write_lines(tmp_path / "long.jsonl", [{"input_ids": [2] * 50}] * 20)
    given = rows(corpus(short, long))
    firsts = [row[0] for row in given]
    assert firsts[:13] == [1, 2, *[1] * 9, 1, 2]
    for count in range(2, 60):
        tokens = [sum(len(row) for row in given[:count] if row[0] == which) for which in (1, 2)]
        assert abs(tokens[0] - tokens[1]) <= 50
    assert len(given) == 120


def test_small_texts_are_packed_together(tmp_path: Path) -> None:
    files = []
    for index, text in enumerate(numbered(6, words=8)):
        files.append(tmp_path / f"{index}.txt")
        files[-1].write_text(text)
    with pytest.raises(UsageError, match=r"0\.txt: too little text: \d\d tokens, and one sample needs 64"):
        corpus(str(files[0]))
    assert len(list(corpus(*map(str, files)))) >= 1
    assert rows(corpus(*map(str, files)))[0].count(Tokenizer.from_folder(SAMPLE_DIR).bos_token_id) > 1


def test_a_folder_is_read_whole(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    numbers = iter(range(100))
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        write_lines(folder / name, [{"input_ids": [next(numbers)]} for _ in range(3)])
    (folder / ".hidden" / "d.jsonl").write_text("not read")
    (folder / "README.rst").write_text("not read")
    opened = corpus(str(folder))
    assert rows(opened) == [[3], [4], [5], [0], [1], [2], [6], [7], [8]]
    assert opened.description.sources == (f"{folder}: 9 lines in 3 files",)


def test_a_long_text_is_cut_into_passages_in_seeded_order(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(numbered(400)))
    opened = corpus(str(path))
    (line,) = opened.description.sources
    assert line.startswith(f"{path}: ")
    assert line.endswith(" passages")
    assert int(line.split()[1]) > 10
    assert rows(opened) != rows(corpus(str(path), seed=3))


def test_images_and_text_together(tmp_path: Path, texts: str) -> None:
    names = [write_image(tmp_path / f"{index}.png", index) for index in range(8)]
    captions = write_lines(tmp_path / "captions.jsonl", [{"text": "A caption.", "images": [name]} for name in names])
    opened = corpus(captions, texts, num_samples=12)
    samples = list(opened.samples())
    with_images = [sample for sample in samples if sample.pixel_values is not None]
    assert len(with_images) == 8
    assert opened.description.num_images == 8
    assert opened.description.num_samples == 12
    assert opened.description.num_tokens == sum(len(sample.input_ids) for sample in samples)
    assert all(len(sample.input_ids) == 64 for sample in samples if sample.pixel_values is None)
    assert opened.note == ""


@pytest.mark.parametrize("first", [{"input_ids": [1]}, {"text": "a"}])
def test_pretokenized_and_other_records_in_one_source(tmp_path: Path, first: dict[str, Any]) -> None:
    other = {"text": "b"} if "input_ids" in first else {"input_ids": [2]}
    path = write_lines(tmp_path / "data.jsonl", [first, other])
    with pytest.raises(UsageError, match=r"line 2: .*data\.jsonl mixes records with input_ids"):
        corpus(path)


# Descriptions


def test_the_fingerprint_knows_content_and_settings(tmp_path: Path, texts: str) -> None:
    def fingerprint(*data: str, **settings: Any) -> str:
        return corpus(*data, **settings).description.fingerprint

    renamed = tmp_path / "renamed.jsonl"
    renamed.write_bytes(Path(texts).read_bytes())
    base = fingerprint(texts)
    assert len(base) == 64
    assert fingerprint(texts) == fingerprint(str(renamed)) == base
    # Another last line alone, which may be far behind the calibration set, is another corpus to top up from.
    with renamed.open("a") as file:
        file.write('{"text": "One more."}\n')
    others = [
        fingerprint(str(renamed)),
        fingerprint(texts, seed=1),
        fingerprint(texts, num_samples=5),
        fingerprint(texts, max_seq_length=63),
        fingerprint(texts, texts),
    ]
    assert len({base, *others}) == 6


def test_the_fingerprint_knows_pixels(tmp_path: Path) -> None:
    found = []
    for index in range(2):
        name = write_image(tmp_path / "a.png", index)
        path = write_lines(tmp_path / "data.jsonl", [{"text": "t", "images": [name]}])
        found.append(corpus(path).description.fingerprint)
    assert found[0] != found[1]


def test_the_end_of_the_data_is_a_note(texts: str) -> None:
    opened = corpus(texts, num_samples=1000)
    count = opened.description.num_samples
    assert 30 < count < 1000
    assert opened.note.startswith(f"The data ends after {count} of 1,000 samples ({count * 64:,} tokens)")
    assert corpus(texts, num_samples=count).note == ""


def test_a_corpus_as_json(texts: str) -> None:
    described = corpus(texts).description.to_json()
    assert json.loads(json.dumps(described)) == described
    assert described["sources"] == [f"{texts}: 100 lines"]
    assert (described["num_samples"], described["num_tokens"], described["num_images"]) == (4, 256, 0)


# Built-in text


def test_without_data_the_built_in_text_is_used_and_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = python_text.collect
    monkeypatch.setattr(sources, "collect", lambda: full(tmp_path))  # topics alone: parsing all modules takes seconds
    opened = corpus()
    assert "No calibration data was given" in opened.note
    assert "--calibration" in opened.note
    assert opened.description.num_samples == 4
    held_out = {document.text for document in full(tmp_path).held_out}
    used = set(BuiltInText.collect().texts)
    assert used.isdisjoint(held_out)
    assert len(used) > 40
    assert held_out


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0, expected an integer of at least 1"),
        ({"num_samples": True}, "num_samples is True"),
        ({"max_seq_length": 1}, "max_seq_length is 1, expected an integer of at least 2"),
        ({"seed": -1}, "seed is -1, expected an integer of at least 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CalibrationSettings(**settings)


def test_data_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    for name, message in (
        ("absent.txt", "there is no such file or folder; for a data set of the Hub write hub:NAME:SPLIT"),
        ("data.csv", r"expected a file \.txt, \.md, \.json, \.jsonl, \.parquet"),
        ("empty", r"expected a folder with 1 to 100,000 files .*, found 0"),
        ("blank.jsonl", r"has 0 records, expected 1 to 4,194,304; give data"),
    ):
        with pytest.raises(UsageError, match=f"{name}: {message}"):
            corpus(str(tmp_path / name))


def test_a_source_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: str) -> None:
    monkeypatch.setattr(sources, "MAX_SOURCE_BYTES", 1000)
    with pytest.raises(UsageError, match=r"texts\.jsonl: has [\d,]+ bytes, expected at most 1,000"):
        corpus(texts)


def test_a_malformed_line_behind_the_calibration_set_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"input_ids": [1]}\n{"input_ids": [2]}\n{oops\n')
    opened = corpus(str(path), num_samples=2)
    with pytest.raises(UsageError, match="line 3: not valid JSON"):
        list(opened)
