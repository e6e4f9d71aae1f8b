"""Generation: stopping, padding, streaming, and the KV cache against recomputing everything."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from llama4_quant.config import Llama4Config
from llama4_quant.errors import UsageError
from llama4_quant.runtime.generate import Generation, TokenStream, _pad_token_id, generate
from llama4_quant.runtime.model import Llama4Model
from llama4_quant.runtime.sampling import DEFAULT_PREFILL_CHUNK_SIZE, GenerationSettings
from llama4_quant.runtime.timing import FinishReason

EOS, PAD, VOCABULARY = 7, 9, 10


class CountingModel:
    """After token t comes t + 1; remembers what it was called with."""

    def __init__(self, max_positions: int = 100, eos: Sequence[int] = (EOS,), pad: int | None = PAD) -> None:
        text = SimpleNamespace(max_position_embeddings=max_positions, eos_token_ids=tuple(eos), pad_token_id=pad)
        self.config = SimpleNamespace(text=text)
        self.device = torch.device("cpu")
        self.calls: list[dict[str, object]] = []

    def new_cache(self, batch_size: int, capacity: int, dtype: str) -> tuple[int, int, str]:
        return (batch_size, capacity, dtype)

    def prefill(self, input_ids: Tensor, **options: object) -> Tensor:
        return self(input_ids, **options)

    def __call__(self, input_ids: Tensor, **options: object) -> Tensor:
        self.calls.append({"input_ids": input_ids, **options})
        following = (input_ids[:, -1:] + 1) % VOCABULARY
        return torch.nn.functional.one_hot(following, VOCABULARY).to(torch.bfloat16)


def _count(model: CountingModel, rows: list[list[int]], **settings: object) -> Generation:
    return generate(model, torch.tensor(rows), settings=GenerationSettings(**settings))


def test_stops_at_eos() -> None:
    generation = _count(CountingModel(), [[1, 4]])
    assert generation.sequences.tolist() == [[1, 4, 5, 6, EOS]]
    assert generation.new_token_ids == ((5, 6),)
    assert generation.finish_reasons == (FinishReason.EOS,)


def test_stops_at_any_eos() -> None:
    assert _count(CountingModel(eos=(3, EOS)), [[1]]).new_token_ids == ((2,),)
    assert _count(CountingModel(), [[1]], eos_token_ids=(5, 4)).new_token_ids == ((2, 3),)


def test_stops_at_max_new_tokens() -> None:
    generation = _count(CountingModel(), [[1]], max_new_tokens=3)
    assert generation.new_token_ids == ((2, 3, 4),)
    assert generation.finish_reasons == (FinishReason.LENGTH,)


def test_no_eos_at_all() -> None:
    assert _count(CountingModel(eos=()), [[5]], max_new_tokens=6).new_token_ids == ((6, 7, 8, 9, 0, 1),)


def test_stops_where_positions_end() -> None:
    assert _count(CountingModel(max_positions=5), [[1, 1, 1]]).new_token_ids == ((2, 3),)


def test_prompt_that_fills_all_positions() -> None:
    with pytest.raises(UsageError, match="the prompt has 3 tokens and the model's max_position_embeddings is 3"):
        _count(CountingModel(max_positions=3), [[1, 1, 1]])


@pytest.mark.parametrize("input_ids", [torch.empty(1, 0, dtype=torch.int64), torch.tensor([1, 2])])
def test_no_prompt(input_ids: Tensor) -> None:
    with pytest.raises(UsageError, match="input_ids have shape"):
        generate(CountingModel(), input_ids, settings=GenerationSettings())


def test_ended_rows_are_padded_and_padding_is_not_counted() -> None:
    model = CountingModel()
    seen: list[list[int]] = []
    generation = generate(
        model,
        torch.tensor([[PAD, 5], [1, 3]]),
        attention_mask=torch.tensor([[0, 1], [1, 1]]),
        settings=GenerationSettings(),
        on_token=lambda tokens: seen.append(tokens.tolist()),
    )
    assert generation.sequences.tolist() == [[PAD, 5, 6, EOS, PAD, PAD], [1, 3, 4, 5, 6, EOS]]
    assert seen == [[6, 4], [EOS, 5], [PAD, 6], [PAD, EOS]]
    timing = generation.timing
    assert (timing.num_prompt_tokens, timing.num_new_tokens, timing.num_decoded_tokens) == (3, 6, 4)
    assert timing.decode_tokens_per_second == 4 / timing.decode_seconds
    assert timing.prefill_seconds > 0


def test_one_token_has_no_decode_speed() -> None:
    assert _count(CountingModel(), [[1]], max_new_tokens=1).timing.decode_tokens_per_second is None


def test_a_closed_row_is_padded_and_has_stopped() -> None:
    """Rows 0 and 1 would count to the end; row 1 is closed after its first token, row 2 ends by itself."""
    stream = TokenStream(CountingModel(), torch.tensor([[0], [0], [5]]), settings=GenerationSettings(max_new_tokens=3))
    columns = [next(stream).tolist()]
    stream.close(1)
    columns += [column.tolist() for column in stream]
    assert columns == [[1, 1, 6], [2, PAD, EOS], [3, PAD, PAD]]
    assert stream.finish_reasons == (FinishReason.LENGTH, FinishReason.STOP, FinishReason.EOS)
    assert stream.timing.num_new_tokens == 3 + 1 + 2


def test_all_rows_closed_ends_the_stream() -> None:
    model = CountingModel()
    stream = TokenStream(model, torch.tensor([[0], [1]]), settings=GenerationSettings())
    next(stream)
    stream.close(0)
    stream.close(1)
    assert list(stream) == []
    assert len(model.calls) == 1


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="stop strings need a tokenizer"):
        _count(CountingModel(), [[1]], stop=("x",))


@pytest.mark.parametrize(
    ("wished", "of_model", "eos", "expected"),
    [
        (3, PAD, (EOS,), 3),
        (None, PAD, (EOS,), PAD),
        (None, None, (EOS, 1), EOS),
        (-1, -1, (EOS,), EOS),
        (None, None, (), 0),
    ],
)
def test_what_padding_is(wished: int | None, of_model: int | None, eos: tuple[int, ...], expected: int) -> None:
    assert _pad_token_id(wished, of_model, eos) == expected


def test_prefill_once_then_one_token_a_call() -> None:
    model = CountingModel()
    mask, pixels = torch.tensor([[1, 1]]), torch.zeros(1, 3, 2, 2)
    prompt = torch.tensor([[1, 3]])
    generate(model, prompt, attention_mask=mask, pixel_values=pixels, settings=GenerationSettings())
    prefill, *decode = model.calls
    assert torch.equal(prefill["input_ids"], prompt)
    assert prefill["attention_mask"] is mask
    assert prefill["pixel_values"] is pixels
    assert prefill["chunk_size"] == DEFAULT_PREFILL_CHUNK_SIZE
    assert [call["input_ids"].tolist() for call in decode] == [[[4]], [[5]], [[6]]]
    assert all("pixel_values" not in call and call["cache"] is prefill["cache"] for call in decode)


def test_nothing_is_computed_that_nobody_asks_for() -> None:
    model = CountingModel()
    stream = TokenStream(model, torch.tensor([[1]]), settings=GenerationSettings())
    assert model.calls == []
    assert [int(next(stream)), int(next(stream))] == [2, 3]
    assert len(model.calls) == 2


# A real model: two layers, RoPE with chunks of 4 and NoPE, experts


@pytest.fixture(scope="module")
def model() -> Llama4Model:
    text = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 32,
        "intermediate_size_mlp": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 4,
        "floor_scale": 4,
        "max_position_embeddings": 64,
        "eos_token_id": [],
        "pad_token_id": 0,
    }
    model = Llama4Model(
        Llama4Config.from_dict({"model_type": "llama4_text", **text}), dtype=torch.float32, device="cpu"
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.detach().normal_(0, 0.2, generator=generator)
    return model.eval()


def _greedy_without_cache(model: Llama4Model, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cache_gives_what_recomputing_gives(model: Llama4Model) -> None:
    prompt = [3, 14, 15, 9, 26]
    found = generate(model, torch.tensor([prompt]), settings=GenerationSettings(max_new_tokens=12))
    assert list(found.new_token_ids[0]) == _greedy_without_cache(model, prompt, 12)


def test_a_padded_row_gives_what_it_gives_alone(model: Llama4Model) -> None:
    prompts = [[3, 14, 15, 9, 26, 5, 35], [8, 9]]
    ids = torch.tensor([prompts[0], [0] * 5 + prompts[1]])
    mask = torch.tensor([[1] * 7, [0] * 5 + [1] * 2])
    found = generate(model, ids, attention_mask=mask, settings=GenerationSettings(max_new_tokens=10))
    for row, prompt in zip(found.new_token_ids, prompts, strict=True):
        assert list(row) == _greedy_without_cache(model, prompt, 10)


def test_sampling_depends_on_the_seed_alone(model: Llama4Model) -> None:
    def sample(seed: int) -> tuple[tuple[int, ...], ...]:
        settings = GenerationSettings(max_new_tokens=20, temperature=1.5, seed=seed)
        return generate(model, torch.tensor([[1, 2]]), settings=settings).new_token_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("settings", [{"temperature": 1.5, "top_p": 0.95}, {"repetition_penalty": 1.5}])
def test_a_row_does_not_depend_on_the_others(model: Llama4Model, settings: dict[str, float]) -> None:
    """Alone, under its number, every row of a sampled or penalized batch gives the same tokens."""
    prompts = [[3, 14, 15, 9, 26, 5, 35], [8, 9], [3, 14, 15, 9, 26, 5, 35], [40]]
    chosen = GenerationSettings(max_new_tokens=12, seed=4, logprobs=True, **settings)
    ids = torch.tensor([[0] * (7 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (7 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    together = generate(model, ids, attention_mask=mask, settings=chosen)
    assert together.logprobs is not None
    for number, prompt in enumerate(prompts):
        alone = TokenStream(model, torch.tensor([prompt]), settings=chosen, rows=[number])
        tokens, logprobs = zip(*((int(token), float(alone.logprobs)) for token in alone), strict=True)
        assert tokens == together.new_token_ids[number]
        # Logits agree within float32 rounding of sums of 32 to 64 products, far below 1e-4.
        assert together.logprobs[number] == pytest.approx(logprobs, abs=1e-4)
    same = together.new_token_ids[0] == together.new_token_ids[2]
    assert same == ("temperature" not in settings)  # equal prompts, other random numbers
    plain = generate(model, ids, attention_mask=mask, settings=GenerationSettings(max_new_tokens=12))
    assert all(a != b for a, b in zip(plain.new_token_ids, together.new_token_ids, strict=True))  # it made a difference


def test_logprobs_are_of_the_model(model: Llama4Model) -> None:
    """As computed from a forward pass over the whole text; the sum of rounding errors is far below 1e-4."""
    settings = GenerationSettings(max_new_tokens=10, temperature=2.0, repetition_penalty=1.4, logprobs=True)
    found = generate(model, torch.tensor([[3, 14, 15]]), settings=settings)
    with torch.inference_mode():
        expected = model(found.sequences)[0, 2:-1].log_softmax(dim=-1)
    chosen = expected.gather(1, found.sequences[0, 3:, None])[:, 0].tolist()
    assert found.logprobs == (pytest.approx(chosen, abs=1e-4),)


def test_a_cache_with_the_beginning_of_the_prompt(model: Llama4Model) -> None:
    """What is in the cache is not computed again; penalties count it all the same."""
    prompt, settings = [3, 14, 15, 9, 26, 5], GenerationSettings(max_new_tokens=8, repetition_penalty=1.3)
    expected = generate(model, torch.tensor([prompt]), settings=settings).new_token_ids[0]
    cache = model.new_cache(1)
    with torch.inference_mode():
        model(torch.tensor([prompt[:4]]), cache=cache)
    stream = TokenStream(model, torch.tensor([prompt]), settings=settings, cache=cache)
    assert tuple(int(token) for token in stream) == expected
    assert stream.cache is cache
    assert cache.length == len(prompt) + 8 - 1
    assert (stream.timing.num_prompt_tokens, stream.timing.num_cached_tokens) == (6, 4)
    with pytest.raises(UsageError, match="the cache holds 13 columns, expected fewer than the prompt's 6"):
        TokenStream(model, torch.tensor([prompt]), settings=settings, cache=cache)


@pytest.mark.parametrize("length", range(1, 11))
def test_a_cache_can_be_rewound_within_the_last_chunk(model: Llama4Model, length: int) -> None:
    """10 columns in chunks of 4: columns before 8 are forgotten in the RoPE layer, so 8 and more can be kept."""
    ids = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7]])
    cache = model.new_cache(1)
    with torch.inference_mode():
        model(ids, cache=cache)
        assert cache.rewind(length) == (length >= 8)
        if length < 8:
            assert cache.length == 10
            return
        other = torch.cat([ids[:, :length], torch.tensor([[11, 12, 13]])], dim=1)
        found = model(other[:, length:], cache=cache)[:, -1]
        # The same sums in another order: float32 rounding of at most 64 products of order 1.
        torch.testing.assert_close(found, model(other)[:, -1], rtol=1e-4, atol=1e-4)


def test_greedy_tokens_are_varied(model: Llama4Model) -> None:
    """Guards the tests above: a model that says one token for ever would pass them whatever the cache does."""
    assert len(set(_greedy_without_cache(model, [3, 14, 15, 9, 26], 12))) > 3
