"""Checkpoints with FP8 KV-cache scales, loaded by transformers through compressed-tensors: names, scales and logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cache_conversions import converted, source
from checkpoints import multimodal_config, text_config
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus, forward_quantize
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from llama4_quant import load
from llama4_quant.ops.reference import round_fp8

FP32_TOLERANCE = 2.5e-5
"""As in test_transformers_quantized.py: the order of sums in four layers, in standard deviations of the logits."""
SHARE_CLOSE = 0.75
"""Share of tokens that must be that close: a key or value that lies on the border of two codes within fp32 rounding
goes up on one side and down on the other. A token has 512 in four layers and so a chance of 0.2 % of one (3.5e-6 each),
which reaches the later tokens of its sequence, and leaves nearly all of 96 alone."""


@pytest.mark.parametrize("multimodal", [False, True])
def test_every_scale_finds_its_place(multimodal: bool, tmp_path: Path) -> None:
    config = multimodal_config() if multimodal else text_config()
    converted(source(tmp_path, config), tmp_path / "out")
    kind = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    theirs, info = kind.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True)
    # compressed-tensors takes the vision tower's attention for one with a cache, since its forward names one. It never
    # uses these scales, and vLLM fails on a checkpoint that has them: they are not written.
    vision = {f"vision_model.model.layers.{n}.self_attn.{kind}_scale" for n in range(2) for kind in "kv"}
    assert set(info["missing_keys"]) == (vision if multimodal else set())
    assert not any(found for problem, found in info.items() if problem != "missing_keys")
    ours = load(tmp_path / "out")
    layers = theirs.language_model.model.layers if multimodal else theirs.model.layers
    for their_layer, our_layer in zip(layers, ours.model.layers, strict=True):
        scales = our_layer.self_attn.cache_scales
        assert scales is not None
        assert (their_layer.self_attn.k_scale.item(), their_layer.self_attn.v_scale.item()) == (
            scales.key,
            scales.value,
        )


@pytest.mark.parametrize("settings", [{}, {"use_qk_norm": False}, {"attention_bias": True}])
def test_logits(settings: dict[str, Any], tmp_path: Path) -> None:
    converted(source(tmp_path, text_config(**settings)), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours = load(tmp_path / "out", dtype="float32")
    ids = torch.randint(3, 90, (6, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(input_ids=ids, use_cache=True).logits
    differences = (ours(ids) - expected).abs().amax(dim=-1).flatten()
    assert float(differences.quantile(SHARE_CLOSE)) <= FP32_TOLERANCE * float(expected.std())
    for layer in ours.model.layers:  # the comparison sees the cache
        layer.self_attn.cache_scales = None
    differences = (ours(ids) - expected).abs().amax(dim=-1).flatten()
    assert float(differences.quantile(1 - SHARE_CLOSE)) > 10 * FP32_TOLERANCE * float(expected.std())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_compressed_tensors(dtype: torch.dtype) -> None:
    x = (torch.randn(1, 2, 300, 16, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    module = nn.Module()
    scale = 0.01031494140625  # a bf16 number; some of x is beyond 448 of it
    module.k_scale = nn.Parameter(torch.tensor([scale], dtype=dtype), requires_grad=False)
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    module.quantization_status = QuantizationStatus.FROZEN
    assert torch.equal(round_fp8(x, scale), forward_quantize(module, x, "k", args))
    assert float(x.abs().max()) > 448 * scale
