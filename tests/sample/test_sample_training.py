import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Llama4ForConditionalGeneration

from llama4_quant.errors import CheckpointError, UsageError
from llama4_quant.python_text import Document, Entry
from llama4_quant.sample import shapes
from llama4_quant.sample.configuration import Dimensions, hub_config, transformers_config
from llama4_quant.sample.data import TrainingData, chat_batch, prepare, text_batch
from llama4_quant.sample.export import export, load_reference
from llama4_quant.sample.recipe import Recipe
from llama4_quant.sample.routed import IGNORED, RoutedFeedForward, TrainingModel, balance_loss
from llama4_quant.sample.run import Run
from llama4_quant.sample.tokenizer import token_id, train_tokenizer
from llama4_quant.sample.tower import tower_batch
from llama4_quant.sample.train import train, train_step

TINY = Dimensions(
    hidden_size=32,
    num_experts=4,
    expert_intermediate_size=16,
    mlp_intermediate_size=32,
    num_heads=2,
    num_key_value_heads=1,
    vision_hidden_size=16,
    vision_layers=1,
)
# So many minutes that only the steps drive the schedule.
RECIPE = Recipe(
    tower_steps=2, steps=3, minutes=1e9, tower_images=4, text_rows=2, text_length=80, captions=2, questions=1
)


def documents() -> tuple[Document, ...]:
    words = ["return", "the", "module", "object", "string", "number", "file", "path"]
    rng = random.Random(0)
    entries = tuple(Entry(name=f"m.f{i}", text=" ".join(rng.choices(words, k=12))) for i in range(40))
    return (Document(name="module:m", entries=entries),)


@pytest.fixture(scope="module")
def data() -> TrainingData:
    captions = [scene.caption for scene in shapes.scenes(held_out=False)]
    alphabet = "".join(chr(c) for c in range(32, 0x2000))
    return prepare(documents(), train_tokenizer([*(d.text for d in documents()), *captions, alphabet]))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(tokenizer: Tokenizer, recipe: Recipe = RECIPE) -> Run:
    return Run.start(recipe, hub_config(tokenizer, TINY))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_killed_and_resumed_run_gives_the_same_weights(data: TrainingData, tmp_path: Path) -> None:
    whole = start(data.tokenizer)
    train(whole, data, tmp_path / "whole", threads=1)

    killed = start(data.tokenizer)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            train_step(killed, data, pool)
        killed.save(tmp_path / "killed")
        train_step(killed, data, pool)  # lost: the kill comes before the next checkpoint
    (tmp_path / "killed" / "training.pt.partial").write_bytes(b"half a checkpoint")
    del killed

    resumed = start(data.tokenizer)
    resumed.resume(tmp_path / "killed")
    assert resumed.step == 3
    train(resumed, data, tmp_path / "killed", threads=1)
    assert resumed.step == whole.step == 5
    assert_same(resumed.weights, whole.weights)
    fresh = start(data.tokenizer).weights
    assert any(not torch.equal(fresh[name], tensor) for name, tensor in whole.weights.items())


def test_weights_do_not_depend_on_threads(data: TrainingData, tmp_path: Path) -> None:
    runs = [start(data.tokenizer) for _ in range(2)]
    for threads, run in enumerate(runs, start=1):
        train(run, data, tmp_path / str(threads), threads=threads)
    assert_same(runs[1].weights, runs[0].weights)


def test_resume_refuses_another_recipe(data: TrainingData, tmp_path: Path) -> None:
    start(data.tokenizer).save(tmp_path)
    with pytest.raises(UsageError, match="other settings"):
        start(data.tokenizer, Recipe(steps=5)).resume(tmp_path)


def test_exported_model_is_the_trained_one(data: TrainingData, tmp_path: Path) -> None:
    hub = hub_config(data.tokenizer, TINY)
    torch.manual_seed(1)
    trained = TrainingModel(transformers_config(hub))
    # Weights that BF16 holds exactly, so the round trip through the checkpoint loses nothing.
    rounded = {name: tensor.bfloat16().float() for name, tensor in trained.llama.state_dict().items()}
    trained.llama.load_state_dict(rounded)
    export(rounded, hub, data.tokenizer, tmp_path / "model")
    reference = load_reference(tmp_path / "model")
    assert_same(reference.state_dict(), rounded)
    batch = chat_batch(data, random.Random(3), captions=4, questions=2)
    with torch.inference_mode():
        expected = reference(input_ids=batch.ids, pixel_values=batch.pixels, use_cache=False).logits
        found = trained.llama(input_ids=batch.ids, pixel_values=batch.pixels, use_cache=False).logits
    # The same sums in another order: 32 terms of float32 (2^-24 each), a few layers deep.
    assert (found - expected).abs().max() <= 1e-5 * expected.std()


def test_export_names_a_tensor_of_the_wrong_shape(data: TrainingData, tmp_path: Path) -> None:
    hub = hub_config(data.tokenizer, TINY)
    weights = dict(Llama4ForConditionalGeneration(transformers_config(hub)).state_dict())
    del weights["language_model.lm_head.weight"]
    export(weights, hub, data.tokenizer, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"language_model\.lm_head\.weight"):
        load_reference(tmp_path / "model")


def test_routed_mixture_equals_transformers(data: TrainingData) -> None:
    torch.manual_seed(2)
    hub = hub_config(data.tokenizer, TINY)
    moe = Llama4ForConditionalGeneration(transformers_config(hub)).language_model.model.layers[1].feed_forward
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_TH = torch.randn(50, TINY.hidden_size)
    expected_TH, expected_TE = moe(x_TH.clone())
    found_TH, found_TE = RoutedFeedForward(moe)(x_TH)
    torch.testing.assert_close(found_TE, expected_TE, rtol=0, atol=0)
    torch.testing.assert_close(found_TH.view_as(expected_TH), expected_TH)


def test_balance_loss_is_one_when_even_and_larger_when_not() -> None:
    even_TE = 5 * torch.eye(4).repeat(3, 1)
    assert balance_loss(even_TE, torch.tensor([3, 3, 3, 3])).item() == pytest.approx(1.0, abs=1e-6)
    crowded_TE = even_TE[:1].repeat(12, 1)
    # All tokens on one expert, which the router gives probability e^5 / (e^5 + 3) = 0.980186, and there are four.
    assert balance_loss(crowded_TE, torch.tensor([12, 0, 0, 0])).item() == pytest.approx(4 * 0.980186, abs=1e-5)


def test_text_batches_are_shifted_windows(data: TrainingData) -> None:
    batch = text_batch(data, random.Random(5), rows=4, length=70)
    assert batch.ids.shape == batch.labels.shape == (4, 70)
    assert torch.equal(batch.ids[:, 1:], batch.labels[:, :-1])
    begin = token_id(data.tokenizer, "<|begin_of_text|>")
    assert batch.ids[:2, 0].tolist() == [begin, begin]


def test_only_answers_are_learned(data: TrainingData) -> None:
    batch = chat_batch(data, random.Random(7), captions=2, questions=0)
    learned = [data.tokenizer.decode(row[row != IGNORED].tolist(), skip_special_tokens=False) for row in batch.labels]
    captions = {scene.caption for scene in shapes.scenes(held_out=False)}
    assert {text.removesuffix("<|eot|>") for text in learned} <= captions
    assert all(text.endswith("<|eot|>") for text in learned)
    assert batch.pixels is not None
    num_patches = (batch.ids == token_id(data.tokenizer, "<|patch|>")).sum().item()
    assert num_patches == batch.pixels.shape[0] * shapes.TOKENS_PER_TILE


def test_first_stage_leaves_the_language_model_alone(data: TrainingData) -> None:
    run = start(data.tokenizer)
    before = {name: tensor.clone() for name, tensor in run.weights.items()}
    with ThreadPoolExecutor(1) as pool:
        train_step(run, data, pool)
    changed = {name for name, tensor in run.weights.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if not name.startswith("language_model.")}


def test_tower_batches_name_what_has_a_name(data: TrainingData) -> None:
    batch = tower_batch(data.scenes, random.Random(0), size=9)
    assert batch.pixels.shape == (9, 3, shapes.TILE_SIDE, shapes.TILE_SIDE)
    unnamed = batch.classes[:, 1] == IGNORED
    assert torch.equal(unnamed, batch.classes[:, 3] == IGNORED)
    assert unnamed.sum() == 3
    assert (batch.classes[:, [0, 2]] >= 0).all()


def test_schedule_follows_steps_or_the_clock(data: TrainingData) -> None:
    run = start(data.tokenizer, Recipe(tower_steps=3, steps=10, minutes=2.0))
    run.step = 8
    assert run.progress == 0.5
    run.seconds = 90.0
    assert run.progress == 0.75
    assert run.recipe.rate(1.0) == pytest.approx(0.01)
    assert run.recipe.rate(run.recipe.warmup) == pytest.approx(1.0)
