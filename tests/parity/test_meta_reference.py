"""Meta's own model (llama-models) on Meta's files, and ours on the same files: how shards are joined, and the logits.

llama-models and fairscale are not dependencies: `pip install --no-deps llama-models==0.3.0 fairscale==0.4.13`. Without
them these tests are skipped.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.meta_files import meta_shards, params_json, write_meta
from checkpoints import multimodal_config, random_tensors

import llama4_quant
from llama4_quant.checkpoint.meta import MetaReader

initialize = pytest.importorskip("fairscale.nn.model_parallel.initialize")
reference = pytest.importorskip("llama_models.llama4.model")
joining = pytest.importorskip("llama_models.checkpoint")
datatypes = pytest.importorskip("llama_models.llama4.datatypes")
arguments = pytest.importorskip("llama_models.llama4.args")

SCOUT_LIKE = multimodal_config(
    interleave_moe_layer_step=1,
    rope_theta=500_000.0,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
)
CONFIGS = {
    "maverick-like": multimodal_config(use_qk_norm=False),
    "scout-like": SCOUT_LIKE,
    "top-2": multimodal_config(num_experts_per_tok=2),
}

TOLERANCE = 2.5e-5
"""Largest difference of fp32 logits, in their standard deviations. A sum of K products is off by about sqrt(K) u,
u = 2^-24: 16 u for K = 256. Four decoder layers have two branches each, of two such products in a row: 16 products, on
both sides, add up to 16 u sqrt(32) = 5.4e-6. The largest of 10^4 normal errors is 4 to 4.5 times that."""


@pytest.fixture(autouse=True)
def single_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """fairscale's groups of one process; the reference allocates with `.cuda()` and changes default dtypes."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    initialize.initialize_model_parallel(1)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        initialize.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def write(folder: Path, config: dict[str, Any], num_ranks: int, *, fused: bool = True) -> Path:
    shards = meta_shards(config, random_tensors(config), num_ranks, fused=fused)
    for shard in shards:  # llama-models does not read them either: it fails on anything but tensors when it joins
        for name in [name for name in shard if name.endswith("_extra_state")]:
            del shard[name]
    return write_meta(folder, params_json(config), shards)


def joined(folder: Path) -> dict[str, torch.Tensor]:
    """All ranks' tensors, joined by llama-models."""
    params = json.loads((folder / "params.json").read_text())
    state = joining.maybe_reshard_state_dict(
        sorted(folder.glob("*.pth")), n_kv_heads=params["n_kv_heads"], moe_num_experts=params["moe_args"]["num_experts"]
    )
    torch.set_default_dtype(torch.float32)
    return state


def meta_model(folder: Path) -> torch.nn.Module:
    args = arguments.ModelArgs(**json.loads((folder / "params.json").read_text()), max_seq_len=64, max_batch_size=2)
    model = reference.Transformer(args)
    missing, unexpected = model.load_state_dict(joined(folder), strict=False)
    assert missing == []
    assert all(name.endswith("global_gate_stats_3E") for name in unexpected)
    return model.float().eval()


def meta_logits(folder: Path, tokens_BT: torch.Tensor, tiles: torch.Tensor | None, image_token: int) -> torch.Tensor:
    model, image = meta_model(folder), None
    if tiles is not None:
        mask = (tokens_BT == image_token).unsqueeze(-1)
        with torch.no_grad():
            # One image of all tiles in the first sequence; none in the second.
            embedding = model.vision_embeddings([[tiles], []], mask, model.tok_embeddings(tokens_BT))
        image = datatypes.MaskedEmbedding(embedding=embedding, mask=mask)
    given = datatypes.TransformerInput(tokens=tokens_BT, tokens_position=0, image_embedding=image)
    return model(given).logits


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_are_joined_as_llama_models_joins_them(tmp_path: Path, num_ranks: int, *, fused: bool) -> None:
    """The state of Meta's model from several files, then written as one file: the reader makes the same of both."""
    config = CONFIGS["maverick-like"]
    folder = write(tmp_path / "ranks", config, num_ranks, fused=fused)
    whole = {
        name: t.flatten(0, 1).clone() if ".experts." in name else t.contiguous() for name, t in joined(folder).items()
    }
    single = write_meta(tmp_path / "single", params_json(config), [whole])
    with MetaReader.open(folder) as several, MetaReader.open(single) as one:
        assert several.tensors.keys() == one.tensors.keys()
        assert several.config == one.config
        for name in one.tensors:
            assert torch.equal(several.read(name), one.read(name)), name


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_metas_model(tmp_path: Path, name: str, *, with_image: bool) -> None:
    config = CONFIGS[name]
    folder = write(tmp_path / "meta", config, 2)
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(0, 89, (2, 30), generator=generator)  # four chunks of 8; the image token is 90
    tiles = None
    if with_image:
        tiles = torch.randn(2, 3, 28, 28, generator=generator)
        tokens_BT[0, 3:11] = config["image_token_index"]  # four positions for each of two tiles
    theirs = meta_logits(folder, tokens_BT, tiles, config["image_token_index"])
    # params.json has no image token; the loader takes the published one, which is beyond this vocabulary.
    hf = json.loads(json.dumps(_hugging_face_config(folder))) | {"image_token_index": config["image_token_index"]}
    ours = _our_logits(tmp_path / "hf", folder, hf, tokens_BT, tiles)
    difference = (ours - theirs).abs().max() / theirs.std()
    assert float(difference) < TOLERANCE


def _hugging_face_config(folder: Path) -> dict[str, Any]:
    with MetaReader.open(folder) as reader:
        return reader.config


def _our_logits(
    out: Path, folder: Path, config: dict[str, Any], tokens_BT: torch.Tensor, tiles: torch.Tensor | None
) -> torch.Tensor:
    """Through `convert --format bf16`, so that the written checkpoint is what is compared."""
    llama4_quant.convert(folder, out, format="bf16")
    (out / "config.json").write_text(json.dumps(config))
    model = llama4_quant.load(out, dtype="float32", attention="eager")
    with torch.no_grad():
        return model(tokens_BT, pixel_values=tiles)
