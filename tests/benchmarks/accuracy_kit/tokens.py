"""The tokens of the benchmark: calibration samples that every contender gets, and held-out windows for the judge.

Both are cut the same way: windows of <|begin_of_text|> and then consecutive text, every position used once. The
calibration samples are drawn from all windows of the calibration text, so that a text longer than needed is sampled
throughout and not from its start.

Shape letters: S samples, L positions, W windows.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llama4_quant.evaluation.windows import token_windows
from llama4_quant.python_text import collect
from llama4_quant.runtime.tokenizer import Tokenizer
from llama4_quant.sample import HELD_OUT_TEXT

OVERLAP_TOKENS = 32
"""So many tokens in a row are hardly ever the same by chance."""

MAX_OVERLAP = 0.02
"""Share of the held-out runs of OVERLAP_TOKENS that may occur in the calibration samples: licences and the like."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the contenders calibrate on, [S, L], and what they are judged on, [W, L]; int64.

    Attributes:
        overlap: share of the held-out runs of `OVERLAP_TOKENS` tokens that are also in the calibration samples.
    """

    calibration_SL: Tensor
    held_out_WL: Tensor
    overlap: float

    def write_calibration(self, path: Path) -> Path:
        """One JSON object a line and sample, `{"input_ids": [...]}`."""
        lines = [json.dumps({"input_ids": sample}) for sample in self.calibration_SL.tolist()]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    @property
    def calibration_digest(self) -> str:
        """SHA-256 of the calibration samples."""
        return _digest(self.calibration_SL)

    @property
    def held_out_digest(self) -> str:
        """SHA-256 of the held-out windows."""
        return _digest(self.held_out_WL)


def prepare(
    model: Path,
    *,
    calibration: Sequence[Path],
    held_out: Sequence[Path],
    num_samples: int,
    seq_length: int,
    num_windows: int | None,
    seed: int,
) -> Tokens:
    """Tokenize with the model's tokenizer and cut.

    Args:
        model: checkpoint with a tokenizer.
        calibration: UTF-8 files; none of them: what the sample model was trained on, its own Python's documentation.
        held_out: UTF-8 files; none of them: the text that the sample was not trained on.
        num_samples: calibration samples.
        seq_length: positions of samples and windows, <|begin_of_text|> included.
        num_windows: held-out windows, from the start of the text; None for all.
        seed: which calibration windows are drawn, and in which order.

    Raises:
        UsageError: a text is too short.
        ValueError: calibration and held-out text are not disjoint.
    """
    calibration_text = _read(calibration) if calibration else "\n\n".join(d.text for d in collect().train)
    held_out_text = _read(held_out) if held_out else HELD_OUT_TEXT.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_folder(model)

    def windows(text: str, wanted: int | None) -> Tensor:
        ids = tokenizer.encode(text, bos=False)
        return token_windows(ids, seq_length=seq_length, num_windows=wanted, bos_token_id=tokenizer.bos_token_id)

    all_windows = windows(calibration_text, None)
    if len(all_windows) < num_samples:
        raise ValueError(
            f"the calibration text gives {len(all_windows)} samples of {seq_length} tokens, expected {num_samples}; "
            "give more text with --calibration, or lower --num-samples"
        )
    order = torch.randperm(len(all_windows), generator=torch.Generator().manual_seed(seed))
    calibration_SL, held_out_WL = all_windows[order[:num_samples]], windows(held_out_text, num_windows)
    overlap = shared_runs(calibration_SL, held_out_WL)
    if overlap > MAX_OVERLAP:
        raise ValueError(
            f"{overlap:.1%} of the runs of {OVERLAP_TOKENS} held-out tokens are also in the calibration samples, "
            f"expected at most {MAX_OVERLAP:.0%}: give other text with --calibration or --held-out"
        )
    return Tokens(calibration_SL=calibration_SL, held_out_WL=held_out_WL, overlap=overlap)


def shared_runs(calibration_SL: Tensor, held_out_WL: Tensor, length: int = OVERLAP_TOKENS) -> float:
    """Share of the held-out windows' runs of `length` tokens that occur in a calibration sample, wherever."""
    size = min(length, calibration_SL.shape[1], held_out_WL.shape[1])
    known = {run.tobytes() for run in calibration_SL.unfold(1, size, 1).flatten(0, 1).numpy()}
    runs = held_out_WL.unfold(1, size, 1).flatten(0, 1).numpy()
    return sum(run.tobytes() in known for run in runs) / len(runs)


def _read(paths: Sequence[Path]) -> str:
    return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
