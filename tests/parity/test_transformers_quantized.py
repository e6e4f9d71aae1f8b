"""Checkpoints that we convert, loaded by transformers through compressed-tensors: every weight, and the logits.

Both sides hold the same numbers, so in fp32 their logits differ by the order of sums alone, except where FP8 rounds
activations: see `assert_close`. compressed-tensors gives 2-D inputs one FP8 scale for all tokens, and Llama 4's experts
and projector have 2-D inputs in transformers: see `one_scale_per_token`. docs/transformers.md tells users about both.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint, multimodal_config, text_config
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CompressedTensorsConfig, PreTrainedModel

from llama4_quant import Scheme, convert, load, preset
from llama4_quant.architecture import Llama4Config, Role, linear_specs, tensor_specs
from llama4_quant.planning.choose import DEFAULT_ROLES
from llama4_quant.quantizers.quantize import dequantize_weight, quantize_weight
from llama4_quant.scheme import SchemeName, Strategy, WeightType

FP32_TOLERANCE = 2.5e-5
"""Largest difference of fp32 logits, in standard deviations of the logits. A sum of K products is off by about
sqrt(K) u, u = 2^-24: 16 u for K = 256. Four layers have two branches each, of two such products in a row (value and
output, up and down): 16 products, on both sides, add up to 16 u sqrt(32) = 5.4e-6. The largest of 10^4 normal errors is
4 to 4.5 times that."""

SHARE_CLOSE = 0.75
"""Share of tokens that must be that close under FP8, see `assert_close`."""

BF16_NOISE = 2.0**-8 * math.sqrt(2 * 8 * 10 / 6)
"""Relative difference of bf16 logits, root mean square: 2.0 %. A rounding to bf16 is off by u / sqrt(6), u = 2^-8, for
uniform mantissas; a branch rounds about 10 times, there are 8 branches, and two sides (which mostly round alike)."""

FP8_NOISE = 2.0**-3 / math.sqrt(12 * 2) * math.sqrt(2 * 8 * 2)
"""What it gains if no FP8 code of an activation agrees: 14 %. Codes are 2^-3/m apart for mantissas m in 1..2, so a
rounding is off by 2^-3 / sqrt(12 * 2); two inputs for each of the 8 branches, and two sides."""

LARGEST = 4.5
"""The largest of 10^4 normal errors, in standard deviations."""

EVERYTHING = ["attention", "lm-head", "vision", "projector"]
LAYER_1_EXPERTS = [r"re:.*layers\.1\.feed_forward\.experts"]
TIED = {"tie_word_embeddings": True}
IMAGE_TOKEN = 90
TOKENS_PER_TILE = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    config: dict[str, Any]
    scheme: Scheme

    @property
    def fp8_per_token(self) -> bool:
        return self.scheme.name is SchemeName.FP8_DYNAMIC

    @property
    def has_experts(self) -> bool:
        return any(spec.role is Role.ROUTED_EXPERT for spec in tensor_specs(Llama4Config.from_dict(self.config)))


def case(config: dict[str, Any], name: str, **settings: Any) -> Case:
    return Case(config=config, scheme=preset(name, **settings))


CASES = {
    "int4-g32": case(multimodal_config(), "W4A16", group_size=32),
    "int4-g32-everything": case(multimodal_config(), "W4A16", group_size=32, quantize=EVERYTHING),
    "int4-channel-vision": case(multimodal_config(), "W4A16", group_size=-1, quantize=["vision", "projector"]),
    "int4-g128-biases": case(text_config(attention_bias=True), "W4A16", quantize=["attention", "lm-head"]),
    "int4-kept-experts": case(multimodal_config(), "W4A16", quantize=["attention"], ignore=LAYER_1_EXPERTS),
    "int4-tied": case(text_config(**TIED), "W4A16", group_size=64),
    "fp8": case(multimodal_config(), "FP8_DYNAMIC"),
    "fp8-everything": case(multimodal_config(), "FP8_DYNAMIC", quantize=EVERYTHING),
    "fp8-kept-experts": case(text_config(), "FP8_DYNAMIC", quantize=["attention"], ignore=LAYER_1_EXPERTS),
    "fp8-dense": case(text_config(moe_layers=[]), "FP8_DYNAMIC", quantize=["attention", "lm-head"]),
    "fp8-tied-images": case(multimodal_config(**TIED), "FP8_DYNAMIC"),
    "block": case(multimodal_config(), "FP8_BLOCK", quantize=["attention", "lm-head", "projector"]),
}


class Peer:
    """One checkpoint of ours in transformers and in our runtime, fp32."""

    def __init__(self, wanted: Case, folder: Path) -> None:
        self.case = wanted
        self.config = Llama4Config.from_dict(wanted.config)
        self.source = make_checkpoint(folder / "bf16", wanted.config)
        self.out = folder / "quantized"
        convert(self.source, self.out, scheme=wanted.scheme)
        self.theirs, self.loading_info = load_theirs(self.out, self.config, torch.float32)
        self.ours = load(self.out, dtype="float32")

    def quantized_names(self) -> set[str]:
        """What the scheme asks for, worked out from roles and not from our plan."""
        scheme = self.case.scheme
        roles = {*DEFAULT_ROLES, *scheme.quantize}
        patterns = [pattern.removeprefix("re:") for pattern in scheme.ignore]
        names = {
            linear.name
            for linear in linear_specs(self.config)
            if linear.role in roles and not any(re.match(pattern, linear.name) for pattern in patterns)
        }
        is_block = scheme.name is SchemeName.FP8_BLOCK  # q, k and v are left alone: vLLM permutes rows of q and k
        return {name for name in names if not (is_block and re.search(r"self_attn\.[qkv]_proj", name))}

    def expected_weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All parameters by name, from the source alone: quantized and dequantized here, or as they are."""
        source = read_folder(self.source)
        quantized = self.quantized_names()
        weights = {spec.name: source[spec.name].to(dtype) for spec in tensor_specs(self.config) if not spec.linears}
        for linear in linear_specs(self.config):
            fused = source[linear.source] if linear.expert is None else source[linear.source][linear.expert]
            rows = fused.T if linear.transposed else fused
            weight = rows[linear.out_start : linear.out_start + linear.out_features]
            if linear.name in quantized:
                weight = dequantize_weight(quantize_weight(weight, self.case.scheme.weights), dtype)
            weights[f"{linear.name}.weight"] = weight.to(dtype)
        return weights


@pytest.fixture(scope="module", params=CASES)
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return Peer(CASES[request.param], tmp_path_factory.mktemp(request.param))


def test_every_tensor_finds_its_place(peer: Peer) -> None:
    assert {problem: found for problem, found in peer.loading_info.items() if found} == {}


def test_quantized_modules_are_the_planned_ones(peer: Peer) -> None:
    modules = dict(peer.theirs.named_modules())
    schemes = {name: module.quantization_scheme for name, module in modules.items() if is_quantized(module)}
    assert schemes.keys() == peer.quantized_names()
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    ignored = json.loads((peer.out / "config.json").read_text())["quantization_config"]["ignore"]
    assert set(ignored) == linears - schemes.keys()
    assert len(set(ignored)) == len(ignored)
    weights = peer.case.scheme.weights
    expected = (4, "int") if weights.type is WeightType.INT4 else (8, "float")
    activations = {Strategy.BLOCK: "group", Strategy.CHANNEL: "token"}[weights.strategy] if expected[0] == 8 else None
    for scheme in schemes.values():
        assert (scheme.weights.num_bits, scheme.weights.type) == expected
        assert (scheme.weights.strategy, scheme.weights.group_size) == (weights.strategy, weights.group_size)
        assert (scheme.input_activations and scheme.input_activations.strategy) == activations


def test_weights_bit_for_bit(peer: Peer) -> None:
    assert_same_weights(peer.theirs, peer.expected_weights(torch.float32))


def test_token_by_token(peer: Peer) -> None:
    """One sequence at a time with a cache, past the end of an attention chunk of 8; transformers is left as it is."""
    theirs, ours = [], []
    for ids in text_ids(4, 9).split(1):
        past, cache = None, peer.ours.new_cache(1)
        for token in ids.split(1, dim=1):
            with torch.no_grad():
                output = peer.theirs(input_ids=token, past_key_values=past, use_cache=True)
            past = output.past_key_values
            theirs.append(output.logits)
            ours.append(peer.ours(token, cache=cache))
    assert_close(torch.cat(ours), torch.cat(theirs), peer.case)


def test_sequences(peer: Peer) -> None:
    ids = text_ids(16, 10)
    ours = peer.ours(ids)
    if peer.case.fp8_per_token and peer.case.has_experts:
        with pytest.raises(AssertionError):
            assert_close(ours, their_logits(peer.theirs, ids), peer.case)
        with one_scale_per_token(peer.theirs):
            assert_close(ours, their_logits(peer.theirs, ids), peer.case)
    else:
        assert_close(ours, their_logits(peer.theirs, ids), peer.case)


def test_images(peer: Peer) -> None:
    if peer.config.vision is None:
        pytest.skip("a text-only model")
    generator = torch.Generator().manual_seed(2)
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * TOKENS_PER_TILE, 7]])
    tiles = torch.randn(12, 1, 3, 28, 28, generator=generator)
    with one_scale_per_token(peer.theirs):
        theirs = torch.cat([their_logits(peer.theirs, ids, tile) for tile in tiles])
    assert_close(torch.cat([peer.ours(ids, pixel_values=tile) for tile in tiles]), theirs, peer.case)


@pytest.mark.parametrize("name", SchemeName)
def test_bfloat16(name: str, tmp_path: Path) -> None:
    """Every token takes both experts here: a router that is near a tie would turn bf16 noise into another expert."""
    raw = multimodal_config(num_local_experts=2, num_experts_per_tok=2)
    config = Llama4Config.from_dict(raw)
    convert(make_checkpoint(tmp_path / "bf16", raw), tmp_path / "out", scheme=preset(name, quantize=["attention"]))
    theirs, loading_info = load_theirs(tmp_path / "out", config, torch.bfloat16)
    assert not any(loading_info.values())
    ours = load(tmp_path / "out")
    ids = text_ids(8, 12)
    with one_scale_per_token(theirs):
        expected = their_logits(theirs, ids).float()
    difference = ours(ids).float() - expected
    noise = BF16_NOISE if name == "W4A16" else math.hypot(BF16_NOISE, FP8_NOISE)
    assert float(difference.square().mean().sqrt()) <= noise * float(expected.std())
    assert float(difference.abs().max()) <= LARGEST * noise * float(expected.std())


@pytest.mark.parametrize(("name", "suffix"), [("W4A16", "weight_packed"), ("FP8_DYNAMIC", "weight")])
def test_compressed_until_the_first_forward(name: str, suffix: str, tmp_path: Path) -> None:
    peer = Peer(case(text_config(), name), tmp_path)
    theirs, _ = load_theirs(peer.out, peer.config, torch.bfloat16)
    stored = read_folder(peer.out)
    for module in peer.quantized_names():
        assert torch.equal(theirs.get_parameter(f"{module}.{suffix}"), stored[f"{module}.{suffix}"])
    assert_same_weights(theirs, peer.expected_weights(torch.bfloat16))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # its other settings are the checkpoint's
@pytest.mark.parametrize("name", ["W4A16", "FP8_DYNAMIC"])
def test_dequantized_while_loading(name: str, tmp_path: Path) -> None:
    peer = Peer(case(text_config(**TIED), name), tmp_path)
    settings = CompressedTensorsConfig(dequantize=True)
    theirs, loading_info = load_theirs(peer.out, peer.config, torch.bfloat16, quantization_config=settings)
    assert not any(loading_info.values())
    assert not any(is_quantized(module) for module in theirs.modules())
    assert_same_weights(theirs, peer.expected_weights(torch.bfloat16))


def test_compressed_tensors_gives_a_matrix_one_scale() -> None:
    """When this fails, compressed-tensors is fixed: drop `one_scale_per_token` here and in docs/transformers.md."""
    args = QuantizationArgs(num_bits=8, type="float", strategy="token", symmetric=True, dynamic=True)
    x_BTK = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    scale, _ = compute_dynamic_scales_and_zp(x_BTK, args, nn.Linear(64, 1))
    assert scale.shape == (2, 5, 1)
    scale, _ = compute_dynamic_scales_and_zp(x_BTK.flatten(0, 1), args, nn.Linear(64, 1))
    assert scale.numel() == 1


def assert_close(ours: Tensor, theirs: Tensor, wanted: Case) -> None:
    """Token by token: the largest difference of a token's logits is within FP32_TOLERANCE standard deviations.

    Under FP8, SHARE_CLOSE of the tokens. An activation that lies on the border of two codes within fp32 rounding goes
    up on one side and down on the other, a whole step of 1/16 to 1/8 of its value. Differences of about 3e-7 meet such
    a border in 3e-7 / (2^-3 ln 2) = 3.5e-6 of all activations; a token has some 2,800 in four layers, and so a chance
    of 1 % of one, which reaches the later tokens of its sequence too, half of ten: 5 % of all tokens on average.
    """
    assert ours.shape == theirs.shape
    differences = (ours - theirs).abs().amax(dim=-1).flatten()
    share = 1.0 if wanted.scheme.weights.type is WeightType.INT4 else SHARE_CLOSE
    assert torch.isfinite(differences).all()
    assert float(differences.quantile(share)) <= FP32_TOLERANCE * float(theirs.std())


def assert_same_weights(theirs: PreTrainedModel, expected: dict[str, Tensor]) -> None:
    """All parameters after the first forward, which decompresses and leaves weight_scale and weight_shape behind."""
    their_logits(theirs, text_ids(1, 1))
    leftover = (".weight_scale", ".weight_shape")
    found = {name: value for name, value in theirs.named_parameters() if not name.endswith(leftover)}
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype, name
        assert torch.equal(found[name], weight), name


@contextmanager
def one_scale_per_token(model: PreTrainedModel) -> Iterator[None]:
    """Show compressed-tensors a batch [1, T, K] where a quantized module gets a matrix [T, K].

    `compute_dynamic_scales_and_zp` of 0.20 takes the largest magnitude over all dimensions but the first two, and over
    everything if there is no third.
    """

    def add_batch(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return (args[0].unsqueeze(0),) if args[0].dim() == 2 else None

    handles = [module.register_forward_pre_hook(add_batch) for module in model.modules() if is_quantized(module)]
    yield
    for handle in handles:
        handle.remove()


def is_quantized(module: nn.Module) -> bool:
    return hasattr(module, "quantization_scheme")


def load_theirs(
    folder: Path, config: Llama4Config, dtype: torch.dtype, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of transformers, and what it says about missing, unexpected and mismatched tensors."""
    kind = AutoModelForCausalLM if config.vision is None else AutoModelForImageTextToText
    model, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **settings)
    return model.eval(), info


def their_logits(model: PreTrainedModel, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
    images = {} if pixels is None else {"pixel_values": pixels}
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False, **images).logits
    return logits


def text_ids(batch: int, length: int) -> Tensor:
    return torch.randint(1, IMAGE_TOKEN, (batch, length), generator=torch.Generator().manual_seed(3))


def read_folder(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
