"""What another choice of experts costs: margins, jumps and the gradient that stands for them."""

import pytest
import torch

from llama4_quant.calibration.rerouting import Rerouting


def logits() -> torch.Tensor:
    """Four tokens, three experts; deviation about 1.6: tokens 1 and 3 are within three sigma = 0.24."""
    return torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.95, -2.0], [0.0, 2.0, 0.0], [-2.0, 0.5, 0.7]])


def test_tokens_near_a_tie() -> None:
    found = Rerouting(logits(), 1)
    assert found.tokens.tolist() == [1, 3]
    assert (found.last.tolist(), found.next.tolist()) == ([0, 2], [1, 1])
    assert found.places(1).tolist() == [0, 1]
    assert found.places(2).tolist() == [1]


def test_all_experts_chosen_leaves_no_other() -> None:
    assert len(Rerouting(logits(), 3).tokens) == 0


def test_squared_gradients_give_the_expected_cost() -> None:
    """E[(g . d)^2] / 2 for an error d of the logits' difference of deviation sigma is J P(xi > m)."""
    found = Rerouting(logits(), 1)
    router_EH = torch.eye(3)
    gradient_RH = torch.ones(2, 3)
    outputs = {0: torch.zeros(2, 3), 1: torch.full((2, 3), 0.5), 2: torch.full((2, 3), -0.5)}
    for expert in range(3):
        places = found.places(expert)
        found.add(expert, places, outputs[expert][places], gradient_RH[places])
    made_RH = found.gradients(router_EH, torch.Generator().manual_seed(0))
    sigma = 0.05 * float(logits().std())
    for place, (margin, change) in enumerate([(0.05, 1.5), (0.2, 3.0)]):
        expected = 0.5 * change**2 * float(torch.special.ndtr(torch.tensor(-margin / sigma)))
        # The difference of logits is a difference of two inputs here: g has +-a and -+a, and (g . d)^2 is a^2 sigma^2.
        size = float(made_RH[place].abs().max())
        assert 0.5 * size**2 * sigma**2 == pytest.approx(expected, rel=1e-4)
        assert float(made_RH[place].sum()) == 0
