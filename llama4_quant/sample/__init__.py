"""The small trained Llama 4 that ships with the package.

A 5-million-parameter multimodal Llama 4 in Hugging Face layout. It exists so that quantizers can be compared, and the
runtime shown, on weights that have learned something, on a machine that has never seen a real Llama 4. `train.py` makes
it, `evaluate.py` measures it, `model/README.md` is its card.
"""

from pathlib import Path

SAMPLE_DIR: Path = Path(__file__).parent / "model"
"""Folder of the shipped checkpoint."""

HELD_OUT_TEXT: Path = Path(__file__).parent / "held_out.txt"
"""UTF-8 text (documentation of CPython, PSF licence) that the sample was never trained on."""

__all__ = ["HELD_OUT_TEXT", "SAMPLE_DIR"]
