"""One layer of the vision tower under calibration, and what comes after the last: the adapter and the projector.

Shape letters: B tiles, H hidden, K in, N out, P patches, R rows, T = P + 1 tokens of a tile.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from llama4_quant.calibration.decoder import fast_matmul
from llama4_quant.calibration.pieces import ATTENTION_ROWS, Inputs, Pieces
from llama4_quant.calibration.rows import row_chunks
from llama4_quant.calibration.source_weights import SourceWeights
from llama4_quant.calibration.streams import Sequences, StreamFiles, Streams
from llama4_quant.config import VisionConfig
from llama4_quant.runtime.rope import VisionRotary
from llama4_quant.runtime.vision import LAYER_NORM_EPS, VisionAttention, pixel_shuffle

TOWER, PROJECTOR = "vision_model", "multi_modal_projector.linear_1"
ADAPTER = f"{TOWER}.vision_adapter.mlp"


class VisionLayerPass(Pieces):
    """Calibrates one layer of the tower and writes the hidden states after it."""

    def __init__(
        self,
        layer: int,
        config: VisionConfig,
        *,
        attention: VisionAttention,
        weights: SourceWeights,
        files: StreamFiles,
        tiles: Sequences,
        done: Callable[[str, int], None],
    ) -> None:
        """Nothing is read yet.

        Args:
            layer: its number.
            config: the tower.
            attention: its arithmetic; weights are not used.
            weights: the model's.
            files: for hidden states and what lives within a layer.
            tiles: where tiles lie.
            done: called with a weight's name and the source bytes that are done now.
        """
        super().__init__(weights, files, done)
        self._config, self._attention, self._tiles = config, attention, tiles
        self._base = f"{TOWER}.model.layers.{layer}"

    def run(self, before: Streams, after: Streams) -> None:
        """Attention, then MLP."""
        self._attend(before, after)
        norm = layer_norm(self._weights, f"{self._base}.post_attention_layernorm")
        base = f"{self._base}.mlp"
        with self._scratch("inner", self._config.intermediate_size) as inner:
            self._through([f"{base}.fc1"], lambda rows: self._both(after, rows, norm), inner, _gelu)
            self._write_to_residual(f"{base}.fc2", inner, after, after)

    def _attend(self, before: Streams, after: Streams) -> None:
        names = [f"{self._base}.self_attn.{projection}_proj" for projection in "qkv"]
        norm = layer_norm(self._weights, f"{self._base}.input_layernorm")
        biases = [self._bias(name) for name in names]
        rotation = VisionRotary(self._config).to(self._weights.device)()

        def normed(rows: slice) -> Inputs:
            return self._both(before, rows, norm)

        pairs = self._quantize(names, self._moments(names, before.quantized.chunks(), normed))
        with self._scratch("context", self._config.hidden_size) as context:
            for rows, length in self._tiles.batches(ATTENTION_ROWS):
                for file, x_RH, side in self._sides(context, normed(rows)):
                    q, k, v = (y.view(-1, length, y.shape[-1]) for y in self._project(pairs, x_RH, side, biases))
                    with fast_matmul(x_RH.device):
                        file.write(rows, self._attention.context(q, k, v, rotation).flatten(0, 1))
            self._write_to_residual(f"{self._base}.self_attn.o_proj", context, before, after)

    def _importance(self, residual_RH: Tensor) -> Tensor:
        return 1.0 / (residual_RH.var(dim=-1, correction=0) + LAYER_NORM_EPS)

    def _bias(self, name: str) -> Tensor:
        return self._weights.original(f"{name}.bias")


class AdapterPass(Pieces):
    """Calibrates the adapter and the projector on the tower's last hidden states."""

    def __init__(
        self,
        config: VisionConfig,
        weights: SourceWeights,
        files: StreamFiles,
        num_tiles: int,
        done: Callable[[str, int], None],
    ) -> None:
        """Nothing is read yet; arguments as of `VisionLayerPass`, and the number of tiles."""
        super().__init__(weights, files, done)
        self._config, self._num_tiles = config, num_tiles

    def run(self, last: Streams) -> None:
        """Patches are shuffled, then pass through fc1, fc2 and the projector."""
        config, num_rows = self._config, self._num_tiles * self._config.tokens_per_tile
        with (
            self._scratch("shuffled", config.intermediate_size, num_rows) as shuffled,
            self._scratch("first", config.projector_input_dim, num_rows) as first,
            self._scratch("second", config.projector_output_dim, num_rows) as second,
        ):
            self._shuffle(last, shuffled)
            self._through([f"{ADAPTER}.fc1"], lambda rows: self._both(shuffled, rows), first, _gelu)
            self._through([f"{ADAPTER}.fc2"], lambda rows: self._both(first, rows), second, _gelu)
            chunks = second.quantized.chunks()
            self._quantize([PROJECTOR], self._moments([PROJECTOR], chunks, lambda rows: self._both(second, rows)))

    def _shuffle(self, last: Streams, shuffled: Streams) -> None:
        norm = layer_norm(self._weights, f"{TOWER}.layernorm_post")
        config, square = self._config, round(1 / self._config.pixel_shuffle_ratio)
        num_tokens = config.num_patches + 1
        for tiles in row_chunks(self._num_tiles, num_tokens * config.hidden_size):
            for source, file in zip(last.both(), shuffled.both(), strict=True):
                x_RH = norm(source.read(slice(tiles.start * num_tokens, tiles.stop * num_tokens)))
                y_BPH = pixel_shuffle(x_RH.view(-1, num_tokens, x_RH.shape[-1])[:, :-1], square)
                per_tile = config.tokens_per_tile
                file.write(slice(tiles.start * per_tile, tiles.stop * per_tile), y_BPH.flatten(0, 1))


def layer_norm(weights: SourceWeights, name: str) -> Callable[[Tensor], Tensor]:
    """A LayerNorm of the tower, [..., H] -> [..., H]."""
    gain_H, bias_H = weights.original(f"{name}.weight"), weights.original(f"{name}.bias")
    return lambda x: functional.layer_norm(x, gain_H.shape, gain_H, bias_H, LAYER_NORM_EPS)


def _gelu(outputs: list[Tensor]) -> Tensor:
    (y_RN,) = outputs
    return functional.gelu(y_RN)
