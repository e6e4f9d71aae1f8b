"""Which tokens are scored, and what happens when the text is too short."""

import pytest
import torch

from llama4_quant.errors import UsageError
from llama4_quant.evaluation import token_windows


def test_with_begin_of_text_every_token_is_scored_once() -> None:
    windows = token_windows(range(11), seq_length=4, bos_token_id=99)
    assert torch.equal(windows, torch.tensor([[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]))
    assert windows[:, 1:].flatten().tolist() == list(range(9))  # 9 and 10 do not fill a window


def test_without_begin_of_text() -> None:
    assert torch.equal(token_windows(range(11), seq_length=4), torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]))


def test_the_first_windows_are_taken() -> None:
    assert token_windows(range(100), seq_length=3, num_windows=2).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_text_that_just_fits() -> None:
    assert token_windows(range(9), seq_length=4, num_windows=3, bos_token_id=99).shape == (3, 4)


@pytest.mark.parametrize(
    ("num_tokens", "seq_length", "num_windows", "bos", "message"),
    [
        (8, 4, 3, 99, "the text has 8 tokens: 2 windows of 4 positions fit, but 3 are needed"),
        (11, 4, 3, None, "the text has 11 tokens: 2 windows of 4 positions fit, but 3 are needed"),
        (3, 5, None, 99, "the text has 3 tokens: 0 windows of 5 positions fit, but 1 is needed"),
        (0, 5, None, None, "0 windows of 5 positions fit"),
        (9, 1, None, None, "seq_length is 1"),
        (9, 4, 0, None, "num_windows is 0"),
    ],
)
def test_errors(num_tokens: int, seq_length: int, num_windows: int | None, bos: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        token_windows(range(num_tokens), seq_length=seq_length, num_windows=num_windows, bos_token_id=bos)
