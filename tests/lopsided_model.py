"""A model whose experts get very unequal shares of the tokens, by construction of its routers.

Expert 0 takes half of all tokens, expert 1 the rare ones, expert 2 none, the others share the rest. Which expert a
token goes to follows from the token alone.
"""

import random
from pathlib import Path
from typing import Any

import torch
from calibrated_runs import TOKENIZER_FILES
from checkpoints import random_tensors, text_config, write_checkpoint
from torch import Tensor

from llama4_quant.runtime.loader import load
from llama4_quant.sample import SAMPLE_DIR

NUM_EXPERTS = 6
POPULAR, RARE, NEVER = 0, 1, 2
RARE_TOKENS = tuple(range(80, 90))
_POPULAR_TOKENS = tuple(range(3, 40))
_OTHER_TOKENS = tuple(range(40, 80))
_CERTAIN = 6.0  # a logit; the score is then 0.9975


def expert_of(token: int) -> int:
    if token in RARE_TOKENS:
        return RARE
    return POPULAR if token in _POPULAR_TOKENS else 3 + token % (NUM_EXPERTS - 3)


def make_lopsided(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """A random text model of two layers, both with experts."""
    settings = text_config(num_hidden_layers=2, interleave_moe_layer_step=1, num_local_experts=NUM_EXPERTS, **config)
    tensors = random_tensors(settings, seed)
    # Tokens weigh more than what layers add to them, so that a router can tell them apart everywhere.
    tensors["model.embed_tokens.weight"] *= 30
    write_checkpoint(folder, settings, tensors)
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((SAMPLE_DIR / name).read_bytes())
    samples = [draw_tokens(64, 8, number) for number in range(24)]
    for layer in range(2):
        name = f"model.layers.{layer}.feed_forward.router.weight"
        tensors[name] = _fit_router(folder, layer, samples)
        write_checkpoint(folder, settings, tensors)
        for file in TOKENIZER_FILES:
            (folder / file).write_bytes((SAMPLE_DIR / file).read_bytes())
    return folder


def draw_tokens(length: int, num_rare: int, seed: int) -> list[int]:
    """A sample with so many rare tokens; half of the others are popular."""
    rng = random.Random(seed)
    tokens = [rng.choice(_POPULAR_TOKENS if index % 2 else _OTHER_TOKENS) for index in range(length)]
    for place in rng.sample(range(0, length, 2), num_rare):
        tokens[place] = rng.choice(RARE_TOKENS)
    return tokens


def router_inputs(checkpoint: Path, layer: int, samples: list[list[int]]) -> Tensor:
    """What the router of a layer gets, [T, H]."""
    model = load(checkpoint, dtype="float32")
    seen: list[Tensor] = []
    model.model.layers[layer].feed_forward.router.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].flatten(0, -2))
    )
    with torch.inference_mode():
        for sample in samples:
            model(torch.tensor([sample]))
    return torch.cat(seen)


def _fit_router(checkpoint: Path, layer: int, samples: list[list[int]]) -> Tensor:
    x_TH = router_inputs(checkpoint, layer, samples).double()
    experts = torch.tensor([expert_of(token) for sample in samples for token in sample])
    wanted_TE = torch.full((len(experts), NUM_EXPERTS), -_CERTAIN, dtype=torch.float64)
    wanted_TE[torch.arange(len(experts)), experts] = _CERTAIN
    ridge = 1e-6 * torch.eye(x_TH.shape[1], dtype=torch.float64) * x_TH.square().sum() / x_TH.shape[1]
    solution_HE = torch.linalg.solve(x_TH.T @ x_TH + ridge, x_TH.T @ wanted_TE)
    assert bool(((x_TH @ solution_HE).argmax(dim=1) == experts).float().mean() > 0.995)
    return solution_HE.T.to(torch.bfloat16).contiguous()
