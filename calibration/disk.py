"""Disk for hidden states: how many bytes of rows a calibration will write, known before it writes any.

Rows are float32. The files are those of streams.py and layer.py, which stay until the output is complete, and those of
vision.py, which go when the tower is done.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from llama4_quant.checkpoint.files import existing_parent, no_space
from llama4_quant.config import TextConfig, VisionConfig
from llama4_quant.errors import OutputError

_FLOAT_BYTES = 4
_BLOCK = 512
"""What st_blocks counts in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCounts:
    """Rows that a calibration writes.

    Attributes:
        num_tokens: of all samples.
        num_tiles: of all images that go through a calibrated vision tower; 0 if it is not calibrated.
    """

    num_tokens: int
    num_tiles: int = 0


def row_bytes(text: TextConfig, vision: VisionConfig | None, counts: RowCounts, *, with_original: bool) -> int:
    """The most that files of rows occupy at the same time, in bytes.

    Args:
        text: the decoder.
        vision: the vision tower, or None.
        counts: how many rows there are.
        with_original: the original model runs beside the quantized one.
    """
    decoder = counts.num_tokens * _decoder_width(text, with_original=with_original)
    tower = counts.num_tiles * _tile_elements(vision, with_original=with_original) if vision is not None else 0
    return _FLOAT_BYTES * max(decoder, tower)


def _decoder_width(text: TextConfig, *, with_original: bool) -> int:
    """Elements for one token: two generations of hidden states, normed ones, attention's context, what down gets."""
    width = text.intermediate_size if text.moe_layers else 0
    if len(text.moe_layers) < text.num_hidden_layers:
        width = max(width, text.intermediate_size_mlp)
    normed = text.hidden_size if text.moe_layers else 0
    stream = 2 * text.hidden_size + normed + text.num_attention_heads * text.head_dim + width
    return 2 * stream + normed if with_original else stream  # the drift of each token is remembered once


def _tile_elements(vision: VisionConfig, *, with_original: bool) -> int:
    """Elements for one tile: the same of the tower, and what the adapter's layers give."""
    tokens = vision.num_patches + 1
    encoder = tokens * (3 * vision.hidden_size + vision.intermediate_size)
    widths = vision.intermediate_size, vision.projector_input_dim, vision.projector_output_dim
    adapter = vision.tokens_per_tile * sum(widths)
    return (2 if with_original else 1) * (encoder + adapter)


def require_disk(folder: Path, *, output_bytes: int, needed: int, existing: int, counts: RowCounts) -> None:
    """Refuse a disk that is too small for hidden states and output, before either is begun.

    Args:
        folder: of the output; it need not exist.
        output_bytes: that the output still has to reserve.
        needed: bytes of hidden states, see `row_bytes`.
        existing: bytes of them that an interrupted run has on the disk already.
        counts: for the message.

    Raises:
        OutputError: there is too little room; the message says how much is needed for what, and what needs less.
    """
    free = shutil.disk_usage(existing_parent(folder)).free
    left = max(0, needed - existing)
    if output_bytes + left <= free:
        return
    tiles = f" and {counts.num_tiles:,} tiles of images" if counts.num_tiles else ""
    raise OutputError(
        f"{folder}: hidden states of {counts.num_tokens:,} tokens{tiles} take {left:,} bytes until the output is "
        f"complete, and the output {output_bytes:,}: {no_space(output_bytes + left, free)}; fewer "
        "--num-calibration-samples or a shorter --max-seq-length need less"
    )


def occupied(folder: Path) -> int:
    """Bytes of disk that the rows of an interrupted run occupy."""
    return sum(path.lstat().st_blocks * _BLOCK for path in folder.rglob("*.rows"))
