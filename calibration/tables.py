"""Parquet files and data sets of the Hub as numbered records.

Both need a library that is optional: pyarrow reads Parquet, `datasets` gets data sets of the Hub. Of a Parquet file,
only the columns that matter are decoded, a few hundred rows at a time.
"""

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from llama4_quant.calibration.documents import COLUMNS, Document, RecordReader
from llama4_quant.errors import UsageError

HUB_PREFIX = "hub:"
MAX_ROW_GROUP_BYTES = 4 * 2**30
"""Decoded size that a row group may claim, of the columns that are read."""

_BATCH_ROWS = 256
_HUB_NAME = re.compile(
    r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<config>[^:\[\]]+))??(?::(?P<split>\w[\w.-]*(?:\[[^\[\]]*\])?))?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetTable:
    """One Parquet file. `ends` [row groups]: rows up to the end of each group."""

    path: Path
    identity: str
    reader: RecordReader
    columns: tuple[str, ...]
    ends: tuple[int, ...] = field(repr=False)
    unit: str = "row"

    @property
    def num_records(self) -> int:
        """How many rows there are."""
        return self.ends[-1] if self.ends else 0

    def read(self, numbers: Sequence[int]) -> Iterator[Document]:
        """Documents by number, in the order asked for; each row group that holds one is decoded once a call.

        Raises:
            UsageError: the file is damaged, or a row holds something else than expected.
        """
        rows = self._rows(sorted(set(numbers)))
        for number in numbers:
            yield self.reader.document(rows[number], f"{self.path}, row {number + 1}")

    def _rows(self, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
        rows: dict[int, dict[str, Any]] = {}
        try:
            with _parquet().ParquetFile(self.path) as file:
                for group, end in enumerate(self.ends):
                    first = self.ends[group - 1] if group else 0
                    wanted = numbers[bisect_left(numbers, first) : bisect_left(numbers, end)]
                    if wanted:
                        rows.update(self._group_rows(file, group, first, wanted))
        except Exception as error:  # damaged files raise nearly anything
            raise UsageError(f"{self.path}: cannot be read as Parquet ({type(error).__name__}: {error})") from error
        return rows

    def _group_rows(
        self, file: Any, group: int, first: int, wanted: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(self.columns), use_threads=False)
        for batch in batches:
            here = wanted[bisect_left(wanted, first) : bisect_left(wanted, first + batch.num_rows)]
            if here:
                yield from zip(here, batch.take([number - first for number in here]).to_pylist(), strict=True)
            first += batch.num_rows
            if first > wanted[-1]:
                return


def open_parquet(path: Path, reader: RecordReader) -> ParquetTable:
    """Read the metadata of a Parquet file.

    Raises:
        UsageError: pyarrow is not installed, or the file is damaged, has none of the columns, or too large row groups.
    """
    parquet = _parquet()
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with parquet.ParquetFile(path) as table:
            names, metadata = table.schema_arrow.names, table.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    except Exception as error:
        raise UsageError(f"{path}: cannot be read as Parquet ({type(error).__name__}: {error})") from error
    columns = _known_columns(str(path), names, reader.text_column)
    for index, group in enumerate(groups):
        size = _decoded_bytes(group, columns)
        if size > MAX_ROW_GROUP_BYTES:
            raise UsageError(
                f"{path}: row group {index + 1} has {size:,} bytes, expected at most {MAX_ROW_GROUP_BYTES:,}; write "
                "the file with smaller row groups"
            )
    ends = tuple(accumulate(group.num_rows for group in groups))
    return ParquetTable(path=path, identity=digest, reader=reader, columns=columns, ends=ends)


@dataclass(frozen=True, kw_only=True, slots=True)
class HubTable:
    """One split of a data set, as `datasets` has it on disk."""

    name: str
    identity: str
    reader: RecordReader
    rows: Any = field(repr=False)
    unit: str = "row"

    @property
    def num_records(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    def read(self, numbers: Sequence[int]) -> Iterator[Document]:
        """Documents by number, in the order asked for.

        Raises:
            UsageError: a row holds something else than expected.
        """
        rows = self.rows[list(numbers)].to_pylist()
        for number, row in zip(numbers, rows, strict=True):
            yield self.reader.document(row, f"{HUB_PREFIX}{self.name}, row {number + 1}")


def open_hub(spec: str, text_column: str) -> HubTable:
    """Get a data set: `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`, in which a split may be a slice: `train[:5000]`.

    The default split is `train`. `datasets` downloads and caches; code of data sets is never run.

    Raises:
        UsageError: `datasets` is not installed, there is no such data set or split, or it has none of the columns.
    """
    match = _HUB_NAME.fullmatch(spec)
    if match is None:
        raise UsageError(
            f"{HUB_PREFIX}{spec}: expected {HUB_PREFIX}NAME, {HUB_PREFIX}NAME:SPLIT or {HUB_PREFIX}NAME:CONFIG:SPLIT, "
            f"for example {HUB_PREFIX}Salesforce/wikitext:wikitext-2-raw-v1:train[:1000]"
        )
    name, config, split = match["name"], match["config"], match["split"] or "train"
    try:
        import datasets  # noqa: PLC0415 - an optional dependency, slow to import
    except ImportError as error:
        raise UsageError(f"{HUB_PREFIX}{spec}: needs datasets; pip install 'llama4-quant[datasets]'") from error
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # network, gates, missing names, damaged files: everything ends here
        raise UsageError(
            f"{HUB_PREFIX}{spec}: cannot be loaded ({type(error).__name__}: {error}); check name, configuration and "
            "split, and the network"
        ) from error
    columns = _known_columns(f"{HUB_PREFIX}{spec}", rows.column_names, text_column)
    chosen = rows.select_columns(list(columns)).with_format("arrow")  # arrow: images stay encoded
    reader = RecordReader(text_column=text_column, folder=None)
    return HubTable(name=spec, identity=f"{name} {config} {split} {len(rows)}", reader=reader, rows=chosen)


def _known_columns(where: str, names: Sequence[str], text_column: str) -> tuple[str, ...]:
    known = tuple(name for name in dict.fromkeys((*COLUMNS, text_column)) if name in names)
    if not set(known) - {"images", "image"}:
        raise UsageError(
            f"{where}: expected a column input_ids, messages, conversations or {text_column}, found "
            f"{', '.join(names[:20])}; name the column that holds text with --text-column"
        )
    return known


def _decoded_bytes(group: Any, columns: Sequence[str]) -> int:
    chunks = [group.column(index) for index in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)


def _parquet() -> Any:
    try:
        from pyarrow import parquet  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise UsageError("Parquet files need pyarrow; pip install 'llama4-quant[datasets]'") from error
    return parquet
