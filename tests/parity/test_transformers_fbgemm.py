"""fbgemm-fp8 checkpoints in transformers, on a CPU: its kernels need CUDA, so two of them are emulated here.

Everything else is transformers' own: reading config.json, replacing modules, loading tensors into them by name, shape
and dtype, and the forward. What the real kernels compute is not tested here, nor can it be without a GPU.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint, multimodal_config, random_tensors
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.quantizers.quantizer_fbgemm_fp8 import FbgemmFp8HfQuantizer

from llama4_quant import convert, preset
from llama4_quant.architecture import LinearSpec, Llama4Config, Role, linear_specs
from llama4_quant.quantizers.quantize import dequantize_weight, quantize_weight

pytest.importorskip("accelerate")  # transformers replaces modules with it
fbgemm = importlib.import_module("transformers.integrations.fbgemm_fp8")

CONFIG = multimodal_config()
TENSORS = random_tensors(CONFIG)
SCHEME = preset("FP8_DYNAMIC", observer="absmax", quantize=["attention", "lm-head", "projector"])
LARGEST = 448.0
BASE = "language_model.model.layers.1.feed_forward"


def quantize_per_row(rows: Tensor, num_tokens: Tensor | None = None, scale_ub: Tensor | None = None) -> list[Tensor]:
    """FBGEMM's quantize_fp8_per_row: e4m3 codes [T, K] and scales [T], the largest magnitude being code 448."""
    largest = rows.abs().amax(dim=-1).float()
    if scale_ub is not None:
        largest = largest.clamp(max=scale_ub)
    scale = largest.clamp(min=1e-12) / LARGEST
    return [(rows.float() / scale.unsqueeze(-1)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale]


def rowwise(codes: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor, use_fast_accum: bool = True) -> Tensor:
    """FBGEMM's f8f8bf16_rowwise: [T, K] codes times [N, K] codes, each row with its scale, in bf16."""
    assert weight.is_contiguous()
    assert weight.dtype == codes.dtype == torch.float8_e4m3fn
    assert weight_scale.dtype == torch.float32
    assert weight_scale.shape == (len(weight), 1)
    values = codes.double() * scale.double().unsqueeze(-1)
    return (values @ (weight.double() * weight_scale.double()).T).to(torch.bfloat16)


@pytest.fixture(scope="module")
def emulated() -> Iterator[None]:
    library = torch.library.Library("fbgemm", "FRAGMENT")
    library.define("quantize_fp8_per_row(Tensor rows, Tensor? num_tokens=None, Tensor? scale_ub=None) -> Tensor[]")
    library.define("f8f8bf16_rowwise(Tensor x, Tensor w, Tensor xs, Tensor ws, bool use_fast_accum=True) -> Tensor")
    library.impl("quantize_fp8_per_row", quantize_per_row, "CPU")
    library.impl("f8f8bf16_rowwise", rowwise, "CPU")
    yield
    library._destroy()


@pytest.fixture(scope="module")
def model(emulated: None, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder: Path = tmp_path_factory.mktemp("fbgemm")
    source = make_checkpoint(folder / "bf16", CONFIG)
    convert(source, folder / "fp8", format="fbgemm-fp8", scheme=SCHEME)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FbgemmFp8HfQuantizer, "validate_environment", lambda *_, **__: None)
        loaded, info = AutoModelForImageTextToText.from_pretrained(
            folder / "fp8", dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager"
        )
    assert {key: value for key, value in info.items() if value} == {}
    return loaded.eval()


def dequantized(linear: LinearSpec) -> Tensor:
    """[out, in] of a linear weight as its codes and scales say, float64, straight from the BF16 weights."""
    weight = TENSORS[linear.source]
    if linear.expert is not None:
        weight = weight[linear.expert].T[linear.out_start : linear.out_start + linear.out_features]
    return dequantize_weight(quantize_weight(weight, SCHEME.weights), torch.float32).double()


def multiply(rows: Tensor, weight: Tensor) -> Tensor:
    codes, scale = quantize_per_row(rows, scale_ub=torch.tensor([1200.0]))
    return ((codes.double() * scale.double().unsqueeze(-1)) @ weight.T).to(torch.bfloat16)


def test_every_linear_computes_with_our_weights(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    num_converted = 0
    for linear in linear_specs(Llama4Config.from_dict(CONFIG)):
        if linear.expert is not None:
            continue
        module = model.get_submodule(linear.name)
        is_converted = isinstance(module, fbgemm.FbgemmFp8Linear)
        kept = linear.role in {Role.ROUTER, Role.PATCH_EMBEDDING, Role.VISION}
        assert is_converted != kept, linear.name
        if is_converted:
            rows = torch.randn(5, linear.in_features, generator=generator).to(torch.bfloat16)
            assert torch.equal(module(rows), multiply(rows, dequantized(linear))), linear.name
            num_converted += 1
    # Four layers of q, k, v, o and of gate, up, down (dense or shared), the head and the projector.
    assert num_converted == 4 * 4 + 4 * 3 + 2


def test_experts_compute_with_our_weights(model: PreTrainedModel) -> None:
    experts = model.get_submodule(f"{BASE}.experts")
    assert isinstance(experts, fbgemm.FbgemmFp8Llama4TextExperts)
    by_name = {linear.name: linear for linear in linear_specs(Llama4Config.from_dict(CONFIG))}
    rows_ETH = torch.randn(4, 3, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = experts(rows_ETH.reshape(-1, 128)).view(4, 3, 128)
    for expert in range(4):
        gate, up, down = (dequantized(by_name[f"{BASE}.experts.{expert}.{p}_proj"]) for p in ("gate", "up", "down"))
        middle = multiply(rows_ETH[expert], up) * torch.nn.functional.silu(multiply(rows_ETH[expert], gate))
        assert torch.equal(found[expert], multiply(middle, down)), expert


def test_the_whole_model_runs(model: PreTrainedModel) -> None:
    """The router too: with `FbgemmFp8Config()` it is converted, and the forward fails."""
    tokens = torch.randint(0, 89, (1, 12), generator=torch.Generator().manual_seed(0))
    tokens[0, 2:6] = CONFIG["image_token_index"]
    with torch.no_grad():
        logits = model(input_ids=tokens, pixel_values=torch.randn(1, 3, 28, 28).to(torch.bfloat16)).logits
    assert logits.shape == (1, 12, 96)
    assert torch.isfinite(logits).all()
