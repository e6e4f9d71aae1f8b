"""Parts of the vision tower that whole-model parity sees only faintly."""

import torch
from runtime.tiny_model import image_config, random_model
from torch import Tensor

from llama4_quant.runtime.linear import Builder
from llama4_quant.runtime.vision import LayerNorm, pixel_shuffle


def test_layer_norm_is_torchs_with_its_default_epsilon() -> None:
    norm = LayerNorm(Builder(dtype=torch.float32, device=torch.device("cpu"), scheme_of=lambda _: None), 32)
    peer = torch.nn.LayerNorm(32)
    for ours, theirs in ((norm.weight, peer.weight), (norm.bias, peer.bias)):
        theirs.data.normal_(generator=torch.Generator().manual_seed(0))
        ours.copy_(theirs)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)) * 1e-3  # a variance below epsilon
    assert torch.equal(norm(x), peer(x))


def test_pixel_shuffle_joins_squares_in_reading_order() -> None:
    patches = torch.arange(16.0).view(1, 16, 1)  # a 4 x 4 grid, each patch its own number
    joined = pixel_shuffle(patches, 2)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert joined.tolist() == [expected]


def test_tiles_do_not_see_each_other() -> None:
    model = random_model(image_config())
    tiles: Tensor = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    together = model.image_features(tiles)
    assert together.shape == (3 * 4, 64)
    alone = torch.cat([model.image_features(tile.unsqueeze(0)) for tile in tiles])
    # The same fp32 sums, cut differently by the matrix library.
    torch.testing.assert_close(together, alone)


def test_pixels_of_any_dtype() -> None:
    model = random_model(image_config())
    tiles = torch.randn(1, 3, 16, 16).bfloat16()
    assert torch.equal(model.image_features(tiles), model.image_features(tiles.float()))
