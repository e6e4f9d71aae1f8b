import random

import pytest
import torch
from PIL import Image

from llama4_quant.sample.shapes import (
    BACKGROUNDS,
    COLOURS,
    TILE_SIDE,
    Scene,
    Shape,
    Size,
    draw,
    image_prompt,
    scenes,
    tiles,
)

PATCHES = "<|patch|>" * 4


def test_every_combination_is_on_one_side_of_the_split() -> None:
    train, held_out = scenes(held_out=False), scenes(held_out=True)
    assert set(train).isdisjoint(held_out)
    assert len(train) + len(held_out) == len(Size) * len(COLOURS) * len(Shape) * len(BACKGROUNDS)
    for words in (Size, COLOURS, Shape, BACKGROUNDS):
        # Each attribute can be learned from training scenes and is asked for in held-out ones.
        for word in words:
            assert any(word in scene.caption.split() for scene in train)
    assert len(held_out) >= 20


def test_a_drawing_follows_its_seed() -> None:
    scene = scenes(held_out=False)[0]
    assert draw(scene, random.Random(1)).tobytes() == draw(scene, random.Random(1)).tobytes()
    assert draw(scene, random.Random(1)).tobytes() != draw(scene, random.Random(2)).tobytes()


@pytest.mark.parametrize("shape", list(Shape))
def test_a_drawing_shows_its_colours(shape: Shape) -> None:
    scene = Scene(size=Size.LARGE, colour="blue", shape=shape, background="white")
    image = draw(scene, random.Random(4))
    assert image.size == (TILE_SIDE, TILE_SIDE)
    counts = {"ink": 0, "background": 0}
    # A shade moves each channel by at most 25, plus one for rounding down.
    for name, colour in (("ink", COLOURS["blue"]), ("background", BACKGROUNDS["white"])):
        pixels = image.get_flattened_data() if hasattr(image, "get_flattened_data") else image.getdata()
        counts[name] = sum(all(abs(c - d) <= 26 for c, d in zip(pixel, colour, strict=True)) for pixel in pixels)
    # A large radius is at least 0.31 of 56 pixels; the smallest area is the ring's, pi r^2 (1 - 0.6^2) = 605 pixels,
    # less what borders blend; the largest the square's, (2 * 0.37 * 56)^2 = 1717 of 3136.
    assert counts["ink"] > 400
    assert counts["background"] > 1300


def test_tiles_come_row_by_row_and_the_whole_image_last() -> None:
    image = Image.new("RGB", (2 * TILE_SIDE, TILE_SIDE), (0, 0, 0))
    image.paste((255, 255, 255), (TILE_SIDE, 0, 2 * TILE_SIDE, TILE_SIDE))
    cut = tiles(image)
    assert cut.shape == (3, 3, TILE_SIDE, TILE_SIDE)
    assert torch.equal(cut[0], torch.full_like(cut[0], -1.0))
    assert torch.equal(cut[1], torch.full_like(cut[1], 1.0))
    assert cut[2, :, :, : TILE_SIDE // 2 - 1].max() == -1.0
    assert cut[2, :, :, TILE_SIDE // 2 + 1 :].min() == 1.0


def test_prompts_match_the_tiles() -> None:
    x, y = "<|tile_x_separator|>", "<|tile_y_separator|>"
    assert image_prompt(1, 1) == f"<|image_start|><|image|>{PATCHES}<|image_end|>"
    rows = (PATCHES + x + PATCHES + y) * 2
    assert image_prompt(2, 2) == f"<|image_start|>{rows}<|image|>{PATCHES}<|image_end|>"
