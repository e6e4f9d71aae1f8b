"""The shipped checkpoint: what it holds, and that it has learned what its card says."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, Llama4ForConditionalGeneration

from llama4_quant.sample import HELD_OUT_TEXT, SAMPLE_DIR
from llama4_quant.sample.data import prompt_text
from llama4_quant.sample.evaluate import caption_accuracy, held_out_windows, score_text
from llama4_quant.sample.export import load_reference
from llama4_quant.sample.shapes import image_prompt
from llama4_quant.sample.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE

CONFIG = json.loads((SAMPLE_DIR / "config.json").read_text())


@pytest.fixture(scope="module")
def model() -> Llama4ForConditionalGeneration:
    return load_reference(SAMPLE_DIR)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SAMPLE_DIR / "tokenizer.json"))


def card_figure(row: str) -> float:
    found = re.search(rf"^\| {row}[^|]*\| ([0-9.]+)%? \|$", (SAMPLE_DIR / "README.md").read_text(), flags=re.MULTILINE)
    assert found, row
    return float(found[1])


def test_files_and_size() -> None:
    names = {path.name for path in SAMPLE_DIR.iterdir()}
    assert names >= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    shards = {name for name in names if name.endswith(".safetensors")}
    assert len(shards) >= 3
    files = [p for p in SAMPLE_DIR.parent.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


def test_shards_hold_what_the_index_says() -> None:
    index = json.loads((SAMPLE_DIR / "model.safetensors.index.json").read_text())
    num_bytes = 0
    for shard in set(index["weight_map"].values()):
        with safe_open(SAMPLE_DIR / shard, framework="pt") as file:
            assert set(file.keys()) == {name for name, place in index["weight_map"].items() if place == shard}
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
            assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
            assert all(tensor.isfinite().all() for tensor in tensors)
            num_bytes += sum(tensor.nbytes for tensor in tensors)
    assert index["metadata"]["total_size"] == num_bytes


def test_whole_architecture_is_exercised(model: Llama4ForConditionalGeneration) -> None:
    text = model.config.text_config
    assert text.moe_layers == [1, 3]
    assert text.no_rope_layers == [1, 1, 1, 0]
    assert text.layer_types == ["chunked_attention"] * 3 + ["full_attention"]
    assert (text.attention_chunk_size, text.floor_scale) == (64, 32)
    assert text.attn_temperature_tuning
    assert text.use_qk_norm
    assert (text.num_local_experts, text.num_experts_per_tok) == (8, 1)
    assert text.rope_parameters["rope_type"] == "llama3"
    assert text.num_key_value_heads < text.num_attention_heads
    assert not torch.equal(model.language_model.lm_head.weight, model.language_model.model.embed_tokens.weight)
    # What group sizes up to 128 must divide.
    assert {text.hidden_size % 128, text.intermediate_size % 128, text.intermediate_size_mlp % 128} == {0}


def test_config_is_spelled_as_on_the_hub() -> None:
    text = CONFIG["text_config"]
    assert CONFIG["torch_dtype"] == "bfloat16"
    assert {"rope_scaling", "rope_theta"} <= text.keys()
    assert "rope_parameters" not in text
    parsed = AutoConfig.from_pretrained(SAMPLE_DIR)
    assert parsed.text_config.rope_parameters["factor"] == text["rope_scaling"]["factor"]
    assert parsed.text_config.rope_parameters["rope_theta"] == text["rope_theta"]
    assert parsed.vision_config.rope_parameters["rope_theta"] == CONFIG["vision_config"]["rope_theta"]


def test_tokenizer_has_llama4s_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE == CONFIG["text_config"]["vocab_size"]
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(VOCAB_SIZE - len(SPECIAL_TOKENS), VOCAB_SIZE))
    assert CONFIG["image_token_index"] == tokenizer.token_to_id("<|patch|>")
    assert CONFIG["text_config"]["bos_token_id"] == tokenizer.token_to_id("<|begin_of_text|>")
    assert CONFIG["text_config"]["pad_token_id"] == tokenizer.token_to_id("<|finetune_right_pad|>")


@pytest.mark.parametrize(
    "text", ["", " ", "a\r\n\tb   c\n\n\nd", "naïve café — 東京 🐝", "x = f(1234567, 'it''s')", "\x00\x7f\u200b"]
)
def test_tokenizer_gives_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode(text).ids == [tokenizer.token_to_id("<|begin_of_text|>"), *ids]


def test_auto_tokenizer_agrees_and_renders_chats(tokenizer: Tokenizer) -> None:
    auto = AutoTokenizer.from_pretrained(SAMPLE_DIR)
    text = "Return the sum of two numbers."
    assert auto(text).input_ids == tokenizer.encode(text).ids
    assert (auto.bos_token, auto.eos_token, auto.pad_token) == (
        "<|begin_of_text|>",
        "<|eot|>",
        "<|finetune_right_pad|>",
    )
    question = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    shown = auto.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    assert shown == "<|begin_of_text|>" + prompt_text("<|image|>Describe the image.")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "}]
    assert auto.apply_chat_template(turns, tokenize=False) == (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nHi<|eot|>"
    )


def test_image_settings_fit_the_model(tokenizer: Tokenizer) -> None:
    image = json.loads((SAMPLE_DIR / "preprocessor_config.json").read_text())
    processor = json.loads((SAMPLE_DIR / "processor_config.json").read_text())
    side = CONFIG["vision_config"]["image_size"]
    assert image["size"] == {"height": side, "width": side}
    patches = (side // processor["patch_size"]) ** 2 * processor["pixel_shuffle_ratio"] ** 2
    ids = tokenizer.encode(image_prompt(1, 1)).ids
    assert ids.count(CONFIG["image_token_index"]) == patches == 4


def test_perplexity_is_below_a_bigram_models(model: Llama4ForConditionalGeneration, tokenizer: Tokenizer) -> None:
    torch.set_num_threads(1)
    windows_BL = held_out_windows(tokenizer, HELD_OUT_TEXT.read_text(encoding="utf-8"))
    # Every twelfth window: a sample of about eight of them, all documents being far shorter than the distance.
    perplexity, shares = score_text(model, windows_BL[::12])
    assert perplexity < card_figure("bigram model on the same tokens") / 1.3
    assert perplexity <= card_figure("unigram model on the same tokens") / 3
    assert min(share.smallest for share in shares) >= 0.03


@pytest.mark.parametrize("canvas", [(1, 1), (2, 2)])
def test_held_out_images_are_captioned(
    model: Llama4ForConditionalGeneration, tokenizer: Tokenizer, canvas: tuple[int, int]
) -> None:
    torch.set_num_threads(1)
    assert caption_accuracy(model, tokenizer, canvas, 20) >= 0.9
