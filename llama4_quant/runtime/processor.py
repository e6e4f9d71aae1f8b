"""Images for Llama 4: square tiles of pixels, and the run of prompt tokens that stands for them.

An image is resized, keeping its shape, onto the canvas of up to `max_tiles` tiles that wastes least of it, padded with
black on the right and at the bottom, and cut into tiles row by row. When there is more than one tile, the whole image
squeezed into one more tile (the global tile) follows. In the prompt, one `<|image|>` per image becomes

    <|image_start|> [row of patches, tile_x_separator between tiles, tile_y_separator after a row]... <|image|> patches
    <|image_end|>

where the patches after `<|image|>` are the global (or only) tile's; every patch is one `<|patch|>` token, whose
embedding the vision tower's output replaces.

This is written with torch and Pillow only. transformers' own Llama4ImageProcessor needs torchvision: a heavy
dependency, locked to one version and build of torch, for one call of bilinear resize. The results are equal bit for
bit (transformers 5.23, `models/llama4/image_processing_llama4.py`; tests/parity/test_processor_transformers.py),
bfloat16 arithmetic of the normalisation included.

Shape letters: N tiles, C = 3 colours, H height, W width, S side of a tile, in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llama4_quant.checkpoint.json_fields import LARGEST_NUMBER, Fields
from llama4_quant.checkpoint.json_files import read_json, shown
from llama4_quant.config import VisionConfig
from llama4_quant.errors import ConfigError, UsageError
from llama4_quant.runtime.image_files import ImageSource, rgb_pixels

MAX_TILES = 1024
PIL_BILINEAR = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTokens:
    """Spelling of the special tokens around images."""

    image: str = "<|image|>"
    start: str = "<|image_start|>"
    end: str = "<|image_end|>"
    patch: str = "<|patch|>"
    tile_x_separator: str = "<|tile_x_separator|>"
    tile_y_separator: str = "<|tile_y_separator|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorSettings:
    """How images are cut and scaled.

    Attributes:
        tile_size: side of a tile in pixels.
        tokens_per_tile: patch tokens that one tile takes in the prompt.
        max_tiles: most tiles of one image, the global tile not counted (`max_patches` in the files).
        resize_to_max_canvas: enlarge as far as the tiles allow, instead of as little as possible.
        mean, std: per colour, after pixel values were multiplied by `rescale_factor`.
    """

    tile_size: int
    tokens_per_tile: int
    max_tiles: int = 16
    resize_to_max_canvas: bool = False
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    tokens: ImageTokens = ImageTokens()

    @classmethod
    def from_folder(cls, folder: Path, vision: VisionConfig) -> "ProcessorSettings":
        """Read `processor_config.json` and `preprocessor_config.json` of a checkpoint.

        Hub checkpoints have the image settings flat in `preprocessor_config.json`; transformers 5 saves them as the
        section `image_processor` of `processor_config.json`, which wins where both exist.

        Raises:
            ConfigError: neither file has image settings, a value is wrong, or they do not fit the vision tower.
        """
        processor = _fields(folder / "processor_config.json")
        if processor.get("image_processor") is not None:
            image = processor.section("image_processor")
        elif (folder / "preprocessor_config.json").exists():
            image = _fields(folder / "preprocessor_config.json")
        else:
            raise ConfigError(
                f"{folder}: no preprocessor_config.json (or image_processor in processor_config.json), so it is "
                "unknown how images are scaled; copy the file from the original checkpoint"
            )
        _check_supported(image)
        return cls(
            tile_size=_tile_size(image, vision),
            tokens_per_tile=vision.tokens_per_tile,
            max_tiles=image.integer("max_patches", 16, high=MAX_TILES),
            resize_to_max_canvas=image.boolean("resize_to_max_canvas", default=False),
            rescale_factor=image.number("rescale_factor", 1 / 255),
            mean=_per_colour(image, "image_mean"),
            std=_per_colour(image, "image_std"),
            tokens=_tokens(processor),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessedImage:
    """One image as the model takes it.

    Attributes:
        tiles: [N, 3, S, S] bfloat16; the global tile last if there is more than one.
        rows, columns: the grid of tiles, without the global tile.
    """

    tiles: Tensor
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """Turns images into tiles and prompts with `<|image|>` into prompts with patch tokens."""

    settings: ProcessorSettings

    def process(self, image: ImageSource) -> ProcessedImage:
        """Decode, resize, normalise and cut one image.

        Transparency is laid over white, EXIF rotation is applied, of an animation the first frame is taken.

        Args:
            image: a file's path, a file's content, or a Pillow image.

        Raises:
            UsageError: the image is missing, unreadable, empty, or too large to decode.
        """
        pixels_CHW = rgb_pixels(image)
        settings, side = self.settings, self.settings.tile_size
        height, width = pixels_CHW.shape[-2:]
        rows, columns = choose_grid(height, width, settings)
        fitted_CHW = _resize(pixels_CHW, *_fitted_size(height, width, (rows * side, columns * side), settings))
        padding = (0, columns * side - fitted_CHW.shape[2], 0, rows * side - fitted_CHW.shape[1])
        tiles_NCSS = _cut(functional.pad(fitted_CHW, padding), rows, columns)
        if rows * columns > 1:
            tiles_NCSS = torch.cat([tiles_NCSS, _resize(pixels_CHW, side, side)[None]])
        return ProcessedImage(tiles=self._normalise(tiles_NCSS), rows=rows, columns=columns)

    def expand(self, prompt: str, images: Sequence[ProcessedImage]) -> str:
        """Put each image's tokens in the place of its `<|image|>`, in order.

        Raises:
            UsageError: the prompt has more or fewer places than there are images.
        """
        pieces = prompt.split(self.settings.tokens.image)
        if len(pieces) - 1 != len(images):
            raise UsageError(
                f"the prompt has {len(pieces) - 1} {self.settings.tokens.image} placeholder(s) for {len(images)} "
                "image(s); give one placeholder per image"
            )
        runs = [self._run(image) for image in images]
        return pieces[0] + "".join(run + piece for run, piece in zip(runs, pieces[1:], strict=True))

    def _run(self, image: ProcessedImage) -> str:
        tokens = self.settings.tokens
        tile = tokens.patch * self.settings.tokens_per_tile
        row = tokens.tile_x_separator.join([tile] * image.columns) + tokens.tile_y_separator
        grid = row * image.rows if image.rows * image.columns > 1 else ""
        return f"{tokens.start}{grid}{tokens.image}{tile}{tokens.end}"

    def _normalise(self, tiles_NCSS: Tensor) -> Tensor:
        """uint8 to bfloat16, rounded after every step: so did training, and so does transformers."""
        mean = torch.tensor(self.settings.mean, dtype=torch.bfloat16).view(-1, 1, 1)
        std = torch.tensor(self.settings.std, dtype=torch.bfloat16).view(-1, 1, 1)
        return (tiles_NCSS.to(torch.bfloat16) * self.settings.rescale_factor).sub_(mean).div_(std)


def choose_grid(height: int, width: int, settings: ProcessorSettings) -> tuple[int, int]:
    """Rows and columns of tiles that suit an image of `height` x `width` pixels.

    Of all grids with at most `max_tiles` tiles: the one that enlarges least (with `resize_to_max_canvas`: most), or,
    where all would shrink the image, the one that shrinks least; among equals the one of least area. Scales are
    compared in float32, as transformers does, so that both see the same ties.
    """
    grids = torch.tensor(
        [
            (rows, columns)
            for rows in range(1, settings.max_tiles + 1)
            for columns in range(1, settings.max_tiles // rows + 1)
        ]
    )
    canvases = (grids * settings.tile_size).to(torch.float32)
    scales = torch.minimum(canvases[:, 0] / height, canvases[:, 1] / width)
    enlarging = scales[scales >= 1]
    if enlarging.numel() == 0:
        best = scales.max()
    else:
        best = enlarging.max() if settings.resize_to_max_canvas else enlarging.min()
    equals = grids[scales == best]
    rows, columns = equals[equals.prod(dim=1).argmin()].tolist()
    return rows, columns


def _fitted_size(height: int, width: int, canvas: tuple[int, int], settings: ProcessorSettings) -> tuple[int, int]:
    """Size after resizing into a canvas (height, width); past one tile's side only `resize_to_max_canvas` enlarges."""
    enlarge = settings.resize_to_max_canvas
    wished = canvas if enlarge else (max(height, settings.tile_size), max(width, settings.tile_size))
    limits = (min(wished[0], canvas[0]), min(wished[1], canvas[1]))
    scale_height = _scale(limits[0], height, single=enlarge or canvas[0] < wished[0])
    scale_width = _scale(limits[1], width, single=enlarge or canvas[1] < wished[1])
    if scale_width < scale_height:
        return max(min(math.floor(float(height * scale_width)), limits[0]), 1), limits[1]
    return limits[0], max(min(math.floor(float(width * scale_height)), limits[1]), 1)


def _scale(limit: int, size: int, *, single: bool) -> Tensor:
    """`limit / size`, in float32 where the canvas is the limit: the floor of a product tells float32 from float64.

    transformers holds the canvas in a tensor (so float32) and the image's size in Python numbers (so float64).
    """
    return torch.tensor(limit, dtype=torch.float32 if single else torch.float64) / size


def _resize(pixels_CHW: Tensor, height: int, width: int) -> Tensor:
    """Bilinear with antialiasing, uint8 in and out."""
    if pixels_CHW.shape[-2:] == (height, width):
        return pixels_CHW
    return functional.interpolate(
        pixels_CHW[None], (height, width), mode="bilinear", align_corners=False, antialias=True
    )[0]


def _cut(canvas_CHW: Tensor, rows: int, columns: int) -> Tensor:
    """[3, rows * S, columns * S] to [rows * columns, 3, S, S], row by row."""
    colours, height, width = canvas_CHW.shape
    tiles = canvas_CHW.view(colours, rows, height // rows, columns, width // columns).permute(1, 3, 0, 2, 4)
    return tiles.reshape(rows * columns, colours, height // rows, width // columns)


def _fields(path: Path) -> Fields:
    return Fields(read_json(path) if path.exists() else {}, path.name)


def _check_supported(image: Fields) -> None:
    """Refuse settings that would change the result and that no Llama 4 uses."""
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not image.boolean(name, default=True):
            raise ConfigError(f"{image.where}: {name} is false; Llama 4's images are always resized and normalised")
    if image.integer("resample", PIL_BILINEAR, low=0) != PIL_BILINEAR:
        raise ConfigError(f"{image.where}: resample is {image.get('resample')}, expected {PIL_BILINEAR} (bilinear)")


def _tile_size(image: Fields, vision: VisionConfig) -> int:
    size = image.section("size") if image.get("size") is not None else Fields({}, image.where)
    height, width = (size.integer(name, vision.image_size) for name in ("height", "width"))
    if height != vision.image_size or width != vision.image_size:
        raise ConfigError(
            f"{image.where}: size is {height} x {width}, but the vision tower of config.json takes tiles of "
            f"{vision.image_size} x {vision.image_size}"
        )
    return height


def _per_colour(image: Fields, name: str) -> tuple[float, ...]:
    values: Any = image.get(name)
    if values is None:
        return (0.5, 0.5, 0.5)
    numbers = [value for value in values if type(value) in {int, float}] if isinstance(values, list) else []
    is_sound = len(numbers) == 3 and all(abs(number) <= LARGEST_NUMBER for number in numbers)
    if not is_sound or (name == "image_std" and 0 in numbers):
        raise ConfigError(f"{image.where}: {name} is {shown(values)}, expected three numbers (deviations not zero)")
    return tuple(map(float, numbers))


def _tokens(processor: Fields) -> ImageTokens:
    known = ImageTokens()
    return ImageTokens(
        image=processor.string("image_token", known.image),
        start=processor.string("start_of_image_token", known.start),
        end=processor.string("end_of_image_token", known.end),
        patch=processor.string("patch_token", known.patch),
        tile_x_separator=processor.string("tile_x_separator_token", known.tile_x_separator),
        tile_y_separator=processor.string("tile_y_separator_token", known.tile_y_separator),
    )
