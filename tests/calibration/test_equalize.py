"""Equalization: the function stays, bit for bit; columns become alike; verify undoes it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4_quant import convert, load, make_calibration, preset
from llama4_quant.calibration.equalize import Equalizer
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.config import Llama4Config
from llama4_quant.planning.make import make_plan
from llama4_quant.planning.plan import Plan
from llama4_quant.runtime.model import Llama4Model
from llama4_quant.verification.verify import verify

SAMPLE = Path(__file__).parents[2] / "llama4_quant" / "sample" / "model"
SCHEME = preset("W4A16", group_size=64, quantize=["attention"])


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample, the same function, with an outlier channel in each of the three places."""
    folder = tmp_path_factory.mktemp("uneven") / "model"
    shutil.copytree(SAMPLE, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("layers.1.post_attention_layernorm.weight"):
                tensor[7] /= 16
            elif name.endswith(("layers.1.feed_forward.router.weight", "gate_proj.weight", "up_proj.weight")):
                if "layers.1." in name:
                    tensor[:, 7] *= 16
            elif name.endswith("layers.1.feed_forward.experts.gate_up_proj"):
                tensor[:, 7] *= 16
            elif name.endswith("layers.1.self_attn.v_proj.weight"):
                tensor[3] /= 32
            elif name.endswith("layers.1.self_attn.o_proj.weight"):
                tensor[:, [3, 64 + 3]] *= 32  # both queries of key 0
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def planned(reader: CheckpointReader) -> Plan:
    return make_plan(Llama4Config.from_dict(reader.config), SCHEME, reader.tensors)


def equalized_model(folder: Path) -> Llama4Model:
    """A model with every weight replaced by its equalized one."""
    model = load(folder, dtype="float32")
    with CheckpointReader.open(folder) as reader:
        plan = planned(reader)
        schemes = {decision.name: decision.scheme for decision in plan.decisions}
        equalizer = Equalizer(plan, schemes.__getitem__, reader)
        plain = model.plain_targets()
        for decision in plan.decisions:
            linear = decision.linear
            target = plain[decision.name] if linear is None else model.linear_target(linear)["weight"]
            target.copy_(equalizer.factors(decision.name).apply(target.clone()))
    return model


def test_the_function_does_not_change_by_a_bit(uneven: Path) -> None:
    ids = torch.randint(0, 2000, (2, 96), generator=torch.Generator().manual_seed(0))
    source, model = load(uneven, dtype="float32"), equalized_model(uneven)
    assert torch.equal(model(ids), source(ids))
    routers = [m.model.layers[1].feed_forward.router.weight for m in (source, model)]
    assert torch.equal(routers[0][:, 7], routers[1][:, 7] * 16)
    assert torch.equal(routers[0][:, :7], routers[1][:, :7])
    outputs = [m.model.layers[1].self_attn.o_proj.weight for m in (source, model)]
    assert torch.equal(outputs[0][:, 67], outputs[1][:, 67] * 32)


def test_columns_become_alike(uneven: Path) -> None:
    """Of rows of norm 1, no column is off the median by more than the rounding of its factor and the spread it had."""
    model = equalized_model(uneven).model
    for name in ("layers.1.self_attn.o_proj", "layers.1.feed_forward.shared_expert.gate_proj"):
        weight = model.get_submodule(name).weight
        norms = (weight / weight.norm(dim=1, keepdim=True)).norm(dim=0)
        ratio = norms / norms.median()
        assert 1 / 2.9 < float(ratio.min()) <= float(ratio.max()) < 2.9


def test_factors_are_powers_of_two_and_undo_each_other(uneven: Path) -> None:
    with CheckpointReader.open(uneven) as reader:
        plan = planned(reader)
        schemes = {decision.name: decision.scheme for decision in plan.decisions}
        equalizer = Equalizer(plan, schemes.__getitem__, reader)
        base = "language_model.model.layers.1"
        norm = equalizer.factors(f"{base}.post_attention_layernorm.weight").outputs
        router = equalizer.factors(f"{base}.feed_forward.router").inputs
        expert = equalizer.factors(f"{base}.feed_forward.experts.5.gate_proj").inputs
        assert norm is not None
        assert router is not None
        assert expert is not None
        assert torch.equal(norm * router, torch.ones(256))
        assert torch.equal(router, expert)
        assert torch.equal(torch.log2(router), torch.log2(router).round())
        assert float(router[7]) == 1 / 16
        vision = equalizer.factors("vision_model.model.layers.0.self_attn.q_proj")
        assert vision.inputs is None
        assert vision.outputs is None


def test_fp8_is_left_alone(uneven: Path) -> None:
    """A float format has the same relative error at every scale."""
    with CheckpointReader.open(uneven) as reader:
        plan = make_plan(Llama4Config.from_dict(reader.config), preset("FP8_DYNAMIC"), reader.tensors)
        schemes = {decision.name: decision.scheme for decision in plan.decisions}
        equalizer = Equalizer(plan, schemes.__getitem__, reader)
        for decision in plan.decisions:
            factors = equalizer.factors(decision.name)
            assert factors.inputs is None
            assert factors.outputs is None


@pytest.fixture(scope="module")
def converted(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("equalized") / "out"
    calibration = make_calibration("gptq", num_samples=4, max_seq_length=128)
    convert(uneven, out, scheme=SCHEME, calibration=calibration)
    return out


def test_verify_computes_the_factors_again(uneven: Path, converted: Path) -> None:
    found = verify(converted, source=uneven)
    assert found.is_whole, found.problems
    assert max(weight.relative_error for weight in found.distances) < 1


def test_verify_finds_a_kept_weight_that_is_not_the_equalized_one(
    uneven: Path, converted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(converted, out)
    with CheckpointReader.open(out) as reader:
        entry = reader.tensors["language_model.model.layers.1.feed_forward.router.weight"]
    with entry.path.open("r+b") as file:
        file.seek(entry.start + 101)
        byte = file.read(1)[0]
        file.seek(entry.start + 101)
        file.write(bytes([byte ^ 1]))
    problems = verify(out, source=uneven).problems
    assert any("router" in problem.where and "differs from the source" in problem.what for problem in problems)
