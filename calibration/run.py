"""A calibrated conversion's part beyond data-free quantization: its data, its memory, and running the pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama4_quant.calibration.cache_scales import CacheCalibration
from llama4_quant.calibration.corpus import Corpus, open_corpus
from llama4_quant.calibration.coverage import coverage_notes
from llama4_quant.calibration.disk import RowCounts, occupied, require_disk, row_bytes
from llama4_quant.calibration.embed import write_embeddings, written_tensors
from llama4_quant.calibration.expert_survey import Choice, Survey
from llama4_quant.calibration.mixed import choose_schemes
from llama4_quant.calibration.records import CalibrationReport, LayerRecord, MixedPrecisionRecord
from llama4_quant.calibration.sequential import SequentialPass, calibrated_items
from llama4_quant.calibration.settings import Calibration
from llama4_quant.calibration.streams import Sequences, Streams, forget_position
from llama4_quant.calibration.vision import VisionPass, vision_folder
from llama4_quant.calibration.weights import VISION_ROLES, Weights
from llama4_quant.checkpoint.paths import SCRATCH_NAME, STAGING_NAME
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.errors import UsageError
from llama4_quant.planning.plan import Plan
from llama4_quant.quantizers.backend import Backend
from llama4_quant.stream import Progress
from llama4_quant.work import WorkItem

_NO_IMAGES = (
    "The calibration data has no images, so what is quantized of the vision tower and the projector is rounded to "
    "nearest. Give image-text pairs with --calibration to calibrate it."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedCalibration:
    """A calibration whose data has been found and drawn.

    Attributes:
        settings: what was asked for.
        corpus: the data.
    """

    settings: Calibration
    corpus: Corpus

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What decides the bytes of the output."""
        settings = self.settings
        return {
            "algorithm": settings.algorithm,
            "solver": str(settings.solver),
            "min_tokens_per_expert": settings.min_tokens_per_expert,
            "device": settings.device,
            "kv_cache_scheme": settings.kv_cache_scheme,
            "data": self.corpus.description.fingerprint,
        }

    @property
    def with_images(self) -> bool:
        """Whether the calibration set has images, without which nothing of the vision tower can be calibrated."""
        return self.corpus.description.num_tiles > 0

    def items(self, plan: Plan, items: Sequence[WorkItem]) -> tuple[WorkItem, ...]:
        """The items that are calibrated; all others have to be done before `run`, without data."""
        return calibrated_items(plan, items, self.settings.solver, with_images=self.with_images)

    def require_disk(self, plan: Plan, out: Path, output_bytes: int) -> None:
        """Refuse a disk without room for the output and the hidden states of the calibration set.

        Args:
            plan: of the conversion.
            out: the output folder; it need not exist.
            output_bytes: that the output still has to reserve there.

        Raises:
            OutputError: there is too little room.
        """
        description = self.corpus.description
        counts = RowCounts(num_tokens=description.num_tokens, num_tiles=description.num_tiles)
        self._require_disk(plan, out, out / STAGING_NAME / SCRATCH_NAME, counts, output_bytes)

    def _require_disk(self, plan: Plan, out: Path, scratch: Path, counts: RowCounts, output_bytes: int) -> None:
        counts = counts if _calibrates_vision(plan) else replace(counts, num_tiles=0)
        needed = row_bytes(plan.config.text, plan.config.vision, counts, with_original=self.settings.solver.correct)
        require_disk(out, output_bytes=output_bytes, needed=needed, existing=occupied(scratch), counts=counts)

    def run(
        self,
        plan: Plan,
        items: Sequence[WorkItem],
        reader: CheckpointReader,
        writer: CheckpointWriter,
        backend: Backend,
        progress: Progress | None,
        *,
        mixed_precision: MixedPrecisionRecord | None = None,
    ) -> CalibrationReport:
        """Calibrate and write all weights of `items(plan, items)`.

        Args:
            plan: of the conversion.
            items: all items of the plan.
            reader: the source.
            writer: the output.
            backend: rounds weights that see no data.
            progress: called with a weight's name and the source bytes that are done now.
            mixed_precision: how the plan's schemes were chosen, for the report.
        """
        done = progress or (lambda _what, _num_bytes: None)
        device = torch.device(self.settings.device)
        weights = Weights(
            plan,
            items,
            reader,
            writer,
            backend,
            method=self.settings.algorithm,
            settings=self.settings.solver,
            with_images=self.with_images,
            device=device,
        )
        folder = writer.scratch
        cache = CacheCalibration(plan, items, writer)
        with torch.inference_mode():
            choice = self._choose(plan, reader, folder, device, done)
            drawn = [(len(sample.input_ids), sample.num_tiles) for sample in choice.samples(self.corpus)]
            sequences = Sequences(lengths=tuple(length for length, _ in drawn))
            counts = RowCounts(num_tokens=sequences.num_rows, num_tiles=sum(num_tiles for _, num_tiles in drawn))
            self._require_disk(plan, writer.out, folder, counts, 0)
            vision_layers = self._calibrate_vision(plan, weights, folder, counts.num_tiles, choice, done)
            passing = SequentialPass(
                plan.config, weights, folder, with_original=self.settings.solver.correct, done=done, cache=cache
            )

            def embed(streams: Streams) -> None:
                write_embeddings(streams, lambda: choice.samples(self.corpus), plan, reader, written_tensors(writer))

            layers = passing.run(sequences, embed)
        return CalibrationReport(
            algorithm=self.settings.algorithm,
            data="; ".join(self.corpus.description.sources),
            num_samples=len(sequences.lengths),
            num_tokens=sequences.num_rows,
            equalized=self.settings.solver.equalize,
            layers=layers,
            vision_layers=vision_layers,
            notes=tuple(note for note in self._notes(plan, choice, layers) if note),
            mixed_precision=mixed_precision,
        )

    def _notes(self, plan: Plan, choice: Choice, layers: Sequence[LayerRecord]) -> Iterator[str]:
        yield self.corpus.note
        if _calibrates_vision(plan) and not self.with_images:
            yield _NO_IMAGES
        yield choice.note
        yield from coverage_notes(layers)

    def _calibrate_vision(
        self,
        plan: Plan,
        weights: Weights,
        folder: Path,
        num_tiles: int,
        choice: Choice,
        done: Callable[[str, int], None],
    ) -> tuple[LayerRecord, ...]:
        """Before the decoder, which gets features of the quantized tower."""
        if not num_tiles or not _calibrates_vision(plan):
            return ()

        def tiles() -> Iterator[Tensor]:
            for sample in choice.samples(self.corpus):
                if sample.pixel_values is not None:
                    yield sample.pixel_values

        with_original = self.settings.solver.correct
        passing = VisionPass(plan.config, weights, folder, num_tiles, with_original=with_original, done=done)
        return passing.run(tiles)

    def choose_schemes(
        self, plan: Plan, reader: CheckpointReader, folder: Path, progress: Progress | None
    ) -> MixedPrecisionRecord | None:
        """Measure what each weight needs, and choose schemes; None without `target_bits`.

        Args:
            plan: with one scheme for all.
            reader: the source.
            folder: where temporary files may be.
            progress: told of each layer.
        """
        if self.settings.target_bits is None:
            return None
        told = progress or (lambda _what, _num_bytes: None)
        return choose_schemes(
            plan,
            self.settings.target_bits,
            self.corpus,
            reader,
            folder=folder,
            device=self.settings.device,
            equalize=self.settings.solver.equalize,
            done=lambda what: told(what, 0),
        )

    def _choose(
        self,
        plan: Plan,
        reader: CheckpointReader,
        folder: Path,
        device: torch.device,
        done: Callable[[str, int], None],
    ) -> Choice:
        """The calibration set, with more samples where experts are to have some number of tokens."""
        num_wanted = self.settings.min_tokens_per_expert
        if not num_wanted:
            return Choice(numbers=tuple(range(self.corpus.description.num_samples)))
        choice, is_new = Survey(plan, reader, folder, device=device, done=done).choose(self.corpus, num_wanted)
        if is_new:
            forget_position(folder)  # it would be of other samples
            forget_position(vision_folder(folder))
        return choice


def _calibrates_vision(plan: Plan) -> bool:
    """Whether weights of the tower or the projector are quantized, and so calibrated if there are images."""
    return any(decision.scheme is not None and decision.role in VISION_ROLES for decision in plan.decisions)


def prepare(settings: Calibration, reader: CheckpointReader) -> PreparedCalibration:
    """Find and draw the data of a calibration.

    Raises:
        UsageError: data that cannot be used, or too little; a device that is not there.
    """
    try:
        torch.zeros(1, device=settings.device).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {settings.device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return PreparedCalibration(settings=settings, corpus=open_corpus(reader.path, settings.corpus))
