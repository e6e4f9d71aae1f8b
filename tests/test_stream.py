"""Reading in pieces: every weight once, at most an expert slice or a chunk at a time, the same bytes as whole."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file

import llama4_quant
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.config import Llama4Config
from llama4_quant.conversion.convert import convert
from llama4_quant.formats.compressed_tensors import encode
from llama4_quant.planning.make import make_plan
from llama4_quant.quantizers.backend import choose_backend
from llama4_quant.quantizers.quantize import quantize_weight
from llama4_quant.runtime import loader
from llama4_quant.scheme import preset
from llama4_quant.stream import encode_piece, quantize_piece, read_pieces

SMALL = 128 * 128 * 2
"""Bytes of 128 rows of 128 bf16 weights: the smallest chunk of the test model's widest common weight."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("stream") / "bf16")


def test_pieces_cover_every_row_once_in_order(source: Path) -> None:
    with CheckpointReader.open(source) as reader:
        plan = make_plan(Llama4Config.from_dict(reader.config), None, reader.tensors)
        for tensor in plan.tensors:
            pieces = list(read_pieces(reader, tensor, chunk_bytes=SMALL))
            for decision in tensor.decisions:
                starts = [(p.row_start, len(p.values)) for p in pieces if p.decision is decision]
                assert starts[0][0] == 0
                assert all(a + n == b for (a, n), (b, _) in pairwise(starts))
                assert sum(starts[-1]) == decision.shape[0]
            assert sum(piece.num_bytes for piece in pieces) == reader.tensors[tensor.spec.name].nbytes


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_chunks_give_the_bytes_of_the_whole_weight(source: Path, scheme: str) -> None:
    chosen = preset(scheme)
    weights = {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}
    with CheckpointReader.open(source) as reader:
        plan = make_plan(Llama4Config.from_dict(reader.config), chosen, reader.tensors)
        name = "language_model.model.layers.0.feed_forward.gate_proj"  # 256 rows: two chunks
        tensor = next(t for t in plan.tensors if t.spec.name == f"{name}.weight")
        pieces = list(read_pieces(reader, tensor, chunk_bytes=SMALL))
    assert len(pieces) == 2
    whole = encode(name, quantize_weight(weights[f"{name}.weight"], chosen.weights))
    filled = {key: torch.zeros_like(value) for key, value in whole.items()}
    for piece in pieces:
        for rows in encode_piece(piece, quantize_piece(piece, choose_backend())):
            filled[rows.name][rows.row_start : rows.row_start + len(rows.values)].copy_(rows.values)
    for key, value in whole.items():
        assert torch.equal(filled[key].view(torch.uint8), value.view(torch.uint8)), key


@pytest.mark.parametrize("scheme", [None, "W4A16"])
def test_reads_are_never_larger_than_one_expert_slice(
    source: Path, tmp_path: Path, scheme: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of converting, and of loading with and without quantization; here each tensor is under one chunk."""
    sizes: list[tuple[int, str]] = []
    read = CheckpointReader._read

    def recorded(self: CheckpointReader, entry: object, *rest: object) -> torch.Tensor:
        values = read(self, entry, *rest)
        sizes.append((values.nbytes, entry.name))
        return values

    monkeypatch.setattr(CheckpointReader, "_read", recorded)
    llama4_quant.load(source, scheme=scheme)
    if scheme is not None:
        convert(source, tmp_path / "out", scheme=scheme)
    experts = [size for size, name in sizes if ".experts." in name]
    assert set(experts) == {128 * 256 * 2, 128 * 128 * 2}  # [in, gate and up] and [in, out] of one expert
    assert len(experts) == (1 if scheme is None else 2) * 2 * 2 * 4  # runs, layers, tensors, experts


def test_quantized_checkpoints_load_in_chunks(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "out", scheme="FP8_BLOCK")
    whole = dict(llama4_quant.load(tmp_path / "out").named_parameters())
    monkeypatch.setattr(loader, "CHUNK_BYTES", 1000)
    for name, parameter in llama4_quant.load(tmp_path / "out").named_parameters():
        assert torch.equal(parameter.view(torch.uint8), whole[name].view(torch.uint8)), name
