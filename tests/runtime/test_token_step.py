"""A token through a tape is a token through the layers one by one, bit by bit; and when no tape may be used."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from checkpoints import text_config as checkpoint_config
from runtime.tiny_model import random_ids, random_model, text_config
from torch import Tensor, nn

from llama4_quant import convert
from llama4_quant.ops import native, native_attention, native_elementwise, native_tape
from llama4_quant.runtime import Llama4Model
from llama4_quant.runtime.loader import load
from llama4_quant.runtime.token_step import TokenStep

PROBES = (native, native_attention, native_elementwise, native_tape)
pytestmark = pytest.mark.skipif(
    any(module.probe() is not None for module in PROBES), reason=f"no compiled kernels: {native_tape.probe()}"
)
CONFIGS = {
    "mixed": {},
    "only experts": {"interleave_moe_layer_step": 1, "num_local_experts": 5},
    "biases, no temperature": {"attention_bias": True, "attn_temperature_tuning": False, "use_qk_norm": False},
    "no chunks": {"attention_chunk_size": None},
}


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on no tape is used."""
    return lambda: monkeypatch.setattr(TokenStep, "run", lambda *_: None)


def _model(**changes: object) -> Llama4Model:
    return random_model(text_config(**changes), torch.bfloat16)


def _decoded(model: Llama4Model, ids: Tensor, *, kind: str = "auto", padding: int = 0, capacity: int = 5) -> Tensor:
    """Logits of tokens one by one, behind a prompt of three; one is taken back on the way."""
    cache = model.new_cache(1, capacity, kind)
    mask = (torch.arange(3 + padding) >= padding).long().unsqueeze(0)
    prompt = torch.cat([torch.zeros(1, padding, dtype=torch.int64), ids[:, :3]], dim=1)
    model(prompt, attention_mask=mask, cache=cache)
    found = [model(ids[:, [at]], cache=cache) for at in range(3, ids.shape[1])]
    if cache.rewind(cache.length - 1):
        found.append(model(ids[:, :1], cache=cache))
    return torch.cat(found, dim=1)


def _num_tapes(model: Llama4Model) -> int:
    recordings = model.model._token_step._recordings
    return sum(recording is not None for recording in recordings.values())


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize(("padding", "capacity"), [(0, 5), (3, 100)])
@torch.inference_mode()
def test_any_model(
    changes: dict[str, object], kind: str, padding: int, capacity: int, one_by_one: Callable[[], None]
) -> None:
    """Over borders of chunks and of blocks of the cache, and past the position where temperature sets in."""
    model, ids = _model(**changes), random_ids(1, 40)
    on_tape = _decoded(model, ids, kind=kind, padding=padding, capacity=capacity)
    assert _num_tapes(model) == 1
    one_by_one()
    assert torch.equal(on_tape, _decoded(model, ids, kind=kind, padding=padding, capacity=capacity))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("token-step") / "source", checkpoint_config())


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC", "FP8_BLOCK"])
@torch.inference_mode()
def test_any_stored_format(source: Path, tmp_path: Path, scheme: str, one_by_one: Callable[[], None]) -> None:
    convert(source, tmp_path / "out", scheme=scheme)
    model, ids = load(tmp_path / "out", lm_head="int8"), random_ids(1, 20)
    on_tape = _decoded(model, ids)
    assert _num_tapes(model) == 1
    one_by_one()
    assert torch.equal(on_tape, _decoded(model, ids))


@torch.inference_mode()
def test_what_cannot_be_recorded_runs_one_by_one(source: Path) -> None:
    ids = random_ids(1, 8)
    for changes, options in (
        ({"num_experts_per_tok": 2}, {}),
        ({}, {"kernel": "torch"}),
        ({}, {"kernel": "reference"}),
        ({}, {"attention": "eager"}),
    ):
        model = random_model(text_config(**changes), torch.bfloat16, **options)
        assert _decoded(model, ids).isfinite().all()
        assert _num_tapes(model) == 0, (changes, options)
    in_file = load(source, offload="experts")
    assert _decoded(in_file, ids).isfinite().all()
    assert _num_tapes(in_file) == 0
    for other in (random_model(text_config()), _model()):
        cache = other.new_cache(2)
        other(random_ids(2, 1), cache=cache)  # float32, and two rows
        assert not other.model._token_step._recordings


def _replaced_weight(model: Llama4Model) -> None:
    weight = model.model.layers[1].feed_forward.shared_expert.up_proj
    weight.weight = nn.Parameter(weight.weight * 2, requires_grad=False)


def _changed_weight(model: Llama4Model) -> None:
    model.model.layers[0].self_attn.v_proj.weight.mul_(2)


def _swapped_layers(model: Llama4Model) -> None:
    layers = model.model.layers
    layers[0], layers[2] = layers[2], layers[0]


def _other_threads(_model: Llama4Model) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize("change", [_replaced_weight, _changed_weight, _swapped_layers, _other_threads])
@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_changes_of_the_model_are_seen(change: Callable[[Llama4Model], None], one_by_one: Callable[[], None]) -> None:
    model, ids = _model(), random_ids(1, 12)
    before = _decoded(model, ids)
    change(model)
    after = _decoded(model, ids)
    assert _num_tapes(model) == 1
    assert torch.equal(before, after) == (change is _other_threads)
    one_by_one()
    assert torch.equal(after, _decoded(model, ids))


@torch.inference_mode()
def test_hooks_see_every_module() -> None:
    model, ids, seen = _model(), random_ids(1, 10), []
    expected = _decoded(model, ids)
    norm = model.model.layers[2].input_layernorm
    with norm.register_forward_hook(lambda *_: seen.append(1)):
        assert torch.equal(_decoded(model, ids), expected)
    assert len(seen) == 1 + 7 + 1  # the prompt, seven tokens, one that is taken back
    assert torch.equal(_decoded(model, ids), expected)
    assert len(seen) == 9


def test_inside_of_inference_mode_and_outside() -> None:
    model, ids = _model(), random_ids(1, 12)
    with torch.inference_mode():
        inside = _decoded(model, ids)
    assert torch.equal(_decoded(model, ids), inside)
    other = _model()
    outside = _decoded(other, ids)
    with torch.inference_mode():
        assert torch.equal(_decoded(other, ids), outside)
    assert torch.equal(inside, outside)


def test_threads_do_not_meet_on_a_tape() -> None:
    model = _model()
    prompts = [random_ids(1, 40, seed) for seed in range(3)]
    expected = [_decoded(model, ids) for ids in prompts]
    found: list[list[Tensor]] = [[] for _ in prompts]

    def decode(number: int) -> None:
        for _ in range(4):
            found[number].append(_decoded(model, prompts[number]))

    workers = [threading.Thread(target=decode, args=(number,)) for number in range(len(prompts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number, results in enumerate(found):
        assert len(results) == 4
        assert all(torch.equal(result, expected[number]) for result in results)


@torch.inference_mode()
def test_copies_have_tapes_of_their_own() -> None:
    model, ids = _model(), random_ids(1, 12)
    expected = _decoded(model, ids)
    step = pickle.loads(pickle.dumps(model.model._token_step))
    assert not step._recordings
    other = copy.deepcopy(model.model)
    assert not other._token_step._recordings
    for parameter in model.parameters():
        parameter.zero_()
    model.model = other
    model.lm_head.weight.copy_(_model().lm_head.weight)
    assert torch.equal(_decoded(model, ids), expected)


@torch.inference_mode()
def test_no_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = _model(), random_ids(1, 12)
    _decoded(model, ids)
    [recording] = model.model._token_step._recordings.values()
    monkeypatch.setattr(recording._tape, "_run", lambda *_: 1)
    with pytest.raises(MemoryError, match="scratch space of a decoding step"):
        _decoded(model, ids)
