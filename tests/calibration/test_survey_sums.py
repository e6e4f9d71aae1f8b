"""The survey's gradients and Gram matrices, against autograd through the whole runtime model."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_runs import ALL_TEXT, tiny_model
from torch import Tensor
from torch.nn import functional

from llama4_quant.calibration import final_gradient, rerouting
from llama4_quant.calibration.mixed import units_of
from llama4_quant.calibration.originals import Originals
from llama4_quant.calibration.rows import RowFile
from llama4_quant.calibration.sensitivity import InputSums
from llama4_quant.calibration.streams import Sequences
from llama4_quant.calibration.survey import Survey
from llama4_quant.checkpoint.source import open_source
from llama4_quant.config import Llama4Config
from llama4_quant.planning.make import make_plan
from llama4_quant.runtime.experts import DenseStack
from llama4_quant.runtime.linear import DenseLinear
from llama4_quant.runtime.loader import load

LENGTHS = (12, 12, 5)
TOLERANCE = 1e-4
"""Relative, of sums in float32 over a few hundred products along four layers, each off by 2^-24 sqrt(K) or so."""


class Remembering(Survey):
    """Keeps the sums that predictions are made of."""

    def _predict(self, weights: Mapping[str, Tensor], sums: InputSums) -> None:
        for name in weights:
            self.seen[name] = sums

    seen: dict[str, InputSums]


def survey(source: Path, ids: Tensor, folder: Path) -> tuple[dict[str, InputSums], Tensor]:
    """All sums by weight, and the tokens that were drawn."""
    drawn: list[Tensor] = []
    draw = final_gradient._draw

    def remember(*arguments: Any) -> tuple[Tensor, Tensor]:
        found = draw(*arguments)
        drawn.append(found[1])
        return found

    with open_source(str(source)) as reader, pytest.MonkeyPatch.context() as patch:
        patch.setattr(final_gradient, "_draw", remember)
        config = Llama4Config.from_dict(reader.config)
        plan = make_plan(config, ALL_TEXT, reader.tensors)
        units = units_of(plan)
        found = Remembering(
            config,
            Originals(plan, reader, torch.device("cpu"), equalize=False),
            Sequences(lengths=LENGTHS),
            folder,
            unit_of={member.name: unit.name for unit in units for member in unit.members},
            candidates={unit.name: unit.candidates for unit in units},
            done=lambda _what: None,
        )
        found.seen = {}
        table = reader.read("model.embed_tokens.weight").float()

        def embed(file: RowFile) -> None:
            file.write(slice(0, len(ids)), table[ids])

        found.run(embed)
    return found.seen, drawn[0]


class Sums:
    """By weight, the Gram matrix of its inputs and the sum of squared gradients at its outputs."""

    def __init__(self) -> None:
        self.grams: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def add(self, name: str, x_RK: Tensor, gradient_RN: Tensor) -> None:
        if len(x_RK):
            self.grams[name] = self.grams.get(name, 0) + x_RK.T @ x_RK
            self.squares[name] = self.squares.get(name, 0) + gradient_RN.square().sum(dim=0)

    def hook(self, name: str) -> Any:
        """A forward hook; of a stack of experts, the rows are sorted by expert."""

        def seen(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda gradient: noted(x, gradient.flatten(0, -2), inputs[1:]))

        def noted(x_RK: Tensor, gradient_RN: Tensor, counts: tuple[Tensor, ...]) -> None:
            if not counts:
                self.add(name, x_RK, gradient_RN)
                return
            base, _, projection = name.rpartition(".")
            rows = counts[0].tolist()
            for expert, parts in enumerate(zip(x_RK.split(rows), gradient_RN.split(rows), strict=True)):
                self.add(f"{base}.{expert}.{projection}", *parts)

        return seen


def reference(source: Path, ids: Tensor, drawn: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By weight, the Gram matrix of its inputs and the sum of squared gradients at its outputs."""
    model = load(source, dtype="float32")
    sums = Sums()
    for name, module in model.named_modules():
        if isinstance(module, (DenseLinear, DenseStack)) and name != "lm_head":
            module.register_forward_hook(sums.hook(name))
    model.model.embed_tokens.register_forward_hook(lambda _module, _inputs, out: out.detach().requires_grad_())
    with torch.enable_grad():
        for tokens, wanted in zip(ids.split(LENGTHS), drawn.split(LENGTHS), strict=True):
            logits_TV = model(tokens.unsqueeze(0))[0]
            functional.cross_entropy(logits_TV, wanted, reduction="sum").backward()
    return sums.grams, sums.squares


@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 2}, {"attention_bias": True, "moe_layers": [0, 1]}])
def test_sums_are_those_of_autograd(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerouting, "RELATIVE_ERROR", 1e-9)  # autograd knows nothing of other choices
    monkeypatch.setattr("llama4_quant.calibration.survey.fast_matmul", lambda _device: nullcontext())  # float32
    source = tiny_model(tmp_path / "bf16", **changes)
    ids = torch.randint(3, 90, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    seen, drawn = survey(source, ids, tmp_path)
    grams, squares = reference(source, ids, drawn)
    routers = {name for name in grams if name.endswith(".router")}
    assert seen.keys() == grams.keys() - routers
    for name, sums in seen.items():
        assert_near(sums.gram, grams[name], name)
        assert_near(sums.gradients[name], squares[name], name)
    assert list(tmp_path.glob("*.rows")) == []


def test_draws_follow_the_softmax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of the vocabulary, too: every token of 96 is drawn about as often as its probability says."""
    monkeypatch.setattr(final_gradient, "HEAD_ELEMENTS", 256 * 40)  # 40 rows of the head at a time
    source = tiny_model(tmp_path / "bf16")
    num_rows = 20_000
    with open_source(str(source)) as reader:
        plan = make_plan(Llama4Config.from_dict(reader.config), ALL_TEXT, reader.tensors)
        originals = Originals(plan, reader, torch.device("cpu"), equalize=False)
        head_VH = reader.read("lm_head.weight").float()
        x_H = torch.randn(256, generator=torch.Generator().manual_seed(0))
        chunks = [slice(start, start + 5000) for start in range(0, num_rows, 5000)]
        total_R, drawn_R = final_gradient._draw(
            lambda rows: x_H.expand(rows.stop - rows.start, -1), chunks, "lm_head.weight", originals
        )
    logits_V = head_VH @ x_H
    assert torch.allclose(total_R, logits_V.logsumexp(0).expand(num_rows), atol=1e-4)
    expected_V = logits_V.softmax(0) * num_rows
    found_V = torch.bincount(drawn_R, minlength=96)
    # Binomial counts: 5 deviations happen to one of 96 once in 17,000 runs, and the seed is fixed.
    assert bool(((found_V - expected_V).abs() <= 5 * expected_V.sqrt() + 1).all())


def assert_near(found: Tensor, expected: Tensor, name: str) -> None:
    assert float((found - expected).norm()) <= TOLERANCE * float(expected.norm()), name
