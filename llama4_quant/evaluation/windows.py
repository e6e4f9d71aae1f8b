"""A text cut into windows of tokens that a model is scored on.

Windows do not overlap, so every token is scored at most once and windows are independent samples. With a
beginning-of-text token, each window is that token and then `seq_length` - 1 tokens of the text, all of which are
scored. Without one, it is `seq_length` tokens of the text, of which the first has nothing before it and is not scored.
Either way a window scores `seq_length` - 1 tokens. What is left at the end of the text is dropped.

Shape letters: L positions of a window, W windows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama4_quant.errors import UsageError


def token_windows(
    token_ids: Sequence[int], *, seq_length: int, num_windows: int | None = None, bos_token_id: int | None = None
) -> Tensor:
    """Cut a text.

    Args:
        token_ids: the whole text, without special tokens.
        seq_length: positions per window, at least 2.
        num_windows: how many, from the start of the text; None for as many as fit.
        bos_token_id: what starts every window, if the model has such a token.

    Returns:
        [W, L] int64.

    Raises:
        UsageError: the text is too short; says how many windows fit.
    """
    if seq_length < 2:
        raise UsageError(f"seq_length is {seq_length}, expected at least 2: a token is scored given the one before")
    if num_windows is not None and num_windows < 1:
        raise UsageError(f"num_windows is {num_windows}, expected at least 1")
    stride = seq_length if bos_token_id is None else seq_length - 1
    num_fitting = len(token_ids) // stride
    wanted = num_fitting if num_windows is None else num_windows
    if wanted > num_fitting or num_fitting == 0:
        raise UsageError(
            f"the text has {len(token_ids)} tokens: {num_fitting} windows of {seq_length} positions fit, but "
            f"{max(wanted, 1)} {'is' if max(wanted, 1) == 1 else 'are'} needed; give a longer text, or fewer or "
            "shorter windows"
        )
    windows_WL = torch.tensor(token_ids[: wanted * stride], dtype=torch.int64).view(wanted, stride)
    if bos_token_id is None:
        return windows_WL
    return torch.cat([torch.full((wanted, 1), bos_token_id), windows_WL], dim=1)
