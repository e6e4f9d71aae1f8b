"""Our fp32 logits against transformers' Llama 4: prefill, token by token, in pieces, padded, with images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.transformers_reference import IMAGE_TOKEN, SCOUT_ROPE, our_model, reference_model
from torch import Tensor

from llama4_quant.runtime import KVCache, Llama4Model

# Both sides compute the same sums in fp32 in different orders. The bound is the project's: 1e-4 of the logits' standard
# deviation; a rounding unit of fp32 is 6e-8, so it leaves room for about 1,000 of them through 4 layers.
TOLERANCE = 1e-4
LENGTH = 40
TOKENS_PER_TILE = 4

BLENDED_ROPE = SCOUT_ROPE | {"factor": 8.0, "high_freq_factor": 4.0}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "scout": {"multimodal": True, "use_qk_norm": True, "rope_parameters": SCOUT_ROPE},
    "maverick": {"multimodal": True, "use_qk_norm": False, "interleave_moe_layer_step": 2},
    "text-only": {"multimodal": False, "interleave_moe_layer_step": 2, "rope_parameters": BLENDED_ROPE},
    "blended-rope": {"multimodal": True, "rope_parameters": BLENDED_ROPE, "use_qk_norm": False},
    "one-chunk": {"multimodal": False, "attention_chunk_size": 64},
    "no-temperature": {"multimodal": False, "attn_temperature_tuning": False, "rms_norm_eps": 0.05},
    "two-experts": {"multimodal": False, "num_experts_per_tok": 2},
    "tied": {"multimodal": False, "tie_word_embeddings": True},
    "tied-images": {"multimodal": True, "tie_word_embeddings": True},
    "attention-bias": {"multimodal": False, "attention_bias": True},
    "mixed-rope-layers": {"multimodal": False, "no_rope_layers": [0, 1, 0, 1], "moe_layers": [2]},
    "all-dense": {"multimodal": False, "moe_layers": []},
}


class Peer:
    """A model of transformers, its checkpoint, and its logits, each computed once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.model = reference_model(**CONFIGURATIONS[name])
        self.folder = folder
        self.model.save_pretrained(folder)
        self._logits: dict[tuple[object, ...], Tensor] = {}

    def expected(self, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        key = (ids.shape, *ids.flatten().tolist(), None if pixels is None else float(pixels.sum()))
        if key not in self._logits:
            images = {} if pixels is None else {"pixel_values": pixels}
            with torch.no_grad():
                self._logits[key] = self.model(input_ids=ids, use_cache=False, **images).logits
        return self._logits[key]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same model twice."""

    peer: Peer
    ours: Llama4Model

    def expected(self, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        return self.peer.expected(ids, pixels)


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return Peer(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=[name for name, case in CONFIGURATIONS.items() if case["multimodal"]])
def image_peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return Peer(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def pair(request: pytest.FixtureRequest, peer: Peer) -> Pair:
    return Pair(peer=peer, ours=our_model(peer.folder, attention=request.param))


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def image_pair(request: pytest.FixtureRequest, image_peer: Peer) -> Pair:
    return Pair(peer=image_peer, ours=our_model(image_peer.folder, attention=request.param))


@pytest.mark.parametrize("length", [1, 8, 9, LENGTH])
def test_prefill(pair: Pair, length: int) -> None:
    ids = _text(2, length)
    assert_close(pair.ours(ids), pair.expected(ids))


def test_last_logits_only(pair: Pair) -> None:
    ids = _text(2, 11)
    assert_close(pair.ours(ids, logits="last"), pair.expected(ids)[:, -1:])


def test_token_by_token(pair: Pair) -> None:
    ids = _text(2, LENGTH)
    cache = pair.ours.new_cache(2, capacity=4)
    logits = _in_pieces(pair.ours, ids, [13] + [1] * (LENGTH - 13), cache)
    assert_close(logits, pair.expected(ids))


def test_prefill_in_pieces(pair: Pair) -> None:
    ids = _text(2, LENGTH)
    # Pieces that end inside a chunk, at its end, and that span several chunks of 8.
    assert_close(_in_pieces(pair.ours, ids, [5, 3, 1, 20, 11], pair.ours.new_cache(2)), pair.expected(ids))


def test_left_padding_equals_each_row_alone(pair: Pair) -> None:
    lengths = (LENGTH, 27, 3)
    ids, mask = _padded(lengths)
    logits = pair.ours(ids, attention_mask=mask)
    _assert_rows(pair, ids, lengths, logits)


@pytest.mark.parametrize("pieces", [[20] + [1] * 20, [6, 7, 1, 1, 25]], ids=["token-by-token", "pieces"])
def test_left_padding_with_cache(pair: Pair, pieces: list[int]) -> None:
    lengths = (LENGTH, 35, 22)
    ids, mask = _padded(lengths)
    _assert_rows(pair, ids, lengths, _in_pieces(pair.ours, ids, pieces, pair.ours.new_cache(3), mask))


def test_every_row_padded(pair: Pair) -> None:
    lengths = (30, 17)
    ids, mask = _padded(lengths)
    _assert_rows(pair, ids, lengths, pair.ours(ids, attention_mask=mask))
    _assert_rows(pair, ids, lengths, _in_pieces(pair.ours, ids, [12, 20, 1, 1, 6], pair.ours.new_cache(2), mask))


@pytest.mark.parametrize("tiles", [[1], [3], [2, 1]], ids=["one-tile", "three-tiles", "two-images"])
def test_images(image_pair: Pair, tiles: list[int]) -> None:
    pair = image_pair
    ids = _with_images(tiles)
    pixels = torch.randn(sum(tiles), 3, 16, 16, generator=torch.Generator().manual_seed(2))
    expected = pair.expected(ids, pixels)
    assert_close(pair.ours(ids, pixel_values=pixels), expected)
    cache = pair.ours.new_cache(1)
    start = pair.ours(ids[:, :-5], pixel_values=pixels, cache=cache)
    rest = [pair.ours(ids[:, column : column + 1], cache=cache) for column in range(ids.shape[1] - 5, ids.shape[1])]
    assert_close(torch.cat([start, *rest], dim=1), expected)


def test_decode_equals_transformers_decode(pair: Pair) -> None:
    """Against its cached decode too, for its cache and ours are different code from its prefill."""
    ids = _text(1, 20)
    expected = []
    past = None
    with torch.no_grad():
        for piece in ids.split([14, 1, 1, 1, 1, 1, 1], dim=1):
            output = pair.peer.model(input_ids=piece, past_key_values=past, use_cache=True)
            past = output.past_key_values
            expected.append(output.logits)
    logits = _in_pieces(pair.ours, ids, [14, 1, 1, 1, 1, 1, 1], pair.ours.new_cache(1))
    assert_close(logits, torch.cat(expected, dim=1))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= TOLERANCE * float(expected.std())


def _text(batch: int, length: int) -> Tensor:
    return torch.randint(1, IMAGE_TOKEN, (batch, length), generator=torch.Generator().manual_seed(1))


def _padded(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    width = max(*lengths, LENGTH)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return _text(len(lengths), width) * mask, mask


def _with_images(tiles: list[int]) -> Tensor:
    parts = [_text(1, 7)]
    for count in tiles:
        parts += [torch.full((1, count * TOKENS_PER_TILE), IMAGE_TOKEN), _text(1, 6)]
    return torch.cat(parts, dim=1)


def _in_pieces(
    model: Llama4Model, ids: Tensor, pieces: list[int], cache: KVCache, mask: Tensor | None = None
) -> Tensor:
    assert sum(pieces) == ids.shape[1]
    logits = []
    for piece in pieces:
        columns = slice(cache.length, cache.length + piece)
        piece_mask = None if mask is None else mask[:, columns]
        logits.append(model(ids[:, columns], attention_mask=piece_mask, cache=cache))
    return torch.cat(logits, dim=1)


def _assert_rows(pair: Pair, ids: Tensor, lengths: tuple[int, ...], logits: Tensor) -> None:
    assert torch.isfinite(logits).all()
    for row, length in enumerate(lengths):
        assert_close(logits[row : row + 1, -length:], pair.expected(ids[row : row + 1, -length:]))


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """A chunk border off by one position is far beyond the tolerance."""
    peer = Peer("text-only", tmp_path)
    ids = _text(1, LENGTH)
    peer.model.config.attention_chunk_size = 7
    expected = peer.expected(ids)
    actual = our_model(tmp_path, attention="sdpa")(ids)
    assert float((actual - expected).abs().max()) > 100 * TOLERANCE * float(expected.std())
