"""Synthetic images of one coloured shape, their captions, and how Llama 4 sees an image.

A scene is size x colour x shape x background. One combination in twelve is held out: no training image ever shows it,
so naming it needs the attributes, not the picture. Positions, exact radii and shades vary within each combination.

Llama 4 cuts an image into tiles of the vision tower's size. A single tile is sent as it is; several tiles are sent row
by row, followed by the whole image squeezed into one tile. The prompt shows the same order (transformers,
`processing_llama4.py`).

Legend: N tiles, C channels, S tile side in pixels.
"""

import hashlib
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

import numpy as np
import torch
from PIL import Image, ImageDraw

TILE_SIDE = 56
TOKENS_PER_TILE = 4
QUESTIONS = ("Describe the image.", "What is in this image?", "What do you see?")
_SUPERSAMPLING = 3
_HELD_OUT_ONE_IN = 12
_SHADE = 25

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (30, 150, 50),
    "blue": (35, 65, 215),
    "yellow": (240, 220, 30),
    "purple": (140, 40, 170),
    "orange": (250, 140, 20),
    "cyan": (40, 210, 220),
    "pink": (250, 150, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (10, 10, 10),
    "gray": (128, 128, 128),
}


class Shape(StrEnum):
    """What can be drawn."""

    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    CROSS = "cross"
    RING = "ring"


class Size(StrEnum):
    """How large, relative to the shorter side of the image."""

    SMALL = "small"
    LARGE = "large"


# Radius as a share of the image's shorter side: far enough apart that the caption is never ambiguous.
_RADII = {Size.SMALL: (0.17, 0.21), Size.LARGE: (0.31, 0.37)}
# Centres lie near the corners of a 4 x 4 lattice over the shorter side (one cell is one patch), off by at most this
# share of a cell: outlines then meet patch borders in few ways, which so small a vision tower can learn.
_JITTER = 0.1
# Distances between RGB colours (0..442): nearer than this to a named one may pass for it; what stands out.
_NEAR = 60.0
_CONTRAST = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One combination of attributes."""

    size: Size
    colour: str
    shape: Shape
    background: str

    @property
    def caption(self) -> str:
        """The one right answer."""
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether training never shows this combination."""
        return hashlib.sha256(self.caption.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


def scenes(*, held_out: bool) -> tuple[Scene, ...]:
    """All combinations of one side of the split, in a fixed order."""
    every = (
        Scene(size=size, colour=colour, shape=shape, background=background)
        for size, colour, shape, background in product(Size, COLOURS, Shape, BACKGROUNDS)
    )
    return tuple(scene for scene in every if scene.held_out == held_out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Paint:
    """The two colours of a drawing, RGB."""

    ink: tuple[int, int, int]
    background: tuple[int, int, int]


def draw(scene: Scene, rng: random.Random, *, tiles_high: int = 1, tiles_wide: int = 1) -> Image.Image:
    """Draw a scene at a random place in shades of its colours.

    Args:
        scene: what to draw.
        rng: source of position, radius and shade.
        tiles_high: image height in tiles of `TILE_SIDE` pixels.
        tiles_wide: image width in tiles.

    Returns:
        RGB image of exactly tiles_wide x tiles_high tiles.
    """
    paint = Paint(ink=_shade(COLOURS[scene.colour], rng), background=_shade(BACKGROUNDS[scene.background], rng))
    return draw_shape(scene.shape, scene.size, paint, rng, tiles_high=tiles_high, tiles_wide=tiles_wide)


def draw_shape(
    shape: Shape, size: Size, paint: Paint, rng: random.Random, *, tiles_high: int = 1, tiles_wide: int = 1
) -> Image.Image:
    """Draw a shape at a random place in the given colours."""
    width, height = tiles_wide * TILE_SIDE * _SUPERSAMPLING, tiles_high * TILE_SIDE * _SUPERSAMPLING
    side = min(width, height)
    radius = rng.uniform(*_RADII[size]) * side
    x, y = (_centre(length, side / 4, radius, rng) for length in (width, height))
    image = Image.new("RGB", (width, height), paint.background)
    _ink(ImageDraw.Draw(image), shape, (x, y, radius), paint.ink)
    return image.reduce(_SUPERSAMPLING)


def unnamed_paint(rng: random.Random) -> Paint:
    """Two random colours that stand out from each other and are no named colour on a named background."""
    while True:
        first, second = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
        paint = Paint(ink=(first[0], first[1], first[2]), background=(second[0], second[1], second[2]))
        named = _near(paint.ink, COLOURS.values()) and _near(paint.background, BACKGROUNDS.values())
        if not named and math.dist(paint.ink, paint.background) > _CONTRAST:
            return paint


def tiles(image: Image.Image) -> torch.Tensor:
    """Cut an image into the tiles that the vision tower sees.

    Args:
        image: RGB, both sides multiples of `TILE_SIDE`.

    Returns:
        float32 [N, C, S, S] in -1..1: tiles row by row, then, if there are several, the whole image as one tile.
    """
    wide, high = image.width // TILE_SIDE, image.height // TILE_SIDE
    boxes = [
        (x * TILE_SIDE, y * TILE_SIDE, (x + 1) * TILE_SIDE, (y + 1) * TILE_SIDE)
        for y in range(high)
        for x in range(wide)
    ]
    parts = [image.crop(box) for box in boxes]
    if len(parts) > 1:
        parts.append(image.resize((TILE_SIDE, TILE_SIDE), Image.Resampling.BILINEAR))
    pixels = np.stack([np.asarray(part, dtype=np.float32) for part in parts])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1.0


def image_prompt(tiles_high: int, tiles_wide: int) -> str:
    """The text that stands for one image of so many tiles, as Llama 4's processor writes it."""
    patches = "<|patch|>" * TOKENS_PER_TILE
    rows = ""
    if tiles_high * tiles_wide > 1:
        rows = ("<|tile_x_separator|>".join([patches] * tiles_wide) + "<|tile_y_separator|>") * tiles_high
    return f"<|image_start|>{rows}<|image|>{patches}<|image_end|>"


def _ink(pen: ImageDraw.ImageDraw, shape: Shape, place: tuple[float, float, float], ink: tuple[int, int, int]) -> None:
    x, y, radius = place
    box = (x - radius, y - radius, x + radius, y + radius)
    match shape:
        case Shape.CIRCLE:
            pen.ellipse(box, fill=ink)
        case Shape.RING:
            pen.ellipse(box, outline=ink, width=max(1, round(radius * 0.4)))
        case Shape.SQUARE:
            pen.rectangle(box, fill=ink)
        case Shape.TRIANGLE:
            pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=ink)
        case Shape.CROSS:
            arm = radius * 0.33
            pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=ink)
            pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=ink)


def _near(colour: tuple[int, int, int], named: Iterable[tuple[int, int, int]]) -> bool:
    return any(math.dist(colour, other) < _NEAR for other in named)


def _centre(length: int, cell: float, radius: float, rng: random.Random) -> float:
    """One coordinate near a lattice point from which the shape stays (but for the jitter) inside the image."""
    nearest = range(1, round(length / cell))
    inside = [k for k in nearest if radius <= (k + 0.5) * cell and (k - 0.5) * cell <= length - radius]
    place = (rng.choice(inside) + rng.uniform(-_JITTER, _JITTER)) * cell
    return min(max(place, radius), length - radius)


def _shade(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, math.floor(channel + rng.uniform(-_SHADE, _SHADE)))) for channel in colour)
    return red, green, blue
