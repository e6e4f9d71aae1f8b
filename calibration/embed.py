"""Embeddings of the calibration tokens, with image features in their places.

The table is read in parts (Llama 4's has 202,048 rows): what is held does not grow with the vocabulary.

Shape letters: H hidden, L positions, R rows, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from llama4_quant.calibration.corpus import Sample
from llama4_quant.calibration.rows import RowFile, row_chunks
from llama4_quant.calibration.streams import Streams
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.planning.plan import Decision, Plan
from llama4_quant.runtime.model import Llama4Model, materialize
from llama4_quant.scheme import SchemeLookup

TensorOf = Callable[[Decision], Iterable[tuple[str, Tensor]]]
"""From a weight to its tensors, by the last part of their names."""
Samples = Callable[[], Iterator[Sample]]
"""Draws the same samples each time it is called; they are not held."""


def write_embeddings(
    streams: Streams, samples: Samples, plan: Plan, reader: CheckpointReader, stored: TensorOf | None
) -> None:
    """Write what the decoder's first layer gets.

    Args:
        streams: where to; the quantized stream gets image features of the quantized vision tower, if it is quantized.
        samples: draws the samples anew each time it is called.
        plan: of the conversion.
        reader: the source.
        stored: gives weights as the quantized model has them; None for a model that is not quantized.
    """
    config = plan.config
    drawn = [(sample.input_ids, sample.num_images) for sample in samples()]
    ids = torch.cat([input_ids for input_ids, _ in drawn])
    name = f"{config.prefix}model.embed_tokens.weight"
    num_rows, width = reader.tensors[name].shape
    for part in row_chunks(num_rows, width):
        tokens = torch.nonzero((ids >= part.start) & (ids < part.stop)).squeeze(-1)
        if not len(tokens):
            continue
        table_VH = reader.read_rows(name, part.start, part.stop).to(torch.float32)
        for some in row_chunks(len(tokens), width):  # a few rows of the table may be those of most tokens
            for file in streams.both():
                file.scatter(tokens[some], table_VH[ids[tokens[some]] - part.start])
    if any(num_images for _, num_images in drawn):
        _write_images(streams, samples, plan, reader, stored)


def _write_images(
    streams: Streams, samples: Samples, plan: Plan, reader: CheckpointReader, stored: TensorOf | None
) -> None:
    """Put features of each model's vision tower into its stream; one tower is in memory at a time."""
    schemes = {decision.name: decision.scheme for decision in plan.decisions}

    def original(decision: Decision) -> Iterable[tuple[str, Tensor]]:
        source = decision.linear.source if decision.linear else decision.name
        yield source.rpartition(".")[2], reader.read(source)

    if streams.original is not None:
        _write_features(streams.original, samples, _vision_model(plan, _as_it_is, original))
    scheme_of = _as_it_is if stored is None else schemes.__getitem__
    _write_features(streams.quantized, samples, _vision_model(plan, scheme_of, stored or original))


def _as_it_is(_name: str) -> None:
    return None


def written_tensors(writer: CheckpointWriter) -> TensorOf:
    """Tensors of weights that have been written."""

    def stored(decision: Decision) -> Iterable[tuple[str, Tensor]]:
        for output in decision.outputs:
            yield output.name.rpartition(".")[2], writer.read(output.name)

    return stored


def _write_features(file: RowFile, samples: Samples, model: Llama4Model) -> None:
    """One sample's pixels are in memory at a time."""
    image_token = model.config.image_token_index
    assert image_token is not None
    start = 0
    for sample in samples():
        if sample.pixel_values is not None:
            places = torch.nonzero(torch.eq(sample.input_ids, image_token)).squeeze(-1)
            file.scatter(start + places, model.image_features(sample.pixel_values).to(torch.float32))
        start += len(sample.input_ids)


def _vision_model(plan: Plan, scheme_of: SchemeLookup, tensors_of: TensorOf) -> Llama4Model:
    """A model of which only the vision tower and the projector have weights."""
    model = Llama4Model(plan.config, scheme_of=scheme_of, device="meta", kernel="reference")
    materialize(model.vision_model, "cpu")
    materialize(model.multi_modal_projector, "cpu")
    plain = model.plain_targets()
    for decision in plan.decisions:
        if decision.name.startswith(("vision_model.", "multi_modal_projector.")):
            targets = plain if decision.linear is None else model.linear_target(decision.linear)
            for suffix, values in tensors_of(decision):
                target = targets.get(decision.name if decision.linear is None else suffix)
                if target is not None:
                    target.copy_(values)
    return model.eval()
