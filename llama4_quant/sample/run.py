"""The state of a training run between two steps, and how it survives being killed."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama4_quant.errors import UsageError
from llama4_quant.sample.configuration import transformers_config
from llama4_quant.sample.recipe import Recipe
from llama4_quant.sample.routed import TrainingModel
from llama4_quant.sample.tower import AttributeHeads, widen

_CHECKPOINT = "training.pt"


@dataclass(kw_only=True, slots=True)
class Run:
    """A training run between two steps. The two lanes share their parameters; each computes one batch of a step."""

    recipe: Recipe
    lanes: tuple[TrainingModel, TrainingModel]
    heads: AttributeHeads
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    tower_seconds: float = 0.0

    @property
    def progress(self) -> float:
        """How much of the second stage is done, 0..1 (0 or less before it)."""
        steps = (self.step - self.recipe.tower_steps) / self.recipe.steps
        limit = 60 * self.recipe.minutes
        return max(steps, (self.seconds - self.tower_seconds) / max(limit - self.tower_seconds, 1.0))

    def set_rates(self, **rates: float) -> None:
        """Set the learning rate of each kind of parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters under their checkpoint names."""
        state: dict[str, Tensor] = self.lanes[0].llama.state_dict()
        return state

    @classmethod
    def start(cls, recipe: Recipe, hub: dict[str, Any]) -> "Run":
        """Initialise model and optimizer from the seed."""
        torch.manual_seed(recipe.seed)
        config = transformers_config(hub)
        first, second = (TrainingModel(config) for _ in range(2))
        heads = AttributeHeads(config.text_config.hidden_size)
        widen(first.llama.vision_model)
        second.share_parameters_of(first)
        sight = [*first.llama.vision_model.parameters(), *first.llama.multi_modal_projector.parameters()]
        reading = list(first.llama.language_model.parameters())
        groups = [*_groups([*sight, *heads.parameters()], recipe, "sight"), *_groups(reading, recipe, "reading")]
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
        return cls(recipe=recipe, lanes=(first, second), heads=heads, optimizer=optimizer)

    def save(self, folder: Path) -> None:
        """Store the run atomically: a kill leaves the older checkpoint or the newer one."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": asdict(self.recipe),
            "model": self.weights,
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "tower_seconds": self.tower_seconds,
        }
        torch.save(state, folder / (_CHECKPOINT + ".partial"))
        os.replace(folder / (_CHECKPOINT + ".partial"), folder / _CHECKPOINT)  # noqa: PTH105

    def resume(self, folder: Path) -> None:
        """Continue from the checkpoint in `folder`, if there is one.

        Raises:
            UsageError: the checkpoint belongs to another recipe.
        """
        if not (folder / _CHECKPOINT).exists():
            return
        state = torch.load(folder / _CHECKPOINT, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise UsageError(f"{folder} holds a run with other settings ({state['recipe']}); remove it first")
        self.lanes[0].llama.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.tower_seconds = state["step"], state["seconds"], state["tower_seconds"]


def _groups(parameters: Sequence[nn.Parameter], recipe: Recipe, name: str) -> list[dict[str, Any]]:
    """Optimizer groups of one rate: weight decay for matrices, none for vectors."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay, "name": name},
        {"params": vectors, "weight_decay": 0.0, "name": name},
    ]
