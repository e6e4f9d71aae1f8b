"""GGUF files: `python -m runtime_kit.worker_gguf JOB.json RESULT.json`, in an environment with gguf and cyllama.

Type BF16 or F32: writes a BF16 checkpoint (safetensors) as a GGUF file with the same weights. Type Q4_0 or Q8_0: lets
llama.cpp's own quantizer make one out of a BF16 file. The result lists the tensors with their bytes.

Weights go over as they are: llama.cpp's Llama 4 rotates adjacent pairs, as Hugging Face's does, so queries and keys
need no permutation. Experts are stacked as [E, out, in]; Hugging Face stores the transposed, gate and up in one.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cyllama.llama import llama_cpp as cpp
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from numpy.typing import NDArray

from .loop import read_job

ARCHITECTURE = "llama4"
FILE_TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""`llama_ftype`."""
WHOLE_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "feed_forward.router.weight": "ffn_gate_inp.weight",
    "feed_forward.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "feed_forward.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "feed_forward.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
}
Bits = NDArray[np.uint16]
"""BF16 numbers as their bits: numpy has no such type."""


def main() -> None:
    job = read_job()
    target = Path(job["output"])
    if job["type"] in {"F32", "BF16"}:
        write(Path(job["source"]), target, job["type"])
    else:
        params = cpp.LlamaModelQuantizeParams()
        params.ftype, params.nthread = FILE_TYPES[job["type"]], job["threads"]
        cpp.disable_logging()
        cpp.model_quantize(job["source"], job["output"], params)
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(target).tensors}
    Path(sys.argv[2]).write_text(json.dumps({"tensors": tensors}), encoding="utf-8")


def write(source: Path, target: Path, kind: str) -> None:
    """A checkpoint as a GGUF file; one tensor is in memory at a time."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    writer = GGUFWriter(target, ARCHITECTURE)
    put_metadata(writer, config)
    writer.add_file_type(FILE_TYPES[kind])
    parts = [part for name, bits in tensors_of(source) for part in renamed(name, bits)]
    for name, bits in parts:
        wide = is_wide(name, kind)
        dtype = GGMLQuantizationType.F32 if wide else GGMLQuantizationType.BF16
        stand_in = np.dtype(np.float32) if wide else np.dtype(np.float16)
        writer.add_tensor_info(name, bits.shape, stand_in, stand_in.itemsize * bits.size, raw_dtype=dtype)
    factors = rope_factors(config)
    writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, bits in parts:
        values = np.ascontiguousarray(bits)
        writer.write_tensor_data(as_fp32(values) if is_wide(name, kind) else values.view(np.uint8))
    writer.write_tensor_data(factors)
    writer.close()


def is_wide(name: str, kind: str) -> bool:
    """Stored in fp32: in a BF16 file vectors, as llama.cpp wants them, and routers, as it keeps them."""
    return kind == "F32" or name.endswith(("norm.weight", "gate_inp.weight"))


def put_metadata(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """What llama.cpp asks of a Llama 4; chunk size and query temperature are constants there, with Scout's values."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size_mlp"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def tensors_of(folder: Path) -> Iterator[tuple[str, Bits]]:
    """Every tensor of a BF16 checkpoint, mapped, not read."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                yield name, mapped[start:stop].view(np.uint16).reshape(entry["shape"])


def renamed(name: str, bits: Bits) -> Iterator[tuple[str, Bits]]:
    """A tensor under llama.cpp's name; fused gate and up become two."""
    if name in WHOLE_MODEL:
        yield WHOLE_MODEL[name], bits
        return
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    if rest in IN_LAYER:
        yield f"blk.{layer}.{IN_LAYER[rest]}", bits
        return
    by_output = bits.transpose(0, 2, 1)
    if rest == "feed_forward.experts.gate_up_proj":
        width = by_output.shape[1] // 2
        yield f"blk.{layer}.ffn_gate_exps.weight", by_output[:, :width]
        yield f"blk.{layer}.ffn_up_exps.weight", by_output[:, width:]
        return
    assert rest == "feed_forward.experts.down_proj", name
    yield f"blk.{layer}.ffn_down_exps.weight", by_output


def as_fp32(bits: Bits) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rope_factors(config: dict[str, Any]) -> NDArray[np.float32]:
    """What llama.cpp divides each pair's frequency by: Llama 3's scaling, whose two thresholds are one in Scout."""
    scaling = config["rope_scaling"]
    assert scaling["low_freq_factor"] == scaling["high_freq_factor"]
    exponents = np.arange(0, config["head_dim"], 2, dtype=np.float64) / config["head_dim"]
    wavelengths = 2 * np.pi * config["rope_theta"] ** exponents
    is_slow = wavelengths > scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    return np.where(is_slow, scaling["factor"], 1.0).astype(np.float32)


if __name__ == "__main__":
    main()
