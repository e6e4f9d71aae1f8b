"""`load(..., lm_head=...)`: the head is quantized from every kind of checkpoint, and nothing else changes."""

from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint, random_tensors, text_config, write_checkpoint
from torch import Tensor

from llama4_quant import convert, load
from llama4_quant.errors import QuantizationError, UsageError
from llama4_quant.ops import Kernel, Operator, reference
from llama4_quant.quantizers.packing import pack_int4
from llama4_quant.quantizers.quantize import quantize_weight
from llama4_quant.runtime import head
from llama4_quant.runtime.linear import Int4Linear, Int8Linear
from llama4_quant.scheme import preset

IDS = torch.tensor([[1, 5, 9, 30]])
KINDS = ["bf16", "tied", "W4A16 while loading", "W4A16 converted"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str | None]]:
    """By kind, a folder and the scheme to load it with."""
    folder = tmp_path_factory.mktemp("heads")
    bf16 = make_checkpoint(folder / "bf16")
    tied = make_checkpoint(folder / "tied", text_config(tie_word_embeddings=True))
    convert(bf16, folder / "int4", scheme="W4A16")
    return dict(zip(KINDS, [(bf16, None), (tied, None), (bf16, "W4A16"), (folder / "int4", None)], strict=True))


def _expected(weight: Tensor, lm_head: str) -> tuple[Tensor, Tensor]:
    scheme = head.head_scheme(lm_head)
    assert scheme is not None
    quantized = quantize_weight(weight, scheme)
    return (pack_int4(quantized.codes) if lm_head == "int4" else quantized.codes), quantized.scale


@pytest.mark.parametrize("lm_head", ["int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_head_is_quantized_and_nothing_else_changes(
    checkpoint: dict[str, tuple[Path, str | None]], kind: str, lm_head: str
) -> None:
    folder, scheme = checkpoint[kind]
    plain = load(folder, scheme, kernel="reference")
    model = load(folder, scheme, kernel="reference", lm_head=lm_head)
    source = plain.model.embed_tokens.weight if plain.lm_head is None else plain.lm_head.weight
    assert type(model.lm_head) is (Int8Linear if lm_head == "int8" else Int4Linear)
    codes, scale = _expected(source, lm_head)
    assert all(map(torch.equal, model.lm_head.stored().values(), (codes, scale)))
    others = {name: value for name, value in plain.state_dict().items() if not name.startswith("lm_head")}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in others.items())
    product = reference.linear_int8 if lm_head == "int8" else reference.linear_int4
    hidden = plain.model(plain.model.embed_tokens(IDS), (0,), None)
    assert torch.equal(model(IDS), product(hidden, codes, scale))


@pytest.mark.parametrize("lm_head", ["int8", "int4"])
def test_head_in_chunks_of_rows(
    checkpoint: dict[str, tuple[Path, str | None]], lm_head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = checkpoint["W4A16 converted"]
    whole = load(folder, lm_head=lm_head, kernel="reference")
    monkeypatch.setattr("llama4_quant.runtime.loader.CHUNK_BYTES", 5000)  # 19 rows of 128 bf16 values
    assert all(map(torch.equal, load(folder, lm_head=lm_head, kernel="reference").parameters(), whole.parameters()))


def test_tied_embeddings_cost_a_copy(checkpoint: dict[str, tuple[Path, str | None]]) -> None:
    folder, _ = checkpoint["tied"]
    plain, model = load(folder), load(folder, lm_head="int8")
    extra = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in plain.parameters())
    assert extra == 96 * 128 + 2 * 96  # a byte a weight, and a bf16 scale a row


def test_head_that_is_quantized_already(checkpoint: dict[str, tuple[Path, str | None]]) -> None:
    folder, _ = checkpoint["bf16"]
    scheme = preset("W4A16", group_size=32, quantize=("lm-head",))
    with pytest.raises(UsageError, match=r"language_model\.lm_head is int4 g32 already; leave out lm_head"):
        load(folder, scheme, lm_head="int8")
    with pytest.raises(UsageError, match="lm_head 'int3' is unknown; use one of int8, int4"):
        load(folder, lm_head="int3")


@pytest.mark.parametrize("lm_head", ["int8", "int4"])
def test_damage_names_the_head(tmp_path: Path, lm_head: str) -> None:
    config = text_config()
    tensors = random_tensors(config)
    tensors["lm_head.weight"][40, 7] = torch.nan
    folder = write_checkpoint(tmp_path / "damaged", config, tensors)
    with pytest.raises(QuantizationError, match="lm_head, rows from 0: row 40, column 7 is nan"):
        load(folder, lm_head=lm_head)


def test_kernels_of_a_model(checkpoint: dict[str, tuple[Path, str | None]]) -> None:
    folder, _ = checkpoint["W4A16 converted"]
    counts = load(folder, lm_head="int8", kernel="reference").kernels()
    assert {(count.operator, count.kernel): count.count for count in counts} == {
        (Operator.LINEAR_DENSE, Kernel.REFERENCE): 4 * 4 + 2 + 1 + 2 * 6 + 3,  # q k v o, routers, vision
        (Operator.LINEAR_INT4, Kernel.REFERENCE): 4 * 3,  # dense MLP or shared expert
        (Operator.GROUPED_INT4, Kernel.REFERENCE): 2 * 3,
        (Operator.LINEAR_INT8, Kernel.REFERENCE): 1,
    }
    with pytest.raises(UsageError, match=r"kernel torch cannot run .*proj: linear_int4 .*float32 on cpu: .*can run"):
        load(folder, kernel="torch", dtype="float32")
