"""A mixed-precision checkpoint in transformers: every module has the scheme that was chosen, and its exact weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_runs import convert_mixed, tiny_model, token_lines
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama4_quant import load
from llama4_quant.conversion.report import Report
from llama4_quant.runtime.model import Llama4Model

SHARE_CLOSE = 0.75
"""Share of tokens within TOLERANCE: an activation on the border of two FP8 codes may go up on one side and down on the
other; test_transformers_quantized.py has the arithmetic."""
TOLERANCE = 2.5e-5
"""In deviations of the logits; from test_transformers_quantized.py."""


class Mixed:
    """One checkpoint with int4 of several group sizes, FP8 and BF16, in transformers and in our runtime, fp32."""

    def __init__(self, folder: Path) -> None:
        source, data = tiny_model(folder / "bf16"), token_lines(folder / "tokens.jsonl")
        self.report: Report = convert_mixed(source, folder / "out", data, bits=7.0)
        found = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32, output_loading_info=True)
        self.theirs: PreTrainedModel = found[0].eval()
        self.problems: dict[str, Any] = {what: names for what, names in found[1].items() if names}
        self.ours: Llama4Model = load(folder / "out", dtype="float32")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return Mixed(tmp_path_factory.mktemp("mixed"))


def test_it_is_mixed(mixed: Mixed) -> None:
    schemes = {weight.scheme for weight in mixed.report.weights if ".layers." in weight.name}
    assert {"fp8 channel", "bf16"} < schemes
    assert len({scheme for scheme in schemes if scheme.startswith("int4")}) >= 2


def test_every_tensor_finds_its_place(mixed: Mixed) -> None:
    assert mixed.problems == {}


def test_modules_have_the_chosen_schemes(mixed: Mixed) -> None:
    modules = dict(mixed.theirs.named_modules())
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    reported = {weight.name: weight.scheme for weight in mixed.report.weights if weight.name in linears}
    assert reported.keys() == linears
    assert {name: scheme_of(modules[name]) for name in linears} == reported


def test_logits(mixed: Mixed) -> None:
    ids = torch.randint(3, 90, (8, 10), generator=torch.Generator().manual_seed(3))
    for module in mixed.theirs.modules():
        if hasattr(module, "quantization_scheme"):
            module.register_forward_pre_hook(add_batch)  # docs/transformers.md: one FP8 scale per token
    with torch.no_grad():
        theirs = mixed.theirs(input_ids=ids, use_cache=False).logits
    ours = mixed.ours(ids)
    differences = (ours - theirs).abs().amax(dim=-1).flatten()
    assert float(differences.quantile(SHARE_CLOSE)) <= TOLERANCE * float(theirs.std())


def scheme_of(module: nn.Module) -> str:
    """As our report spells it."""
    found = getattr(module, "quantization_scheme", None)
    if found is None:
        return "bf16"
    weights = found.weights
    name = {(4, "int"): "int4", (8, "float"): "fp8"}[weights.num_bits, weights.type]
    return f"{name} {weights.strategy if weights.group_size is None else f'g{weights.group_size}'}"


def add_batch(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    return (args[0].unsqueeze(0), *args[1:]) if args[0].dim() == 2 else None
