"""The model as a container of weights, with every storage, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime.tiny_model import IMAGE_TOKEN, image_config, random_ids, random_model, text_config
from torch import Tensor

from llama4_quant.architecture import LinearSpec, Llama4Config, Role, linear_specs, tensor_specs
from llama4_quant.errors import UsageError
from llama4_quant.ops.reference import round_activations_fp8
from llama4_quant.quantizers.packing import pack_int4
from llama4_quant.quantizers.quantize import dequantize_weight, quantize_weight
from llama4_quant.runtime import Llama4Model
from llama4_quant.runtime.experts import DenseStack
from llama4_quant.runtime.linear import DenseLinear
from llama4_quant.scheme import Strategy, WeightScheme, WeightType

INT4 = WeightScheme(type=WeightType.INT4, strategy=Strategy.GROUP, group_size=32)
FP8 = WeightScheme(type=WeightType.FP8, strategy=Strategy.CHANNEL)
CONFIGS: dict[str, Callable[..., Llama4Config]] = {"text": text_config, "images": image_config}


def _quantizable(config: Llama4Config) -> set[str]:
    """Every linear weight but router and patch embedding: experts, attention, head, vision and projector too."""
    kept = {Role.ROUTER, Role.PATCH_EMBEDDING}
    return {spec.name for spec in linear_specs(config) if spec.role not in kept}


def _quantized_copy(source: Llama4Model, scheme: WeightScheme) -> Llama4Model:
    """`source` with its linear weights quantized; `source` itself gets the dequantized values."""
    names = _quantizable(source.config)
    model = Llama4Model(
        source.config,
        scheme_of=lambda name: scheme if name in names else None,
        dtype=source.dtype,
        kernel="reference",
    ).materialize("cpu")
    plain = source.plain_targets()
    for name, target in model.plain_targets().items():
        target.copy_(plain[name])
    for spec in linear_specs(source.config):
        weight = source.linear_target(spec)["weight"]
        targets = model.linear_target(spec)
        if spec.name not in names:
            targets["weight"].copy_(weight)
            continue
        quantized = quantize_weight(weight, scheme)
        targets["weight_scale"].copy_(quantized.scale)
        if scheme.type is WeightType.INT4:
            targets["weight_packed"].copy_(pack_int4(quantized.codes))
        else:
            targets["weight"].copy_(quantized.codes)
        weight.copy_(dequantize_weight(quantized, source.dtype))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_targets_are_the_checkpoint(kind: str, tied: bool) -> None:
    config = CONFIGS[kind](tie_word_embeddings=tied)
    model = Llama4Model(config)
    expected = {spec.name: spec.shape for spec in tensor_specs(config) if not spec.linears}
    assert {name: tuple(target.shape) for name, target in model.plain_targets().items()} == expected
    for spec in linear_specs(config):
        targets = model.linear_target(spec)
        assert {name: tuple(t.shape) for name, t in targets.items()} == {
            "weight": (spec.out_features, spec.in_features)
        }


@pytest.mark.parametrize("scheme", [None, INT4, FP8], ids=["dense", "int4", "fp8"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_targets_cover_the_model_once(kind: str, scheme: WeightScheme | None) -> None:
    config = CONFIGS[kind]()
    names = _quantizable(config)
    model = Llama4Model(config, scheme_of=lambda name: scheme if name in names else None, device="cpu")
    targets = [*model.plain_targets().values()]
    targets += [t for spec in linear_specs(config) for t in model.linear_target(spec).values()]
    for tensor in model.state_dict().values():
        tensor.view(torch.uint8).zero_()
    for tensor in targets:
        tensor.view(torch.uint8).add_(1)
    assert all(bool((tensor.view(torch.uint8) == 1).all()) for tensor in model.state_dict().values())


def test_meta_until_materialized() -> None:
    model = Llama4Model(image_config(), scheme_of=lambda _: None)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    model.materialize("cpu")
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_materialize_keeps_content() -> None:
    model = random_model(text_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frequencies = model.model.rotary.frequencies.clone()
    model.materialize("cpu")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.model.rotary.frequencies, frequencies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_model_equals_dense_model_of_its_values(dtype: torch.dtype) -> None:
    dense = random_model(image_config(), dtype, kernel="reference")
    quantized = _quantized_copy(dense, INT4)
    ids, pixels = _image_inputs()
    logits = quantized(ids, pixel_values=pixels)
    assert logits.dtype is dtype
    assert torch.equal(logits, dense(ids, pixel_values=pixels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_model_equals_dense_model_with_rounded_activations(dtype: torch.dtype) -> None:
    dense = random_model(image_config(), dtype, kernel="reference")
    quantized = _quantized_copy(dense, FP8)
    names = _quantizable(dense.config)
    for path, module in dense.named_modules():
        is_expert_stack = isinstance(module, DenseStack)
        if is_expert_stack or (isinstance(module, DenseLinear) and _full_name(dense, path) in names):
            module.register_forward_pre_hook(lambda _module, args: (round_activations_fp8(args[0]), *args[1:]))
    ids, pixels = _image_inputs()
    assert torch.equal(quantized(ids, pixel_values=pixels), dense(ids, pixel_values=pixels))


def _full_name(model: Llama4Model, path: str) -> str:
    return path if path.startswith(("vision_model", "multi_modal")) else model.config.prefix + path


def _image_inputs() -> tuple[Tensor, Tensor]:
    ids = random_ids(1, 20)
    ids[0, 4:12] = IMAGE_TOKEN
    return ids, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def test_quantized_model_holds_no_dense_copy() -> None:
    dense = random_model(text_config(), torch.bfloat16)
    quantized = _quantized_copy(dense, INT4)
    quantized(random_ids(1, 9))
    held = sum(t.nbytes for t in [*quantized.parameters(), *quantized.buffers()])
    # 4 bits and a bf16 scale per 32 weights; router, norms and embeddings in bf16; 8 fp32 frequencies.
    names = _quantizable(dense.config)
    expected = 8 * 4
    for spec in tensor_specs(dense.config):
        is_quantized = bool(spec.linears) and spec.linears[0].name in names
        expected += spec.num_weights // 2 + spec.num_weights // 32 * 2 if is_quantized else spec.num_weights * 2
    assert held == expected


def test_last_logits() -> None:
    model, ids = random_model(text_config()), random_ids(2, 9)
    torch.testing.assert_close(model(ids, logits="last"), model(ids)[:, -1:])


def test_head_gets_the_last_column_of_a_batch_contiguous() -> None:
    """A strided [B, 1, H] makes torch's linear expand the head's weight to one copy per row."""
    model = random_model(text_config())
    seen: list[Tensor] = []
    assert model.lm_head is not None
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    model(random_ids(3, 5), logits="last")
    assert [(tuple(x.shape), x.is_contiguous()) for x in seen] == [((3, 1, model.config.text.hidden_size), True)]


def test_mask_of_the_new_columns_or_of_all() -> None:
    model, ids = random_model(text_config()), random_ids(2, 12)
    mask = (torch.arange(12) >= torch.tensor([[3], [0]])).long()
    logits = []
    for full in (False, True):
        cache = model.new_cache(2)
        first = model(ids[:, :7], attention_mask=mask[:, :7], cache=cache)
        rest = model(ids[:, 7:], attention_mask=mask if full else mask[:, 7:], cache=cache)
        assert cache.padding == (3, 0)
        logits.append(torch.cat([first, rest], dim=1))
    cache = model.new_cache(2)
    model(ids[:, :7], attention_mask=mask[:, :7], cache=cache)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(model(ids[:, 7:], cache=cache), logits[0][:, 7:])  # and none means no new padding


def test_padding_tokens_do_not_matter() -> None:
    model, ids = random_model(text_config()), random_ids(1, 12)
    mask = (torch.arange(12) >= 4).view(1, -1)
    other = ids.clone()
    other[:, :4] = 7
    assert torch.equal(model(ids, attention_mask=mask)[:, 4:], model(other, attention_mask=mask)[:, 4:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask has shape \[2, 5\], expected \[2, 6\]"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)}, "pad on the left"),
        ({"pixel_values": torch.zeros(1, 3, 16, 16)}, "0 image tokens, but 1 tiles make 4 features"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, r"shape \[1, 3, 8, 8\], expected \[tiles, 3, 16, 16\]"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    model = random_model(image_config())
    with pytest.raises(UsageError, match=message):
        model(random_ids(2, 6), **arguments)


def test_refuses_what_contradicts_the_cache() -> None:
    model, ids = random_model(text_config()), random_ids(2, 6)
    with pytest.raises(UsageError, match="2 rows, but the cache was made for 3"):
        model(ids, cache=model.new_cache(3))
    cache = model.new_cache(2)
    model(ids, cache=cache)
    with pytest.raises(UsageError, match="padding after tokens that are in the cache"):
        model(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]] * 2), cache=cache)
    assert cache.length == 6


def test_text_only_models_take_no_images() -> None:
    with pytest.raises(UsageError, match="text-only"):
        random_model(text_config())(random_ids(1, 3), pixel_values=torch.zeros(1, 3, 16, 16))


def test_unknown_linear_is_a_bug_not_a_silent_skip() -> None:
    spec = LinearSpec(name="model.norm", role=Role.NORM, layer=None, out_features=1, in_features=1, source="x")
    with pytest.raises(AssertionError, match="holds no linear weight"):
        Llama4Model(text_config()).linear_target(spec)
