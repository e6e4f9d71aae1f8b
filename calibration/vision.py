"""The vision tower under calibration: tiles stream through it layer by layer, as tokens do through the decoder.

q, k and v share their sums; o and fc2 also make up for the drift of the residual stream; then come the adapter's two
layers on shuffled patches, and the projector. Norms, biases and the patch embedding stay as they are, so that nothing
is equalized here.

A layer that is done is not run again after an interruption, and a weight that is done is read back. The files of rows
go when the last weight is stored.

Shape letters: B tiles, H hidden, P patches, R rows, S side of a tile, T = P + 1 tokens of a tile.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from llama4_quant.calibration.decoder import fast_matmul
from llama4_quant.calibration.pieces import ATTENTION_ROWS
from llama4_quant.calibration.records import LayerRecord
from llama4_quant.calibration.source_weights import SourceWeights
from llama4_quant.calibration.streams import Position, Sequences, StreamFiles, drift
from llama4_quant.calibration.vision_layers import ADAPTER, PROJECTOR, TOWER, AdapterPass, VisionLayerPass, layer_norm
from llama4_quant.checkpoint.files import os_errors
from llama4_quant.config import Llama4Config
from llama4_quant.runtime.linear import Builder
from llama4_quant.runtime.vision import VisionAttention, unfold_patches

_FOLDER_NAME = "vision"


class VisionPass:
    """Calibrates the tower, its adapter and the projector of a plan."""

    def __init__(
        self,
        config: Llama4Config,
        weights: SourceWeights,
        folder: Path,
        num_tiles: int,
        *,
        with_original: bool,
        done: Callable[[str, int], None],
    ) -> None:
        """Make a folder in `folder`.

        Args:
            config: the model; it has a vision tower.
            weights: the model's.
            folder: for hidden states; what an interrupted run left there is used.
            num_tiles: of all images.
            with_original: run the original tower beside the quantized one.
            done: called with a weight's name and the source bytes that are done now.
        """
        assert config.vision is not None
        self._config, self._weights, self._num_tiles, self._done = config.vision, weights, num_tiles, done
        self._folder = vision_folder(folder)
        with os_errors(f"{self._folder}: cannot be created"):
            self._folder.mkdir(exist_ok=True)
        num_tokens = config.vision.num_patches + 1
        self._tiles = Sequences(lengths=(num_tokens,) * num_tiles)
        self._files = StreamFiles(
            self._folder,
            self._tiles.num_rows,
            config.vision.hidden_size,
            with_original=with_original,
            device=weights.device,
        )

    def run(self, tiles: Callable[[], Iterator[Tensor]]) -> tuple[LayerRecord, ...]:
        """Calibrate.

        Args:
            tiles: gives all tiles, some at a time, [B, 3, S, S]; not called where an interrupted run has used them.

        Returns:
            A record for each layer of the tower.
        """
        num_layers = self._config.num_hidden_layers
        position = self._files.position()
        is_left = self._weights.is_pending([f"{ADAPTER}.fc1", f"{ADAPTER}.fc2", PROJECTOR])
        if position is not None and position.layer == num_layers and not is_left:
            self._drop_rows()
            return position.records
        finished = self._weights.num_finished_layers(num_layers, of_vision=True)
        if position is None or position.layer > finished or not self._has_rows(position.layer):
            position = self._begin(tiles)
        attention = VisionAttention(self._config, _shapes_only())
        while position.layer < num_layers:
            position = self._run_layer(attention, position)
        with self._files.open(num_layers) as last:
            AdapterPass(self._config, self._weights, self._files, self._num_tiles, self._done).run(last)
        self._weights.sync()
        self._drop_rows()
        return position.records

    def _begin(self, tiles: Callable[[], Iterator[Tensor]]) -> Position:
        """Both towers begin with the same: patches, embedded."""
        with self._files.open(0) as streams:
            start = 0
            for pixels in tiles():
                for some in torch.split(pixels, max(1, ATTENTION_ROWS // self._tiles.lengths[0])):
                    x_RH = self._embed(some).flatten(0, 1)
                    for file in streams.both():
                        file.write(slice(start, start + len(x_RH)), x_RH)
                    start += len(x_RH)
            assert start == self._tiles.num_rows
            for file in streams.both():
                file.sync()
        position = Position()
        self._files.advance(position)
        return position

    def _embed(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, T, H], class token last."""
        original = self._weights.original
        patches = unfold_patches(pixels.to(self._weights.device, torch.float32), self._config.patch_size)
        with fast_matmul(patches.device):
            x_BPH = functional.linear(patches, original(f"{TOWER}.patch_embedding.linear"))
        class_token = original(f"{TOWER}.class_embedding").expand(len(x_BPH), 1, -1)
        x_BTH = torch.cat((x_BPH, class_token), dim=1) + original(f"{TOWER}.positional_embedding_vlm")
        return layer_norm(self._weights, f"{TOWER}.layernorm_pre")(x_BTH)

    def _run_layer(self, attention: VisionAttention, position: Position) -> Position:
        layer = VisionLayerPass(
            position.layer,
            self._config,
            attention=attention,
            weights=self._weights,
            files=self._files,
            tiles=self._tiles,
            done=self._done,
        )
        with self._files.open(position.layer) as before, self._files.open(position.layer + 1) as after:
            layer.run(before, after)
            relative_error, sqnr_db = drift(after)
            for file in after.both():
                file.sync()
        self._weights.sync()  # first: what is said to be done must not be lost with the machine
        record = LayerRecord(layer=position.layer, relative_error=relative_error, sqnr_db=sqnr_db)
        reached = Position(records=(*position.records, record))
        self._files.advance(reached)
        return reached

    def _has_rows(self, layer: int) -> bool:
        return (self._folder / f"quantized-{layer % 2}.rows").exists()

    def _drop_rows(self) -> None:
        with os_errors(f"{self._folder}: cannot be emptied"):
            for path in self._folder.glob("*.rows"):
                path.unlink()


def vision_folder(folder: Path) -> Path:
    """Where the files of the tower are, of those of a calibration."""
    return folder / _FOLDER_NAME


def _shapes_only() -> Builder:
    return Builder(dtype=torch.float32, device=torch.device("meta"), scheme_of=lambda _name: None)
