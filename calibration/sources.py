"""What one --calibration names: a file, a folder of files, a data set of the Hub, or (none) the built-in text.

A source is a sequence of numbered records, possibly over several files. Records are taken in an order that follows from
the seed alone, the same on every machine and in every version of Python and NumPy; pretokenized ones in file order.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llama4_quant.calibration.documents import Document, RecordReader, TextDocument, TokenDocument
from llama4_quant.calibration.tables import HUB_PREFIX, open_hub, open_parquet
from llama4_quant.calibration.text_files import MAX_RECORDS, open_text_file
from llama4_quant.errors import UsageError
from llama4_quant.python_text import collect

SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".parquet")
MAX_SOURCE_BYTES = 64 * 2**30
"""Of all files of one source: each is read once in full, and calibration needs a few megabytes of it."""
MAX_FILES = 100_000

_BLOCK = 64  # documents that are asked for at a time; Parquet files decode a row group once per block


class Store(Protocol):
    """Numbered records of one file or data set."""

    @property
    def num_records(self) -> int:
        """How many there are."""

    @property
    def unit(self) -> str:
        """What messages call one of them."""

    @property
    def identity(self) -> str:
        """Changes when the content does."""

    def read(self, numbers: Sequence[int]) -> Iterator[Document]:
        """Documents by number, in the order asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltInText:
    """The documentation of the running Python, without what is held out for measurements."""

    texts: tuple[str, ...] = field(repr=False)
    unit: str = "document"

    @classmethod
    def collect(cls) -> "BuiltInText":
        """Collect it; takes seconds, since the standard library is parsed."""
        return cls(texts=tuple(document.text for document in collect().train))

    @property
    def num_records(self) -> int:
        """How many documents there are."""
        return len(self.texts)

    @property
    def identity(self) -> str:
        """Checksum of the texts."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()

    def read(self, numbers: Sequence[int]) -> Iterator[Document]:
        """Documents by number, in the order asked for."""
        for number in numbers:
            yield TextDocument(where=f"built-in text, document {number + 1}", text=self.texts[number])


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """All records of one --calibration.

    Attributes:
        name: as the user gave it.
        stores: its files, or its one data set.
    """

    name: str
    stores: tuple[Store, ...]

    @property
    def num_records(self) -> int:
        """How many there are in all files."""
        return sum(store.num_records for store in self.stores)

    @property
    def description(self) -> str:
        """One line for the user."""
        units = sorted({store.unit for store in self.stores if store.num_records})
        files = f" in {len(self.stores):,} files" if len(self.stores) > 1 else ""
        return f"{self.name}: {self.num_records:,} {' and '.join(f'{unit}s' for unit in units)}{files}"

    def documents(self, seed: int, position: int) -> Iterator[Document]:
        """All documents: shuffled, or in file order if they are pretokenized.

        Args:
            seed: decides the order.
            position: of this source among all, so that two equal files are not in the same order.

        Raises:
            UsageError: a record cannot be used, or pretokenized ones are mixed with others.
        """
        keeps_order = isinstance(self._first(), TokenDocument)
        order = range(self.num_records) if keeps_order else shuffled(self.num_records, seed, position)
        for start in range(0, self.num_records, _BLOCK):
            for document in self._read([int(number) for number in order[start : start + _BLOCK]]):
                if isinstance(document, TokenDocument) != keeps_order:
                    raise UsageError(
                        f"{document.where}: {self.name} mixes records with input_ids, which keep their order, with "
                        "others, which are shuffled; split it and give --calibration for each"
                    )
                yield document

    def _first(self) -> Document | None:
        return next(self._read([0]), None) if self.num_records else None

    def _read(self, numbers: Sequence[int]) -> Iterator[Document]:
        ends = list(accumulate(store.num_records for store in self.stores))
        places = [bisect_right(ends, number) for number in numbers]
        local: dict[int, list[int]] = {}
        for number, place in zip(numbers, places, strict=True):
            local.setdefault(place, []).append(number - (ends[place - 1] if place else 0))
        streams = {place: self.stores[place].read(chosen) for place, chosen in local.items()}
        for place in places:
            yield next(streams[place])


def open_source(name: str, *, text_column: str, passage_bytes: int) -> Source:
    """Open what the user named.

    Args:
        name: a file, a folder (all files below it that can be read, hidden ones apart), or `hub:` and a data set.
        text_column: column of JSON, Parquet and Hub records that holds plain text.
        passage_bytes: longer text files are cut into passages of at most this.

    Raises:
        UsageError: it does not exist, is of an unknown kind, empty, or too large.
    """
    if name.startswith(HUB_PREFIX):
        source = Source(name=name, stores=(open_hub(name.removeprefix(HUB_PREFIX), text_column),))
    else:
        stores: list[Store] = []
        for path in _files(name):
            reader = RecordReader(text_column=text_column, folder=path.parent)
            is_table = path.suffix == ".parquet"
            stores.append(open_parquet(path, reader) if is_table else open_text_file(path, reader, passage_bytes))
        source = Source(name=name, stores=tuple(stores))
    if not 0 < source.num_records <= MAX_RECORDS:
        raise UsageError(
            f"{name}: has {source.num_records:,} records, expected 1 to {MAX_RECORDS:,}; "
            + ("give data" if source.num_records == 0 else "a part of it is enough")
        )
    return source


def shuffled(num: int, seed: int, position: int) -> NDArray[np.int64]:
    """A permutation of 0..num - 1 that follows from seed and position alone: numbers sorted by SplitMix64 of them."""
    start = int.from_bytes(hashlib.sha256(f"{seed} {position}".encode()).digest()[:8], "little")
    keys = np.arange(1, num + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(keys ^ (keys >> np.uint64(31)), kind="stable")


def _files(name: str) -> list[Path]:
    path = Path(name)
    known = ", ".join(SUFFIXES)
    if path.is_dir():
        inside = (file.relative_to(path) for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        files = [path / file for file in sorted(inside) if not any(part.startswith(".") for part in file.parts)]
        if not 0 < len(files) <= MAX_FILES:
            raise UsageError(f"{name}: expected a folder with 1 to {MAX_FILES:,} files {known}, found {len(files):,}")
    elif not path.is_file():
        raise UsageError(
            f"{name}: there is no such file or folder; for a data set of the Hub write {HUB_PREFIX}NAME:SPLIT"
        )
    elif path.suffix not in SUFFIXES:
        raise UsageError(f"{name}: expected a file {known}; unpack or convert it, or give it one of these endings")
    else:
        files = [path]
    size = sum(file.stat().st_size for file in files)
    if size > MAX_SOURCE_BYTES:
        raise UsageError(f"{name}: has {size:,} bytes, expected at most {MAX_SOURCE_BYTES:,}; a part of it is enough")
    return files
