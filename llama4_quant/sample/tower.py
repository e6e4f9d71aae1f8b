"""The first stage of training: the vision tower learns to name attributes, before any language model reads it.

A caption is a slow teacher: dozens of tokens of text model per image, for four words that matter. Four linear heads on
the projected image tokens say the same far sooner. The heads are dropped afterwards; the language model then learns to
read what the tower already shows.

Legend: B images, C channels, S tile side, H text hidden size.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Llama4ForConditionalGeneration

from llama4_quant.sample import shapes
from llama4_quant.sample.data import CANVASES
from llama4_quant.sample.routed import IGNORED

_CLASSES: tuple[tuple[str, ...], ...] = (
    tuple(shapes.Size),
    tuple(shapes.COLOURS),
    tuple(shapes.Shape),
    tuple(shapes.BACKGROUNDS),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerBatch:
    """Tiles [B, C, S, S], and the classes of size, colour, shape and background of each image [B, 4] (or `IGNORED`)."""

    pixels: Tensor
    classes: Tensor


class AttributeHeads(nn.Module):
    """One linear classifier per attribute, on the mean of an image's projected tokens."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(hidden_size, len(classes)) for classes in _CLASSES)

    def forward(self, features_BH: Tensor) -> list[Tensor]:
        """Return the logits of each attribute, [B, number of its classes]."""
        return [head(features_BH) for head in self.heads]


@torch.no_grad()
def widen(tower: nn.Module) -> None:
    """Draw the tower's matrices again with variance 1 / inputs: Llama's 0.02 is meant for far wider layers."""
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


def tower_batch(scenes: Sequence[shapes.Scene], rng: random.Random, *, size: int) -> TowerBatch:
    """Draw images; of one with several tiles only the last, which shows the whole image.

    One in three is painted in colours without a name, so that shape and size are not learned colour by colour:
    held-out combinations of named colours could then not be told.
    """
    pixels, classes = [], []
    for i in range(size):
        scene = rng.choice(scenes)
        high, wide = rng.choice(CANVASES)
        words = (scene.size, scene.colour, scene.shape, scene.background)
        labels = [names.index(word) for names, word in zip(_CLASSES, words, strict=True)]
        if i % 3:
            image = shapes.draw(scene, rng, tiles_high=high, tiles_wide=wide)
        else:
            paint = shapes.unnamed_paint(rng)
            image = shapes.draw_shape(scene.shape, scene.size, paint, rng, tiles_high=high, tiles_wide=wide)
            labels[1] = labels[3] = IGNORED
        pixels.append(shapes.tiles(image)[-1])
        classes.append(labels)
    return TowerBatch(pixels=torch.stack(pixels), classes=torch.tensor(classes))


def tower_loss(llama: Llama4ForConditionalGeneration, heads: AttributeHeads, batch: TowerBatch) -> Tensor:
    """Cross entropy of the four attributes together, in nats per image."""
    features = llama.vision_model(batch.pixels).last_hidden_state
    logits = heads(llama.multi_modal_projector(features).mean(dim=1))
    losses = [
        functional.cross_entropy(logit, batch.classes[:, i], ignore_index=IGNORED) for i, logit in enumerate(logits)
    ]
    return torch.stack(losses).sum()
