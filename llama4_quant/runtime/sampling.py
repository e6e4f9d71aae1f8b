"""How the next token is chosen from logits.

Shape letters: B rows, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llama4_quant.checkpoint.json_files import read_json
from llama4_quant.config_fields import Fields
from llama4_quant.errors import Llama4QuantError, UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """What to generate and when to stop.

    Attributes:
        max_new_tokens: at most so many per row.
        temperature: logits are divided by it; 0 takes the most probable token (greedy).
        top_k: sample among the k most probable tokens only; None for all.
        top_p: sample among the fewest most probable tokens whose probabilities (after top_k) sum to at least this.
        seed: of the random numbers; the same seed, prompt and batch give the same text.
        eos_token_ids: tokens that end a row; None for those of the model's config.json.
        pad_token_id: what an ended row is filled with; None for the model's, or else its first eos token.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    eos_token_ids: tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        rules = {
            f"max_new_tokens is {self.max_new_tokens}, expected at least 1": self.max_new_tokens >= 1,
            f"temperature is {self.temperature}, expected 0 (greedy) to 100": 0 <= self.temperature <= 100,
            f"top_k is {self.top_k}, expected at least 1": self.top_k is None or self.top_k >= 1,
            f"top_p is {self.top_p}, expected above 0 and at most 1": 0 < self.top_p <= 1,
            f"seed is {self.seed}, expected 0 to 2^63 - 1": 0 <= self.seed < 2**63,
        }
        for message, holds in rules.items():
            if not holds:
                raise UsageError(message)

    @classmethod
    def from_folder(cls, folder: Path) -> "GenerationSettings":
        """A checkpoint's defaults: `generation_config.json`, where the file and the key exist.

        `do_sample` false or absent is temperature 0. Absent `top_k` and `top_p` do not limit (transformers would take
        its own 50 best for the former).

        Raises:
            ConfigError: the file is damaged or a value is of the wrong type.
            UsageError: a value is out of range.
        """
        path = folder / "generation_config.json"
        fields = Fields(read_json(path) if path.exists() else {}, path.name)
        do_sample = fields.boolean("do_sample", default=False)
        return cls(
            max_new_tokens=fields.integer("max_new_tokens", cls().max_new_tokens),
            temperature=fields.number("temperature", 1.0) if do_sample else 0.0,
            top_k=fields.integer("top_k", 0, low=0) or None,
            top_p=fields.number("top_p", 1.0),
            eos_token_ids=fields.integers("eos_token_id") or None,
            pad_token_id=fields.optional_integer("pad_token_id", None, low=-1),
        )


def select_tokens(logits_BV: Tensor, settings: GenerationSettings, generator: torch.Generator) -> Tensor:
    """Choose one token per row.

    Args:
        logits_BV: [B, V], any floating dtype.
        settings: greedy, or how to sample.
        generator: on the same device; untouched when greedy.

    Returns:
        [B] int64.

    Raises:
        Llama4QuantError: the logits hold NaN.
    """
    if bool(logits_BV.isnan().any()):
        raise Llama4QuantError(
            "the model's logits hold NaN: weights or activations overflowed; try float32, or check the checkpoint"
        )
    if settings.temperature == 0:
        return logits_BV.argmax(dim=-1)
    return torch.multinomial(probabilities(logits_BV, settings), 1, generator=generator).squeeze(1)


def probabilities(logits_BV: Tensor, settings: GenerationSettings) -> Tensor:
    """What is sampled from at a temperature above 0: temperature first, then top_k, then top_p.

    Tokens that tie with the k-th stay. Holtzman et al. 2019, "The curious case of neural text degeneration" (top-p).

    Returns:
        [B, V] float32, rows sum to 1.
    """
    shifted_BV = logits_BV.to(torch.float32) - logits_BV.amax(dim=-1, keepdim=True)  # so that no temperature overflows
    scaled_BV = shifted_BV / settings.temperature
    if settings.top_k is not None and settings.top_k < scaled_BV.shape[-1]:
        kth_B1 = scaled_BV.topk(settings.top_k, dim=-1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < kth_B1, -torch.inf)
    probabilities_BV = scaled_BV.softmax(dim=-1)
    if settings.top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        sum_before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
        kept_BV = sorted_BV.masked_fill(sum_before_BV >= settings.top_p, 0.0)
        kept_BV[:, 0] = sorted_BV[:, 0]  # also where top_p is tiny
        probabilities_BV = torch.zeros_like(sorted_BV).scatter(1, order_BV, kept_BV)
        probabilities_BV /= probabilities_BV.sum(dim=-1, keepdim=True)
    return probabilities_BV
