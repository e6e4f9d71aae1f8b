"""torch.compile takes the whole model as one graph: operators are nodes of it, and experts never break it."""

import pytest
import torch
from runtime.tiny_model import random_ids, random_model, text_config
from torch import Tensor

from llama4_quant.runtime import Llama4Model, Logits
from llama4_quant.runtime.experts import MixtureOfExperts
from llama4_quant.runtime.linear import WeightStorage
from llama4_quant.scheme import Strategy, WeightScheme, WeightType

INT4 = WeightScheme(type=WeightType.INT4, strategy=Strategy.GROUP, group_size=32)
FP8 = WeightScheme(type=WeightType.FP8, strategy=Strategy.CHANNEL)
NUM_STEPS = 3
# A dense layer and one of experts, within one attention chunk; torch's int4 kernel wants sixteens of outputs.
CONFIG = text_config(num_hidden_layers=2, attention_chunk_size=64, vocab_size=112)


def _model(scheme: WeightScheme | None, kernel: str) -> Llama4Model:
    """Quantized weights are random codes; scales make them about as large as weights are."""
    if scheme is None:
        return random_model(CONFIG, torch.bfloat16, kernel=kernel)
    model = Llama4Model(
        CONFIG, scheme_of=lambda name: None if "router" in name else scheme, device="cpu", kernel=kernel
    )
    generator = torch.Generator().manual_seed(0)
    for target in model.plain_targets().values():
        target.copy_(1 + 0.3 * torch.randn(target.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, WeightStorage):
            for name, tensor in module.stored().items():
                _fill(name, tensor, generator)
    model.repack()
    return model


def _fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if name == "weight_packed":
        tensor.random_(-(2**31), 2**31 - 1, generator=generator)
    elif name == "weight_scale":
        tensor.uniform_(0.01, 0.03, generator=generator)
    else:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))


def _run(model: Llama4Model, forward: Llama4Model) -> list[Tensor]:
    """Logits of a whole sequence of a batch, then of a prompt and of tokens one by one."""
    ids = random_ids(2, 9)
    outputs = [forward(ids)]
    cache = model.new_cache(2)
    outputs.append(forward(ids, cache=cache, logits=Logits.LAST))
    outputs += [forward(random_ids(2, 1, seed), cache=cache, logits=Logits.LAST) for seed in range(NUM_STEPS)]
    return outputs


@pytest.mark.parametrize(("scheme", "kernel"), [(None, "auto"), (INT4, "auto"), (FP8, "reference")])
@torch.inference_mode()
def test_one_graph_for_prefill_and_decode(scheme: WeightScheme | None, kernel: str) -> None:
    model = _model(scheme, kernel)
    expected = _run(model, model)
    torch.compiler.reset()
    # aot_eager runs the operators of the graph one by one, so results are the same; fullgraph: a break is an error.
    actual = _run(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@torch.inference_mode()
def test_experts_compile_once_for_any_number_of_tokens() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    model = _model(INT4, "auto")
    moe = next(module for module in model.modules() if isinstance(module, MixtureOfExperts))
    torch.compiler.reset()
    compiled = torch.compile(moe, backend=backend, fullgraph=True, dynamic=True)
    for num_tokens in (1, 2, 5, 33):
        x = torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(num_tokens)).bfloat16()
        assert torch.equal(compiled(x), moe(x))
    assert len(graphs) == 2  # one token, and more
    for graph in graphs:
        called = [str(node.target) for node in graph.graph.nodes if "llama4_quant.grouped_int4" in str(node.target)]
        assert len(called) == 3  # gate, up and down, whatever the number of experts
