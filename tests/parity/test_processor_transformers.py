"""Our tiles and prompts against transformers' own Llama 4 processor.

Pixels need torchvision, which the project does not depend on: where it is installed, images of many sizes must come out
bit for bit the same. Everywhere, digests of transformers' results for a fixed set of images (`GOLDEN`) must be met, so
that the comparison keeps its power without torchvision. Bilinear resize of uint8 is integer arithmetic on x86 and Arm.
"""

import hashlib
import importlib
import random
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from llama4_quant.runtime.processor import ImageProcessor, ProcessedImage, ProcessorSettings

SMALL = ProcessorSettings(tile_size=28, tokens_per_tile=1)
REAL = ProcessorSettings(tile_size=336, tokens_per_tile=144)
CASES = {
    "real-landscape": (REAL, 300, 500),
    "real-exact-tile": (REAL, 336, 336),
    "real-photo": (REAL, 1080, 1440),
    "real-tiny": (REAL, 5, 3),
    "one-pixel": (SMALL, 1, 1),
    "exact-grid": (SMALL, 56, 84),
    "strip": (SMALL, 3, 400),
    "column": (SMALL, 700, 9),
    "shrunk": (SMALL, 301, 299),
    "float32-floor": (SMALL, 61, 427),
    "few-tiles": (replace(SMALL, max_tiles=3), 90, 61),
    "one-tile": (replace(SMALL, max_tiles=1), 90, 61),
    "enlarged": (replace(SMALL, resize_to_max_canvas=True), 20, 33),
    "enlarged-square": (replace(SMALL, resize_to_max_canvas=True), 17, 17),
    "colours": (replace(SMALL, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28), rescale_factor=1 / 127), 40, 50),
}
GOLDEN = {
    "real-landscape": (1, 2, "a3812d639297a4213de3dd83"),
    "real-exact-tile": (1, 1, "f57f1095056145c6fd177439"),
    "real-photo": (3, 4, "f492ce1de35a9d652e2a4447"),
    "real-tiny": (1, 1, "e76562252656648d4bd71524"),
    "one-pixel": (1, 1, "8ef5715d2fb65894a6d2effc"),
    "exact-grid": (2, 3, "d38c0db1ff95402de927740d"),
    "strip": (1, 15, "991f044ac4beda9a1d9cb7eb"),
    "column": (16, 1, "e76449bd6e64652813598a04"),
    "shrunk": (4, 4, "2185e027d7d1fb915c14da30"),
    "float32-floor": (2, 8, "1fea54dfe854c17be83e7d54"),
    "few-tiles": (2, 1, "34babce6ca6fd4f3a30fc69f"),
    "one-tile": (1, 1, "6df7aae2f435067311de2660"),
    "enlarged": (3, 5, "93743a1d004724a8d96f7728"),
    "enlarged-square": (4, 4, "6ae4babe0f8af466ef7df0b9"),
    "colours": (2, 2, "96d2f3587e7e2e95ff0db438"),
}


def pattern(height: int, width: int) -> Image.Image:
    """An image that needs no random numbers and repeats nowhere."""
    y, x, c = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(3), indexing="ij")
    pixels = (x * 3 + y * 5 + c * 85 + x * y // 7) % 256
    return Image.frombytes("RGB", (width, height), pixels.to(torch.uint8).numpy().tobytes())


def digest(tiles: Tensor) -> str:
    return hashlib.sha256(tiles.contiguous().view(torch.int16).numpy().tobytes()).hexdigest()[:24]


@pytest.fixture(scope="module", autouse=True)
def _usable_torchvision() -> None:
    """Make torchvision importable where its compiled half does not fit this build of torch; this needs none of it."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass  # not installed: tests that need it skip
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


def theirs(settings: ProcessorSettings, images: list[Image.Image]) -> list[ProcessedImage]:
    """transformers' result; skips the test where torchvision is not installed."""
    pytest.importorskip("torchvision")
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor  # noqa: PLC0415

    processor = Llama4ImageProcessor(
        size={"height": settings.tile_size, "width": settings.tile_size},
        max_patches=settings.max_tiles,
        resize_to_max_canvas=settings.resize_to_max_canvas,
        rescale_factor=settings.rescale_factor,
        image_mean=list(settings.mean),
        image_std=list(settings.std),
    )
    result = processor(images, return_tensors="pt")
    grids = [(int(rows), int(columns)) for rows, columns in result["aspect_ratios"]]
    tiles = result["pixel_values"].split([r * c + (r * c > 1) for r, c in grids])
    return [ProcessedImage(tiles=t, rows=r, columns=c) for t, (r, c) in zip(tiles, grids, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    settings, height, width = CASES[case]
    ours = ImageProcessor(settings).process(pattern(height, width))
    assert (ours.rows, ours.columns, digest(ours.tiles)) == GOLDEN[case]


@pytest.mark.parametrize("case", CASES)
def test_golden_is_what_transformers_gives(case: str) -> None:
    settings, height, width = CASES[case]
    (expected,) = theirs(settings, [pattern(height, width)])
    assert (expected.rows, expected.columns, digest(expected.tiles)) == GOLDEN[case]


@pytest.mark.parametrize("seed", range(8))
def test_many_sizes_equal_bit_for_bit(seed: int) -> None:
    random_source = random.Random(seed)
    for _ in range(25):
        settings = replace(
            SMALL,
            max_tiles=random_source.choice([1, 2, 5, 16]),
            resize_to_max_canvas=random_source.random() < 0.4,
        )
        height, width = (round(200 ** random_source.random() * random_source.choice([1, 3])) for _ in range(2))
        image = pattern(height, width)
        (expected,) = theirs(settings, [image])
        ours = ImageProcessor(settings).process(image)
        assert (ours.rows, ours.columns) == (expected.rows, expected.columns), (settings, height, width)
        assert torch.equal(ours.tiles, expected.tiles), (settings, height, width)


def test_several_images_of_one_shape_and_of_different_shapes() -> None:
    images = [pattern(60, 90), pattern(20, 20), pattern(60, 90).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    for image, expected in zip(images, theirs(SMALL, images), strict=True):
        assert torch.equal(ImageProcessor(SMALL).process(image).tiles, expected.tiles)


def test_transparency_is_laid_over_white_as_transformers_does() -> None:
    image = pattern(30, 40)
    image.putalpha(Image.linear_gradient("L").resize((40, 30)))
    (expected,) = theirs(SMALL, [image])
    assert torch.equal(ImageProcessor(SMALL).process(image).tiles, expected.tiles)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (3, 4), (16, 1)])
def test_prompt_of_one_image(grid: tuple[int, int]) -> None:
    from transformers.models.llama4.processing_llama4 import Llama4Processor  # noqa: PLC0415 - imports torchvision

    rows, columns = grid
    settings = replace(SMALL, tokens_per_tile=5)
    ours = ImageProcessor(settings).expand(
        "<|image|>", [ProcessedImage(tiles=torch.empty(0), rows=rows, columns=columns)]
    )
    assert ours == Llama4Processor._prompt_split_image(None, grid, 5)
