"""The harder model computes what the original does, bit for bit, and is harder to quantize."""

from pathlib import Path

import pytest
import torch
from benchmarks.harder_model import Outliers, make_harder, transform
from checkpoints import make_checkpoint, multimodal_config, random_tensors, text_config
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from llama4_quant.architecture import Llama4Config, Role, linear_specs
from llama4_quant.quantizers.quantize import dequantize_weight, quantize_weight
from llama4_quant.scheme import preset

CONFIGS = {
    "multimodal": multimodal_config(),
    "text-biases": text_config(attention_bias=True),
    "one-kv-head": text_config(num_key_value_heads=1),
    "dense": text_config(moe_layers=[]),
    "top-2": text_config(num_experts_per_tok=2),
}


def logits(folder: Path, dtype: torch.dtype) -> Tensor:
    config = Llama4Config.from_file(folder / "config.json")
    kind = AutoModelForCausalLM if config.vision is None else AutoModelForImageTextToText
    model = kind.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.randint(1, 90, (4, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_equal(name: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", CONFIGS[name])
    make_harder(source, tmp_path / "harder", Outliers(seed=3))
    for dtype in (torch.float32, torch.bfloat16):
        expected = logits(source, dtype)
        assert float(expected.float().std()) > 0.1
        assert torch.equal(logits(tmp_path / "harder", dtype), expected)


def changes(name: str) -> tuple[Llama4Config, dict[str, Tensor], dict[str, Tensor]]:
    config = Llama4Config.from_dict(CONFIGS[name])
    old = random_tensors(CONFIGS[name])
    return config, old, transform(old, config, Outliers())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_text_weight_but_embeddings_and_head_changes(name: str) -> None:
    config, old, new = changes(name)
    untouched = ("vision_model", "multi_modal_projector", "embed_tokens", "lm_head", "model.norm.", "q_proj.bias")
    untouched = (*untouched, "k_proj.bias", "o_proj.bias")
    for tensor in old:
        assert torch.equal(new[tensor], old[tensor]) == any(part in tensor for part in untouched), tensor
        assert (new[tensor].dtype, new[tensor].shape) == (old[tensor].dtype, old[tensor].shape)
    assert config.text.num_hidden_layers == 4


def test_norm_gains_have_outliers() -> None:
    config, old, new = changes("multimodal")
    name = f"{config.prefix}model.layers.1.post_attention_layernorm.weight"
    ratio = (new[name] / old[name]).float()
    assert float(ratio.max()) >= 8 * float(ratio.median())
    assert torch.equal(torch.frexp(ratio).mantissa, torch.full_like(ratio, 0.5))  # powers of two


def test_output_error_of_rounding_grows() -> None:
    """Scaled by channel, inputs make the rounding of small weights beside large ones matter."""
    config, old, new = changes("multimodal")
    scheme = preset("W4A16", group_size=32).weights
    linear = next(spec for spec in linear_specs(config) if spec.role is Role.DENSE_MLP and "gate" in spec.name)
    norm = linear.name.replace("feed_forward.gate_proj", "post_attention_layernorm.weight")

    def error(tensors: dict[str, Tensor]) -> float:
        x_TK = torch.randn(64, linear.in_features, generator=torch.Generator().manual_seed(0)) * tensors[norm].float()
        weight = tensors[linear.source].float()
        rounded = dequantize_weight(quantize_weight(tensors[linear.source], scheme), torch.float32)
        return float((x_TK @ (weight - rounded).T).norm() / (x_TK @ weight.T).norm())

    assert error(new) > 1.5 * error(old)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_harder(source, tmp_path / name, Outliers(seed=seed))
    files = [path.name for path in source.glob("*.safetensors")]
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert any((tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes() for file in files)
    assert load_file(tmp_path / "a" / files[0]).keys() == load_file(source / files[0]).keys()


def test_output_that_exists_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists; expected a folder to make"):
        make_harder(make_checkpoint(tmp_path / "source"), tmp_path, Outliers())


def test_overflow_is_refused() -> None:
    config = Llama4Config.from_dict(text_config())
    with pytest.raises(ValueError, match="left the range of"):
        transform(random_tensors(text_config()), config, Outliers(strength=140))
