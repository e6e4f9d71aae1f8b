"""Images from every kind of source, damaged ones, and the settings files of checkpoints."""

import gc
import json
import struct
import sys
import zlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from llama4_quant.config import Llama4Config, VisionConfig
from llama4_quant.errors import ConfigError, UsageError
from llama4_quant.runtime.processor import (
    ImageProcessor,
    ImageTokens,
    ProcessedImage,
    ProcessorSettings,
    choose_grid,
)

SETTINGS = ProcessorSettings(tile_size=28, tokens_per_tile=2)
PROCESSOR = ImageProcessor(SETTINGS)
FLAT = {"size": {"height": 28, "width": 28}, "max_patches": 4, "resample": 2, "rescale_factor": 1 / 255}


@pytest.fixture
def vision() -> VisionConfig:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    }
    text = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = Llama4Config.from_dict({"model_type": "llama4", "text_config": text, "vision_config": sizes})
    assert config.vision is not None
    return config.vision


def _red_over_blue(mode: str = "RGB") -> Image.Image:
    image = Image.new("RGB", (28, 28), (255, 0, 0))
    image.paste((0, 0, 255), (0, 14, 28, 28))
    return image.convert(mode)


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# Pixels


def test_pixel_values_by_hand() -> None:
    """255 * (1/255) = 1 -> (1 - 0.5) / 0.5 = 1; 0 -> -1; all exact in bfloat16."""
    tiles = PROCESSOR.process(_red_over_blue()).tiles
    assert tiles.shape == (1, 3, 28, 28)
    assert tiles.dtype is torch.bfloat16
    top, bottom = tiles[0, :, :14], tiles[0, :, 14:]
    expected = torch.tensor([1.0, -1.0, -1.0], dtype=torch.bfloat16).view(3, 1, 1)
    assert torch.equal(top, expected.expand(3, 14, 28))
    assert torch.equal(bottom, expected.flip(0).expand(3, 14, 28))


def test_tiles_run_row_by_row_then_the_whole_image() -> None:
    """Four flat 28 x 28 quarters with grey levels 0, 51, 102, 153 keep their values: no resize happens."""
    image = Image.new("RGB", (56, 56))
    for index in range(4):
        image.paste(
            (51 * index,) * 3, (28 * (index % 2), 28 * (index // 2), 28 * (index % 2 + 1), 28 * (index // 2 + 1))
        )
    processed = PROCESSOR.process(image)
    assert (processed.rows, processed.columns, processed.tiles.shape[0]) == (2, 2, 5)
    levels = [float(tile[0, 0, 0]) for tile in processed.tiles]
    for index in range(4):
        assert processed.tiles[index].unique().numel() == 1
        # two roundings to bfloat16 (2^-9 relative each) of a number below 1, doubled by the division by 0.5
        assert levels[index] == pytest.approx(2 * (0.2 * index) - 1, abs=2 * 2 * 2**-9)
    assert processed.tiles[4].unique().numel() > 4  # blended edges


def test_padding_is_black_right_and_below() -> None:
    tiles = PROCESSOR.process(Image.new("RGB", (10, 20), "white")).tiles
    # 10 x 20 is enlarged by 1.4 to 14 x 28, in one tile
    assert torch.equal(tiles[0, :, :, :14], torch.ones(3, 28, 14, dtype=torch.bfloat16))
    assert torch.equal(tiles[0, :, :, 14:], -torch.ones(3, 28, 14, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((28, 28), (1, 1)),
        ((29, 28), (2, 1)),
        ((28, 57), (1, 3)),
        ((1, 1), (1, 1)),
        ((56, 84), (2, 3)),
        ((4000, 10), (16, 1)),
    ],
)
def test_grid(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert choose_grid(*size, SETTINGS) == grid


def test_largest_canvas_when_asked() -> None:
    """20 x 20 fits 1.4 times in one tile; with four tiles, 2 x 2 allows 2.8."""
    assert choose_grid(20, 20, replace(SETTINGS, max_tiles=4)) == (1, 1)
    assert choose_grid(20, 20, replace(SETTINGS, max_tiles=4, resize_to_max_canvas=True)) == (2, 2)


# Sources


def test_path_text_bytes_and_image_give_the_same(tmp_path: Path) -> None:
    image = _red_over_blue()
    path = tmp_path / "image.png"
    path.write_bytes(_png(image))
    expected = PROCESSOR.process(image).tiles
    for source in (path, str(path), path.read_bytes()):
        assert torch.equal(PROCESSOR.process(source).tiles, expected)


def test_palette_equals_rgb() -> None:
    image = _red_over_blue()
    palette = image.quantize(4)
    assert palette.mode == "P"
    assert torch.equal(PROCESSOR.process(_png(palette)).tiles, PROCESSOR.process(image).tiles)


@pytest.mark.parametrize("mode", ["L", "1", "I;16", "CMYK"])
def test_other_modes_become_three_colours(mode: str) -> None:
    tiles = PROCESSOR.process(Image.new(mode, (28, 28))).tiles
    level = 1.0 if mode == "CMYK" else -1.0  # no ink is white, no light is black
    assert torch.equal(tiles, torch.full((1, 3, 28, 28), level, dtype=torch.bfloat16))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_become_white(mode: str) -> None:
    transparent = Image.new(mode, (28, 28), 0)
    assert torch.equal(PROCESSOR.process(transparent).tiles, torch.ones(1, 3, 28, 28, dtype=torch.bfloat16))


def test_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (28, 28), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    buffer = BytesIO()
    image.save(buffer, "PNG", transparency=0)
    expected = torch.ones(1, 3, 28, 28, dtype=torch.bfloat16)
    assert torch.equal(PROCESSOR.process(buffer.getvalue()).tiles, expected)


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    buffer = BytesIO()
    _red_over_blue().save(buffer, "PNG", exif=exif)
    turned = _red_over_blue().transpose(Image.Transpose.ROTATE_180)
    assert torch.equal(PROCESSOR.process(buffer.getvalue()).tiles, PROCESSOR.process(turned).tiles)


# Damaged input


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [9_460, 30_000])  # just over our limit; over the limit of Pillow itself
def test_decompression_bomb(side: int) -> None:
    with pytest.raises(UsageError, match="make it smaller first"):
        PROCESSOR.process(_png_header(side, side))


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", _png(_red_over_blue())[:60], _png_header(100, 100)],
    ids=["0", "text", "cut", "short"],
)
def test_unreadable(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.png"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"image .*damaged\.png: cannot be read as an image"):
        PROCESSOR.process(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.png: no such file"):
        PROCESSOR.process(tmp_path / "nowhere.png")
    with pytest.raises(UsageError, match="cannot be read as an image"):
        PROCESSOR.process(tmp_path)


def test_empty_image() -> None:
    with pytest.raises(UsageError, match=r"no pixels \(0 x 5\)"):
        PROCESSOR.process(Image.new("RGB", (0, 5)))


@pytest.mark.filterwarnings("error")
def test_first_frame_of_an_animation_and_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "animation.gif"
    Image.new("RGB", (28, 28), "white").save(path, save_all=True, append_images=[Image.new("RGB", (28, 28))] * 3)
    assert torch.equal(PROCESSOR.process(path).tiles, torch.ones(1, 3, 28, 28, dtype=torch.bfloat16))
    gc.collect()  # an open file would warn here


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"images need Pillow; pip install 'llama4-quant\[transformers\]'"):
        PROCESSOR.process("image.png")


# Prompts


def test_prompt_of_two_images() -> None:
    one = ProcessedImage(tiles=torch.empty(0), rows=1, columns=1)
    four = ProcessedImage(tiles=torch.empty(0), rows=2, columns=2)
    tokens = ImageTokens(image="I", start="<", end=">", patch="p", tile_x_separator="x", tile_y_separator="y")
    processor = ImageProcessor(replace(SETTINGS, tokens=tokens))
    assert processor.expand("a I b I c", [one, four]) == "a <Ipp> b <ppxppyppxppyIpp> c"


@pytest.mark.parametrize(("prompt", "count"), [("none", 1), ("<|image|>", 0), ("<|image|><|image|>", 1)])
def test_placeholders_and_images_must_agree(prompt: str, count: int) -> None:
    image = ProcessedImage(tiles=torch.empty(0), rows=1, columns=1)
    with pytest.raises(
        UsageError, match=rf"{prompt.count('<|image|>')} <\|image\|> placeholder\(s\) for {count} image"
    ):
        PROCESSOR.expand(prompt, [image] * count)


# Settings files


def _write(folder: Path, name: str, values: object) -> None:
    (folder / name).write_text(json.dumps(values))


def test_flat_settings(tmp_path: Path, vision: VisionConfig) -> None:
    _write(tmp_path, "preprocessor_config.json", {**FLAT, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]})
    _write(tmp_path, "processor_config.json", {"patch_token": "<p>", "processor_class": "Llama4Processor"})
    settings = ProcessorSettings.from_folder(tmp_path, vision)
    # a 28 x 28 tile has 4 x 4 patches, of which pixel shuffle with ratio 0.5 leaves a quarter
    assert (settings.tile_size, settings.tokens_per_tile, settings.max_tiles) == (28, 4, 4)
    assert (settings.mean, settings.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert settings.tokens == ImageTokens(patch="<p>")


def test_nested_settings_win(tmp_path: Path, vision: VisionConfig) -> None:
    _write(tmp_path, "preprocessor_config.json", {**FLAT, "max_patches": 7})
    _write(
        tmp_path, "processor_config.json", {"image_processor": {**FLAT, "max_patches": 9, "resize_to_max_canvas": True}}
    )
    settings = ProcessorSettings.from_folder(tmp_path, vision)
    assert settings.max_tiles == 9
    assert settings.resize_to_max_canvas


def test_no_settings(tmp_path: Path, vision: VisionConfig) -> None:
    _write(tmp_path, "processor_config.json", {"patch_token": "<p>"})
    with pytest.raises(ConfigError, match=r"no preprocessor_config\.json"):
        ProcessorSettings.from_folder(tmp_path, vision)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"height": 14, "width": 28}}, "size is 14 x 28, but the vision tower .* 28 x 28"),
        ({"do_resize": False}, "do_resize is false"),
        ({"resample": 3}, "resample is 3, expected 2"),
        ({"max_patches": 0}, "max_patches is 0"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std is .*not zero"),
        ({"image_mean": [0.5, "0.5", 0.5]}, "image_mean is"),
    ],
)
def test_wrong_settings(change: dict[str, object], message: str, tmp_path: Path, vision: VisionConfig) -> None:
    _write(tmp_path, "preprocessor_config.json", {**FLAT, **change})
    with pytest.raises(ConfigError, match=f"preprocessor_config.json: {message}"):
        ProcessorSettings.from_folder(tmp_path, vision)
