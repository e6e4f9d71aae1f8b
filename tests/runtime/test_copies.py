"""A model in memory can be copied and pickled; one that holds open files says that it cannot."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llama4_quant import load
from llama4_quant.errors import UsageError
from llama4_quant.runtime import Llama4Model
from llama4_quant.runtime.linear import WeightStorage
from llama4_quant.sample import SAMPLE_DIR


def saved(model: Llama4Model) -> Llama4Model:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    made = torch.load(file, weights_only=False)
    assert isinstance(made, Llama4Model)
    return made


COPIES: dict[str, Callable[[Llama4Model], Llama4Model]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}
SETTINGS: list[dict[str, Any]] = [{}, {"scheme": "W4A16"}, {"scheme": "W4A16", "kernel": "torch"}]


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        *itertools.product(SETTINGS, COPIES),
        # Not with plain pickle: torch's does not read FP8 tensors.
        *itertools.product([{"scheme": "FP8_DYNAMIC"}], ["deepcopy", "torch.save"]),
    ],
)
def test_a_copy_computes_the_same_with_weights_of_its_own(settings: dict[str, Any], way: str) -> None:
    model = load(SAMPLE_DIR, **settings)
    ids = torch.arange(100, 120)[None]
    with torch.inference_mode():
        expected = model(ids)
        made = COPIES[way](model)
        assert made.kernels() == model.kernels()
        pairs = zip(made.modules(), model.modules(), strict=True)
        assert all(ours.call is theirs.call for ours, theirs in pairs if isinstance(theirs, WeightStorage))
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(made(ids), expected)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("expert_cache", [None, "2MB"])
def test_offloaded_experts_are_loaded_once_more_instead(expert_cache: str | None, way: str) -> None:
    model = load(SAMPLE_DIR, offload="experts", expert_cache=expert_cache)
    with pytest.raises(UsageError, match=r"cannot be copied or pickled; .* load it once more: load\(\.\.\., offload"):
        COPIES[way](model)
