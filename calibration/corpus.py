"""Calibration data: a deterministic stream of samples, of which the first ones are the calibration set.

Sources that the user names (see sources.py) take turns, so that each has given about as many tokens as the others until
it is used up. Text and chats are packed into samples of exactly `max_seq_length` tokens; what has images is a sample of
its own; pretokenized records are samples exactly as they are. The same data, settings and checkpoint give the same
samples on every machine. Nothing but an index of the records is held in memory.

Shape letters: L positions, N tiles, S side of a tile in pixels.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama4_quant.calibration.documents import Document
from llama4_quant.calibration.encoding import Encoder, Packer
from llama4_quant.calibration.sources import BuiltInText, Source, open_source
from llama4_quant.errors import UsageError

FORMAT = "llama4-quant corpus 1"
"""Goes into fingerprints; changes when the same data would give other samples."""

DEFAULT_NUM_SAMPLES = 256
DEFAULT_MAX_SEQ_LENGTH = 2048

BUILT_IN = "documentation of this machine's Python"
_BUILT_IN_NOTE = (
    f"No calibration data was given, so the built-in text is used: the {BUILT_IN} (English technical prose, no images, "
    "no conversations). Quantization is best for text like what it is calibrated on, so give some of what the model "
    "will read, with --calibration."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sequence that the model is run on.

    Attributes:
        input_ids: [L] int64.
        pixel_values: [N, 3, S, S] bfloat16, tiles of all images in order, or None.
        num_images: of which the tiles are.
    """

    input_ids: Tensor
    pixel_values: Tensor | None = None
    num_images: int = 0

    @property
    def num_tiles(self) -> int:
        """Tiles of all images."""
        return 0 if self.pixel_values is None else len(self.pixel_values)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSettings:
    """What to calibrate on.

    Attributes:
        data: files, folders and `hub:` data sets; none for the built-in text.
        num_samples: in the calibration set. 256 samples of 2048 tokens are 524,288 tokens: 4,096 for each of Maverick's
            128 experts on average, and rarely used ones can be topped up.
        max_seq_length: tokens of a packed sample, and most tokens of any other.
        seed: decides the order of records.
        text_column: where records of JSON, Parquet and Hub data sets have plain text.
    """

    data: tuple[str, ...] = ()
    num_samples: int = DEFAULT_NUM_SAMPLES
    max_seq_length: int = DEFAULT_MAX_SEQ_LENGTH
    seed: int = 0
    text_column: str = "text"

    def __post_init__(self) -> None:
        for name, low in (("num_samples", 1), ("max_seq_length", 2), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise UsageError(f"{name} is {value!r}, expected an integer of at least {low}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusDescription:
    """What a corpus is.

    Attributes:
        sources: one line each.
        num_samples, num_tokens, num_images: of the calibration set. An image is one tile or several.
        fingerprint: SHA-256, in hexadecimal, of the calibration set's tokens and pixels, of the settings, and of the
            files that more samples come from (of a Hub data set: its name and number of rows).
    """

    sources: tuple[str, ...]
    num_samples: int
    num_tokens: int
    num_images: int
    num_tiles: int
    max_seq_length: int
    seed: int
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """All of it, for reports."""
        return asdict(self) | {"sources": list(self.sources)}


class Corpus:
    """A stream of samples that ends where the data does.

    Attributes:
        description: what it is.
        note: sentences that the user should read (built-in text, fewer samples than asked for), or "".
    """

    def __init__(self, sources: tuple[Source, ...], encoder: Encoder, settings: CalibrationSettings) -> None:
        """Draw the calibration set once, to check, count and fingerprint it.

        Raises:
            UsageError: a record of the calibration set cannot be used, or there is too little text for one sample.
        """
        self._sources = sources
        self._encoder = encoder
        self._settings = settings
        self.description = self._describe()
        self.note = self._write_note()

    def __iter__(self) -> Iterator[Sample]:
        """All samples: the calibration set, then what it can be topped up with."""
        packer: Packer | None = None
        streams = [_Stream(source, self._settings.seed, position) for position, source in enumerate(self._sources)]
        while streams:
            stream = min(streams, key=lambda stream: stream.num_tokens)
            document = next(stream.documents, None)
            if document is None:
                streams.remove(stream)
                continue
            encoded = self._encoder.encode(document)
            stream.num_tokens += len(encoded.input_ids)
            samples: Iterable[Sequence[int]] = [encoded.input_ids]
            if not encoded.is_sample:
                packer = packer or Packer(self._settings.max_seq_length, self._encoder.tokenizer.bos_token_id)
                samples = packer.push(encoded.input_ids)
            for ids in samples:
                yield Sample(
                    input_ids=torch.tensor(ids, dtype=torch.int64),
                    pixel_values=encoded.pixel_values,
                    num_images=encoded.num_images,
                )

    def samples(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        """Samples `start` to `stop` (exclusive; None: the end of the calibration set), fewer if the data ends before.

        Samples before `start` are drawn and dropped; to go on and on, keep one iterator over the corpus.
        """
        return islice(iter(self), start, self._settings.num_samples if stop is None else stop)

    def _describe(self) -> CorpusDescription:
        settings = self._settings
        digest = hashlib.sha256()
        num_samples = num_tokens = num_images = num_tiles = 0
        for sample in self.samples():
            _add(digest, sample)
            num_samples += 1
            num_tokens += len(sample.input_ids)
            num_images += sample.num_images
            num_tiles += sample.num_tiles
        if num_samples == 0:
            raise self._too_little()
        return CorpusDescription(
            sources=tuple(source.description for source in self._sources),
            num_samples=num_samples,
            num_tokens=num_tokens,
            num_images=num_images,
            num_tiles=num_tiles,
            max_seq_length=settings.max_seq_length,
            seed=settings.seed,
            fingerprint=self._fingerprint(digest.hexdigest()),
        )

    def _too_little(self) -> UsageError:
        documents = (document for source in self._sources for document in source.documents(self._settings.seed, 0))
        num_tokens = sum(len(self._encoder.encode(document).input_ids) for document in documents)
        return UsageError(
            f"{', '.join(source.name for source in self._sources)}: too little text: {num_tokens:,} tokens, and one "
            f"sample needs {self._settings.max_seq_length:,}; give more text, or a smaller --max-seq-length"
        )

    def _fingerprint(self, samples: str) -> str:
        settings = {key: value for key, value in asdict(self._settings).items() if key != "data"}
        stores = [[store.identity for store in source.stores] for source in self._sources]
        text = json.dumps([FORMAT, settings, stores, samples], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _write_note(self) -> str:
        sentences = [] if self._settings.data else [_BUILT_IN_NOTE]
        found, wanted = self.description.num_samples, self._settings.num_samples
        if found < wanted:
            sentences.append(
                f"The data ends after {found:,} of {wanted:,} samples ({self.description.num_tokens:,} tokens), and "
                "nothing is left to top up rarely used experts."
            )
        return " ".join(sentences)


class _Stream:
    """One source's documents, and how many tokens they had."""

    def __init__(self, source: Source, seed: int, position: int) -> None:
        self.documents: Iterator[Document] = source.documents(seed, position)
        self.num_tokens = 0


def open_corpus(folder: Path, settings: CalibrationSettings) -> Corpus:
    """Open calibration data for a checkpoint.

    Args:
        folder: holds config.json, the tokenizer with its chat template and, for a model with vision, processor files.
        settings: what to calibrate on.

    Raises:
        UsageError: data that does not exist or cannot be used, with the record at fault; too little of it.
        CheckpointError: there is no tokenizer.
        ConfigError: config.json or the processor's settings cannot be used.
    """
    encoder = Encoder.from_folder(folder, settings.max_seq_length)
    # 16 bytes are about four tokens of English: a long text becomes passages of about four samples.
    passage_bytes = max(4096, 16 * settings.max_seq_length)
    sources = tuple(
        open_source(name, text_column=settings.text_column, passage_bytes=passage_bytes) for name in settings.data
    )
    return Corpus(sources or (Source(name=BUILT_IN, stores=(BuiltInText.collect(),)),), encoder, settings)


def _add(digest: Any, sample: Sample) -> None:
    """Everything of a sample, with its shapes, so that no two samples give the same bytes."""
    pixels = sample.pixel_values
    digest.update(f"{len(sample.input_ids)} {None if pixels is None else tuple(pixels.shape)}".encode())
    digest.update(sample.input_ids.numpy().astype(np.dtype("<i8")).tobytes())
    if pixels is not None:
        digest.update(pixels.contiguous().view(torch.int16).numpy().astype(np.dtype("<i2")).tobytes())
