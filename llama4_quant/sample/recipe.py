"""Every number that decides the sample's weights, apart from its dimensions."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All that decides the weights."""

    tower_steps: int = 4000
    steps: int = 1300
    minutes: float = 110.0
    seed: int = 20250405
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.1
    warmup: float = 0.03
    balance_weight: float = 0.02
    text_rows: int = 8
    text_length: int = 256
    captions: int = 20
    questions: int = 4
    tower_images: int = 64
    tower_rate: float = 2e-3
    tower_share: float = 0.1

    def rate(self, progress: float) -> float:
        """Share of the highest learning rate at a point of a stage (0..1): linear warm-up, then a cosine to 0.01."""
        if progress < self.warmup:
            return (progress + 1e-3) / (self.warmup + 1e-3)
        phase = min((progress - self.warmup) / (1 - self.warmup), 1.0)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * phase))
