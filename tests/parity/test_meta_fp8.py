"""meta-fp8 checkpoints in Meta's own loader and model (llama-models), and the same weights in ours.

llama-models and fairscale are not dependencies: `pip install --no-deps llama-models==0.3.0 fairscale==0.4.13`. Without
them these tests are skipped. What of CUDA and FBGEMM is emulated, meta_fp8_worker.py says.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoint.meta_files import meta_shards, params_json, write_meta
from checkpoints import make_checkpoint, multimodal_config, random_tensors, write_checkpoint
from parity.test_meta_reference import SCOUT_LIKE, TOLERANCE
from torch import Tensor

import llama4_quant
from llama4_quant import convert, preset
from llama4_quant.quantizers.quantize import QuantizedWeight, dequantize_weight, quantize_weight

pytest.importorskip("fairscale.nn.model_parallel.initialize")
pytest.importorskip("llama_models.llama4.model")

WORKER = Path(__file__).with_name("meta_fp8_worker.py")
SCHEME = preset("FP8_DYNAMIC", observer="absmax")
CONFIGS = {"maverick-like": multimodal_config(), "scout-like": SCOUT_LIKE}
QUANTIZED = {"maverick-like": (1,), "scout-like": (1, 2)}
"""MoE layers without the first and the last of four layers."""


@dataclass(frozen=True)
class Case:
    """A converted checkpoint, and what Meta's ranks made of it."""

    name: str
    ranks: list[dict[str, dict[str, Tensor]]]
    inputs: dict[str, Tensor]
    folder: Path

    @property
    def tensors(self) -> dict[str, Tensor]:
        return random_tensors(CONFIGS[self.name])


def run_ranks(folder: Path, inputs: Path, scratch: Path, num_ranks: int) -> list[dict[str, dict[str, Tensor]]]:
    outputs = [scratch / f"rank-{rank}.pt" for rank in range(num_ranks)]
    shared = [sys.executable, str(WORKER), str(folder), str(inputs)]
    workers = [
        subprocess.Popen(
            [*shared, str(outputs[rank]), str(scratch / "store"), str(rank), str(num_ranks)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    return [torch.load(path, weights_only=True) for path in outputs]


@pytest.fixture(scope="module", params=[("maverick-like", 1), ("maverick-like", 2), ("scout-like", 2)], ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, num_ranks = request.param
    folder, config = tmp_path_factory.mktemp("meta-fp8"), CONFIGS[name]
    make_checkpoint(folder / "hf", config)
    convert(folder / "hf", folder / "fp8", format="meta-fp8", scheme=SCHEME, model_parallel=num_ranks)
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(0, 89, (2, 30), generator=generator)
    tokens_BT[0, 3:11] = config["image_token_index"]
    inputs = {
        "tokens": tokens_BT,
        "tiles": torch.randn(2, 3, 28, 28, generator=generator),
        "image_mask": (tokens_BT == config["image_token_index"]).unsqueeze(-1),
    }
    torch.save(inputs, folder / "inputs.pt")
    return Case(name, run_ranks(folder / "fp8", folder / "inputs.pt", folder, num_ranks), inputs, folder)


def rank_experts(tensors: dict[str, Tensor], layer: int, rank: int, num_ranks: int) -> dict[str, QuantizedWeight]:
    """Codes [E * out, in] and scales of a rank's experts, quantized from the BF16 weights."""
    base = f"language_model.model.layers.{layer}.feed_forward.experts"
    gate_EDF, up_EDF = tensors[f"{base}.gate_up_proj"].chunk(2, dim=2)
    parts = {
        "w1": gate_EDF.chunk(num_ranks, 2)[rank],
        "w3": up_EDF.chunk(num_ranks, 2)[rank],
        "w2": tensors[f"{base}.down_proj"].chunk(num_ranks, 1)[rank],
    }
    return {key: quantize_weight(part.transpose(1, 2).flatten(0, 1), SCHEME.weights) for key, part in parts.items()}


def test_the_loader_finds_every_weight_of_every_rank(case: Case) -> None:
    """BF16 parameters are the source's, split as fairscale's layers split them; experts are our codes and scales."""
    num_ranks = len(case.ranks)
    expected = meta_shards(CONFIGS[case.name], case.tensors, num_ranks, fused=False)
    spellings = {"w_in_shared_FD": "shared_expert.w1", "w_swiglu_FD": "shared_expert.w3"}
    spellings |= {"w_out_shared_DF": "shared_expert.w2"}
    spellings |= {"moe_w_in_eD_F": "w1", "moe_w_swiglu_eD_F": "w3", "moe_w_out_eF_D": "w2"}
    for rank, found in enumerate(case.ranks):
        parameters = dict(found["parameters"])
        for layer in QUANTIZED[case.name]:
            for key, quantized in rank_experts(case.tensors, layer, rank, num_ranks).items():
                name = f"layers.{layer}.feed_forward.experts.{key}"
                codes, scale = parameters.pop(name), parameters.pop(f"{name}.scale")
                assert codes.dtype == torch.float8_e4m3fn
                assert torch.equal(codes.flatten(0, 1).view(torch.uint8), quantized.codes.view(torch.uint8)), name
                assert torch.equal(scale.view(-1, 1), quantized.scale), name
        shard = {name: t for name, t in expected[rank].items() if "rope.freqs" not in name and "stats" not in name}
        for spelling, tensor in shard.items():
            name = spelling
            for old, new in spellings.items():
                name = name.replace(old, new)
            if name in parameters:
                assert torch.equal(parameters.pop(name).flatten(), tensor.flatten()), name
            else:
                assert any(f"layers.{layer}.feed_forward.experts" in name for layer in QUANTIZED[case.name]), name
        assert parameters == {}


def dequantized(tensors: dict[str, Tensor], layers: tuple[int, ...], num_ranks: int) -> dict[str, Tensor]:
    """The Hugging Face tensors with what the codes and scales of all ranks say, in float32."""
    changed = {name: tensor.float() for name, tensor in tensors.items()}
    for layer in layers:
        base = f"language_model.model.layers.{layer}.feed_forward.experts"
        parts: dict[str, list[Tensor]] = {"w1": [], "w3": [], "w2": []}
        for rank in range(num_ranks):
            for key, quantized in rank_experts(tensors, layer, rank, num_ranks).items():
                weight = dequantize_weight(quantized, torch.float32)
                parts[key].append(weight.unflatten(0, (4, -1)).transpose(1, 2))
        changed[f"{base}.gate_up_proj"] = torch.cat([*parts["w1"], *parts["w3"]], dim=2)
        changed[f"{base}.down_proj"] = torch.cat(parts["w2"], dim=1)
    return changed


def test_logits_equal_those_of_our_runtime_on_the_dequantized_weights(case: Case) -> None:
    tensors = dequantized(case.tensors, QUANTIZED[case.name], len(case.ranks))
    folder = write_checkpoint(case.folder / "dequantized", CONFIGS[case.name], tensors)
    model = llama4_quant.load(folder, dtype="float32", attention="eager")
    with torch.no_grad():
        ours = model(case.inputs["tokens"], pixel_values=case.inputs["tiles"])
    for found in case.ranks:
        difference = (found["logits"] - ours).abs().max() / ours.std()
        assert float(difference) < TOLERANCE
    bf16 = llama4_quant.load(case.folder / "hf", dtype="float32", attention="eager")
    with torch.no_grad():
        unquantized = bf16(case.inputs["tokens"], pixel_values=case.inputs["tiles"])
    assert float((unquantized - ours).abs().max() / ours.std()) > 100 * TOLERANCE  # quantization is seen at all


def test_from_metas_own_layout_with_its_params(tmp_path: Path) -> None:
    """params.json as it was, published spellings, two ranks: the same files as from Hugging Face layout."""
    config = CONFIGS["maverick-like"]
    shards = meta_shards(config, random_tensors(config), 2, fused=True)
    source = write_meta(tmp_path / "meta", params_json(config), shards)
    make_checkpoint(tmp_path / "hf", config)
    convert(source, tmp_path / "from-meta", format="meta-fp8", scheme=SCHEME)
    convert(tmp_path / "hf", tmp_path / "from-hf", format="meta-fp8", scheme=SCHEME, model_parallel=2)
    torch.save({"tokens": torch.arange(60).view(2, 30)}, tmp_path / "inputs.pt")
    logits = []
    for name in ("from-meta", "from-hf"):
        (tmp_path / f"run-{name}").mkdir()
        logits.append(run_ranks(tmp_path / name, tmp_path / "inputs.pt", tmp_path / f"run-{name}", 2)[0]["logits"])
    assert torch.equal(logits[0], logits[1])
