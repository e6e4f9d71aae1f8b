"""Builds checkpoints and safetensors files for the tests, sound and damaged, without the package's own writer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG = {"model_type": "llama4"}
INDEX = "model.safetensors.index.json"


def raw_file(header: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """Bytes of a safetensors file with exactly this header; `length` lies about its size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def record(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """One tensor of a header; by default 4 bytes at offset 0."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def single_file(folder: Path, content: bytes) -> Path:
    """A checkpoint whose only weight file has this content."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(content)
    return folder


def sharded(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
    """A checkpoint with these shards and an index, written by the safetensors library."""
    folder.mkdir(exist_ok=True)
    for filename, tensors in shards.items():
        save_file(dict(tensors), folder / filename, metadata={"format": "pt"})
    weight_map = {name: filename for filename, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def two_shards(folder: Path) -> Path:
    """Shards a.safetensors and b.safetensors with tensors `a` (float32 [3, 5]) and `b` (bfloat16 [4, 6, 8])."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 5), torch.randn(4, 6, 8).to(torch.bfloat16)
    return sharded(folder, {"a.safetensors": {"a": a}, "b.safetensors": {"b": b}})


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit agree (NaN payloads included)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    bytes_of = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(*bytes_of)


def num_descriptors() -> int:
    """How many files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every file below `folder`, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
