"""A calibrated conversion's part beyond data-free quantization: its data, its memory, and running the pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llama4_quant.calibration.cache_scales import CacheCalibration
from llama4_quant.calibration.corpus import Corpus, open_corpus
from llama4_quant.calibration.embed import write_embeddings
from llama4_quant.calibration.records import CalibrationReport, LayerRecord
from llama4_quant.calibration.sequential import SequentialPass, calibrated_items
from llama4_quant.calibration.settings import Calibration
from llama4_quant.calibration.streams import Sequences
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
        lengths: tokens of each sample of the calibration set.
    """

    settings: Calibration
    corpus: Corpus
    lengths: tuple[int, ...]

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
    ) -> CalibrationReport:
        """Calibrate and write all weights of `items(plan, items)`.

        Args:
            plan: of the conversion.
            items: all items of the plan.
            reader: the source.
            writer: the output.
            backend: rounds weights that see no data.
            progress: called with a weight's name and the source bytes that are done now.
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
        sequences = Sequences(lengths=self.lengths)
        cache = CacheCalibration(plan, items, writer)
        passing = SequentialPass(plan.config, weights, cache, writer.scratch, self.settings.solver, done)
        with torch.inference_mode():
            layers = passing.run(
                sequences, lambda streams: write_embeddings(streams, self.corpus, plan, reader, writer)
            )
        return self._report(layers)

    def _report(self, layers: tuple[LayerRecord, ...]) -> CalibrationReport:
        description = self.corpus.description
        notes = [self.corpus.note] if self.corpus.note else []
        return CalibrationReport(
            algorithm=self.settings.algorithm,
            data="; ".join(description.sources),
            num_samples=len(self.lengths),
            num_tokens=sum(self.lengths),
            equalized=self.settings.solver.equalize,
            layers=layers,
            notes=(*notes, *_coverage_notes(layers)),
        )


def prepare(settings: Calibration, reader: CheckpointReader) -> PreparedCalibration:
    """Find and draw the data of a calibration.

    Raises:
        UsageError: data that cannot be used, or too little; a device that is not there.
    """
    try:
        torch.zeros(1, device=settings.device).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {settings.device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    corpus = open_corpus(reader.path, settings.corpus)
    return PreparedCalibration(
        settings=settings, corpus=corpus, lengths=tuple(len(sample.input_ids) for sample in corpus.samples())
    )


def _coverage_notes(layers: Sequence[LayerRecord]) -> list[str]:
    """A sentence about experts that no token was routed to."""
    unseen = [
        f"layer {record.layer} expert {expert}"
        for record in layers
        for expert, rows in enumerate(record.rows_per_expert)
        if rows == 0
    ]
    if not unseen:
        return []
    shown = ", ".join(unseen[:8]) + (f" and {len(unseen) - 8} more" if len(unseen) > 8 else "")
    sentence = (
        f"No token was routed to {len(unseen)} experts ({shown}): they were rounded to nearest. More or other "
        "calibration data may reach them; --min-tokens-per-expert draws more where it is needed."
    )
    return [sentence]
