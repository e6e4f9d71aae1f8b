"""Images from strangers: decoded to pixels, or refused with one clear message."""

import contextlib
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from llama4_quant.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource = Union[str, Path, bytes, "Image"]
"""A file's path, a file's content, or a Pillow image."""

MAX_PIXELS = 89_478_485
"""Largest image that is decoded: Pillow's own limit against decompression bombs, 256 MiB as RGB."""


def rgb_pixels(source: ImageSource) -> Tensor:
    """Decode an image, upright and without transparency.

    EXIF rotation is applied, transparency is laid over white, of an animation the first frame is taken.

    Returns:
        [3, H, W] uint8.

    Raises:
        UsageError: missing, unreadable, empty, or too large to decode; or Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise UsageError("images need Pillow; pip install 'llama4-quant[transformers]'") from error
    where = f"image {source}" if isinstance(source, (str, Path)) else "image"
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as files:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is the same, and an error
            image = source if isinstance(source, Image.Image) else files.enter_context(Image.open(_file(source)))
            _check_size(where, *image.size)
            return _to_tensor(_flatten(ImageOps.exif_transpose(image)))
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise UsageError(f"{where}: no such file") from error
    except Image.DecompressionBombError as error:
        raise UsageError(f"{where}: {error}; make it smaller first") from error
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise UsageError(f"{where}: cannot be read as an image ({type(error).__name__}: {error})") from error


def _file(source: str | Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else Path(source)


def _check_size(where: str, width: int, height: int) -> None:
    if width == 0 or height == 0:
        raise UsageError(f"{where}: has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"{where}: {width} x {height} pixels are over the limit of {MAX_PIXELS}; make it smaller first"
        )


def _flatten(image: "Image") -> "Image":
    """RGB, with transparency laid over white."""
    from PIL import Image  # noqa: PLC0415 - an optional dependency

    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _to_tensor(image: "Image") -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()
