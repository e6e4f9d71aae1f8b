"""A model whose routed experts stay in the file computes what the same model in memory computes, bit by bit."""

import gc
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint, text_config

from llama4_quant import convert
from llama4_quant.errors import UsageError
from llama4_quant.ops import Kernel, native
from llama4_quant.runtime import Llama4Model
from llama4_quant.runtime.expert_cache import CachedExperts
from llama4_quant.runtime.expert_store import MappedExperts
from llama4_quant.runtime.experts import MixtureOfExperts
from llama4_quant.runtime.generate import generate
from llama4_quant.runtime.loader import load
from llama4_quant.runtime.offload import OffloadedExperts
from llama4_quant.runtime.sampling import GenerationSettings
from llama4_quant.sample import SAMPLE_DIR

SCHEMES = ("BF16", "W4A16", "FP8_DYNAMIC", "FP8_BLOCK")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("offload-runs")
    source = make_checkpoint(root / "source", text_config())
    for scheme in SCHEMES[1:]:
        convert(source, root / scheme, scheme=scheme, max_shard_size="100KB")
    return {"BF16": source} | {scheme: root / scheme for scheme in SCHEMES[1:]}


@torch.inference_mode()
def logits(model: Llama4Model) -> torch.Tensor:
    """Of a prompt in two rows, then of tokens one by one."""
    ids = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2)
    found = [model(ids[:, :20], cache=cache), *(model(ids[:, [at]], cache=cache) for at in range(20, 24))]
    alone = model.new_cache(1)
    found += [model(ids[:1, [at]], cache=alone).expand(2, -1, -1) for at in range(4)]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(
    ("dtype", "kernel"), [("bfloat16", "reference"), ("float32", "reference"), ("bfloat16", "native")]
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_model_in_memory(
    folders: dict[str, Path], scheme: str, dtype: str, kernel: str
) -> None:
    if kernel == "native" and native.probe() is not None:
        pytest.skip(f"no compiled kernels: {native.probe()}")
    folder = folders[scheme]
    # The order of a matrix product's sums is the kernel's affair: the same kernel for both.
    expected = logits(load(folder, dtype=dtype, kernel=kernel))
    for expert_cache in (None, "200KB", "10MiB"):
        model = load(folder, dtype=dtype, kernel=kernel, offload="experts", expert_cache=expert_cache)
        assert isinstance(model.expert_store, CachedExperts if expert_cache or scheme == "BF16" else MappedExperts)
        assert torch.equal(logits(model), expected)


def test_experts_take_no_memory(folders: dict[str, Path]) -> None:
    resident, offloaded = load(folders["W4A16"]), load(folders["W4A16"], offload="experts")
    experts = [m.experts for m in resident.modules() if isinstance(m, MixtureOfExperts)]
    in_experts = sum(parameter.nbytes for module in experts for parameter in module.parameters())
    sizes = [sum(parameter.nbytes for parameter in model.parameters()) for model in (resident, offloaded)]
    assert sizes[0] - sizes[1] == in_experts > 0


def test_auto_takes_a_kernel_that_runs_stored_bytes(folders: dict[str, Path]) -> None:
    model = load(folders["W4A16"], offload="experts")
    choices = [c for m in model.modules() if isinstance(m, OffloadedExperts) for c in m.choices.values()]
    assert choices
    assert not any(choice.repacks for choice in choices)
    assert sum(count.count for count in model.kernels()) >= len(choices)
    with pytest.raises(UsageError, match="another order of bytes than the file's"):
        load(folders["W4A16"], offload="experts", kernel=Kernel.TORCH)


def test_the_next_layer_is_guessed_and_a_guess_is_never_more_than_that() -> None:
    model = load(SAMPLE_DIR, offload="experts", expert_cache="2MB", kernel="reference")
    resident = load(SAMPLE_DIR, kernel="reference")
    prompt = torch.arange(100, 130)[None]
    settings = GenerationSettings(max_new_tokens=32, eos_token_ids=())
    assert (
        generate(model, prompt, settings=settings).new_token_ids
        == generate(resident, prompt, settings=settings).new_token_ids
    )
    store = model.expert_store
    assert isinstance(store, CachedExperts)
    assert 0 < store.counts.num_hits < store.counts.num_used


def test_files_are_closed_with_the_model(folders: dict[str, Path]) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()
    before = open_files()
    model = load(folders["W4A16"], offload="experts")
    logits(model)
    assert open_files() > before
    del model
    gc.collect()
    assert open_files() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload": "layers"}, "unknown; what can be left in the file is 'experts'"),
        ({"expert_cache": "1GiB"}, "add --offload experts"),
        ({"offload": "experts", "scheme": "W4A16"}, "convert the checkpoint first"),
        ({"offload": "experts", "expert_cache": "100"}, r"an expert takes .* --expert-cache"),
        ({"offload": "experts", "expert_cache": "much"}, "is not a size"),
    ],
)
def test_settings_that_make_no_sense(folders: dict[str, Path], settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(folders["BF16"], **settings)
