"""A calibrated conversion's part beyond data-free quantization: its data, its memory, and running the pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama4_quant.calibration.cache_scales import CacheCalibration
from llama4_quant.calibration.corpus import Corpus, open_corpus
from llama4_quant.calibration.coverage import coverage_notes
from llama4_quant.calibration.embed import write_embeddings, written_tensors
from llama4_quant.calibration.expert_survey import Choice, Survey
from llama4_quant.calibration.mixed import choose_schemes
from llama4_quant.calibration.records import CalibrationReport, MixedPrecisionRecord
from llama4_quant.calibration.sequential import SequentialPass, calibrated_items
from llama4_quant.calibration.settings import Calibration
from llama4_quant.calibration.streams import Sequences, Streams, forget_position
from llama4_quant.calibration.weights import Weights
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.errors import UsageError
from llama4_quant.plan import Plan
from llama4_quant.quantizers.backend import Backend
from llama4_quant.stream import Progress
from llama4_quant.work import WorkItem


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

    def items(self, plan: Plan, items: Sequence[WorkItem]) -> tuple[WorkItem, ...]:
        """The items that are calibrated; all others need no data and have to be done before `run`."""
        return calibrated_items(plan, items, self.settings.solver)

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
            device=device,
        )
        folder = writer.scratch
        cache = CacheCalibration(plan, items, writer)
        with torch.inference_mode():
            choice = self._choose(plan, reader, folder, device, done)
            sequences = Sequences(lengths=tuple(len(sample.input_ids) for sample in choice.samples(self.corpus)))
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
            notes=tuple(note for note in (self.corpus.note, choice.note, *coverage_notes(layers)) if note),
            mixed_precision=mixed_precision,
        )

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
        return choice


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
