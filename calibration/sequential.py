"""The calibration pass: embeddings, then layer after layer, each on what the quantized layers before it give; the head.

Hidden states of all tokens are in files; of weights one expert at a time is in memory, with what its inputs' sums and
the solver take. Layers done before an interruption are not read again; in the layer that it fell into, finished
experts are read back and only the others are solved.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from llama4_quant.calibration.cache_scales import CacheCalibration
from llama4_quant.calibration.decoder import DecoderMath
from llama4_quant.calibration.head import calibrate_head
from llama4_quant.calibration.layer import LayerPass
from llama4_quant.calibration.records import LayerRecord
from llama4_quant.calibration.routing import Routing
from llama4_quant.calibration.settings import SolverSettings
from llama4_quant.calibration.source_weights import SourceWeights
from llama4_quant.calibration.streams import Position, Sequences, StreamFiles, Streams, drift
from llama4_quant.calibration.weights import is_written
from llama4_quant.config import Llama4Config
from llama4_quant.planning.plan import Plan
from llama4_quant.work import WorkItem, item_decisions


def calibrated_items(
    plan: Plan, items: Sequence[WorkItem], settings: SolverSettings, *, with_images: bool
) -> tuple[WorkItem, ...]:
    """Items whose weights a calibration writes; all others need no data, or there is none for them."""
    return tuple(
        item
        for item in items
        if any(
            is_written(decision, settings, with_images=with_images)
            for decision in item_decisions(plan.tensors[item.tensor], item)
        )
    )


class SequentialPass:
    """Calibrates all layers of a plan."""

    def __init__(
        self,
        config: Llama4Config,
        weights: SourceWeights,
        folder: Path,
        *,
        with_original: bool,
        done: Callable[[str, int], None],
        routed: Callable[[int, Routing], None] | None = None,
        cache: CacheCalibration | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            config: the model.
            weights: the model's; SourceWeights only run it.
            folder: for hidden states; what an interrupted run left there is used.
            with_original: run the original model beside the quantized one.
            done: called with a weight's name and the source bytes that are done now.
            routed: called with a layer's number and where its tokens went, before the layer counts as done.
            cache: scales of the output's KV cache, if it is to have some.
        """
        self._config, self._weights, self._cache, self._folder = config, weights, cache, folder
        self._with_original, self._done, self._routed = with_original, done, routed

    def run(self, sequences: Sequences, embed: Callable[[Streams], None]) -> tuple[LayerRecord, ...]:
        """Calibrate.

        Args:
            sequences: the samples' lengths.
            embed: writes the embeddings of all tokens; not called where an interrupted run has done that.

        Returns:
            A record for each layer.
        """
        text, device = self._config.text, self._weights.device
        files = StreamFiles(
            self._folder, sequences.num_rows, text.hidden_size, with_original=self._with_original, device=device
        )
        maths = DecoderMath(text, device)
        position = files.position()
        if position is None or position.layer > self._weights.num_finished_layers(text.num_hidden_layers):
            position = self._begin(files, embed)
        while position.layer < text.num_hidden_layers:
            layer = LayerPass(
                position.layer,
                f"{self._config.prefix}model.layers.{position.layer}",
                maths=maths,
                weights=self._weights,
                files=files,
                sequences=sequences,
                cache=self._cache,
                done=self._done,
            )
            position = self._run_layer(layer, files, position)
        with files.open(text.num_hidden_layers) as last:
            calibrate_head(self._config, self._weights, last, self._done)
        return position.records

    def _run_layer(self, layer: LayerPass, files: StreamFiles, position: Position) -> Position:
        with files.open(position.layer) as before, files.open(position.layer + 1) as after:
            layer.run(before, after)
            relative_error, sqnr_db = drift(after)
            record = LayerRecord(
                layer=position.layer,
                rows_per_expert=() if layer.routing is None else layer.routing.rows_per_expert,
                relative_error=relative_error,
                sqnr_db=sqnr_db,
                rerouted=None if layer.routing is None else layer.routing.rerouted,
                cache=layer.cache,
            )
            for file in after.both():
                file.sync()
        if self._routed is not None and layer.routing is not None:
            self._routed(position.layer, layer.routing)
        self._weights.sync()  # first: what is said to be done must not be lost with the machine
        reached = Position(records=(*position.records, record))
        files.advance(reached)
        return reached

    def _begin(self, files: StreamFiles, embed: Callable[[Streams], None]) -> Position:
        with files.open(0) as streams:
            embed(streams)
            for file in streams.both():
                file.sync()
        position = Position()
        files.advance(position)
        return position
