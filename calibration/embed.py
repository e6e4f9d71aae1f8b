"""Embeddings of the calibration tokens, with image features in their places.

The table is read in parts (Llama 4's has 202,048 rows): what is held does not grow with the vocabulary.

Shape letters: H hidden, L positions, R rows, V vocabulary.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from llama4_quant.calibration.corpus import Corpus
from llama4_quant.calibration.rows import RowFile, row_chunks
from llama4_quant.calibration.streams import Streams
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.checkpoint.writer import CheckpointWriter
from llama4_quant.plan import Decision, Plan
from llama4_quant.runtime.model import Llama4Model, materialize
from llama4_quant.scheme import SchemeLookup

TensorOf = Callable[[Decision], Iterable[tuple[str, Tensor]]]
"""From a weight to its tensors, by the last part of their names."""


def write_embeddings(
    streams: Streams, corpus: Corpus, plan: Plan, reader: CheckpointReader, writer: CheckpointWriter
) -> None:
    """Write what the decoder's first layer gets.

    Args:
        streams: where to; the quantized stream gets image features of the quantized vision tower, if it is quantized.
        corpus: whose calibration set it is.
        plan: of the conversion; everything but the decoder's layers has been written.
        reader: the source.
        writer: the output.
    """
    config = plan.config
    ids = torch.cat([sample.input_ids for sample in corpus.samples()])
    name = f"{config.prefix}model.embed_tokens.weight"
    num_rows, width = reader.tensors[name].shape
    for part in row_chunks(num_rows, width):
        tokens = torch.nonzero((ids >= part.start) & (ids < part.stop)).squeeze(-1)
        if len(tokens):
            table_VH = reader.read_rows(name, part.start, part.stop).to(torch.float32)
            for file in streams.both():
                file.scatter(tokens, table_VH[ids[tokens] - part.start])
    if not corpus.description.num_images:
        return

    def original(decision: Decision) -> Iterable[tuple[str, Tensor]]:
        source = decision.linear.source if decision.linear else decision.name
        yield source.rpartition(".")[2], reader.read(source)

    def stored(decision: Decision) -> Iterable[tuple[str, Tensor]]:
        for output in decision.outputs:
            yield output.name.rpartition(".")[2], writer.read(output.name)

    schemes = {decision.name: decision.scheme for decision in plan.decisions}
    _write_features(streams.quantized, corpus, _vision_model(plan, schemes.__getitem__, stored))
    if streams.original is not None:
        _write_features(streams.original, corpus, _vision_model(plan, lambda _name: None, original))


def _write_features(file: RowFile, corpus: Corpus, model: Llama4Model) -> None:
    """One sample's pixels are in memory at a time."""
    image_token = model.config.image_token_index
    assert image_token is not None
    start = 0
    for sample in corpus.samples():
        if sample.pixel_values is not None:
            places = torch.nonzero(torch.eq(sample.input_ids, image_token)).squeeze(-1)
            file.scatter(start + places, model.image_features(sample.pixel_values).to(torch.float32))
        start += len(sample.input_ids)


def _vision_model(plan: Plan, scheme_of: SchemeLookup, tensors_of: TensorOf) -> Llama4Model:
    """A model of which only the vision tower and the projector have weights."""
    model = Llama4Model(plan.config, scheme_of=scheme_of, device="meta")
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
