"""One model-parallel rank of Meta's own model on a meta-fp8 checkpoint, loaded by Meta's own loader, on a CPU.

    python meta_fp8_worker.py FOLDER INPUTS OUTPUTS STORE RANK NUM_RANKS

INPUTS holds `tokens` and perhaps `image_mask` and `tiles`; OUTPUTS gets the logits and every parameter of the rank.

The loader wants CUDA and FBGEMM. Moves to a GPU are made moves to the CPU. Two of FBGEMM's operators are emulated:
weights are used as their codes and scales say, activations are left as they are, so that the logits say something
about the checkpoint alone. Everything else is llama-models 0.3.0: which files are read, by which names, how tensors are
viewed and transposed, and which layers are FP8.
"""

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from fairscale.nn.model_parallel.initialize import initialize_model_parallel
from llama_models.checkpoint import maybe_reshard_state_dict
from llama_models.datatypes import QuantizationMode
from llama_models.llama4.args import ModelArgs
from llama_models.llama4.datatypes import MaskedEmbedding, TransformerInput
from llama_models.llama4.model import Transformer
from llama_models.llama4.quantization.loader import convert_to_quantized_model
from torch import Tensor

to, tensor = Tensor.to, torch.tensor


def on_cpu(device: object) -> object:
    is_cuda = isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
    return torch.device("cpu") if is_cuda else device


def to_cpu(self: Tensor, *args: Any, **settings: Any) -> Tensor:
    return to(self, *map(on_cpu, args), **{name: on_cpu(value) for name, value in settings.items()})


def tensor_on_cpu(*args: Any, **settings: Any) -> Tensor:
    return tensor(*args, **{name: on_cpu(value) for name, value in settings.items()})


def leave_alone(rows: Tensor, num_tokens: Tensor | None = None, scale_ub: Tensor | None = None) -> list[Tensor]:
    """Instead of FBGEMM's quantize_fp8_per_row."""
    assert scale_ub is not None
    assert scale_ub.tolist() == [1200.0]
    return [rows, torch.ones(rows.shape[:-1])]


def rowwise_batched(rows_EGK: Tensor, codes_ENK: Tensor, scale_EG: Tensor, weight_scale_EN: Tensor) -> Tensor:
    """FBGEMM's f8f8bf16_rowwise_batched, in the precision of the activations."""
    assert codes_ENK.dtype == torch.float8_e4m3fn
    assert weight_scale_EN.dtype == torch.float32
    assert codes_ENK.is_contiguous()
    assert weight_scale_EN.shape == codes_ENK.shape[:2]
    weight_ENK = codes_ENK.float() * weight_scale_EN.unsqueeze(-1)
    return (rows_EGK * scale_EG.unsqueeze(-1)) @ weight_ENK.transpose(1, 2).to(rows_EGK.dtype)


def emulate() -> torch.library.Library:
    Tensor.cuda = lambda self: self
    Tensor.to = to_cpu
    torch.tensor = tensor_on_cpu
    for name in ("fbgemm_gpu", "fbgemm_gpu.experimental", "fbgemm_gpu.experimental.gen_ai"):
        sys.modules[name] = types.ModuleType(name)
    library = torch.library.Library("fbgemm", "FRAGMENT")
    library.define("quantize_fp8_per_row(Tensor rows, Tensor? num_tokens=None, Tensor? scale_ub=None) -> Tensor[]")
    library.define("f8f8bf16_rowwise_batched(Tensor x, Tensor w, Tensor xs, Tensor ws) -> Tensor")
    library.impl("quantize_fp8_per_row", leave_alone, "CPU")
    library.impl("f8f8bf16_rowwise_batched", rowwise_batched, "CPU")
    return library


def build(folder: Path) -> torch.nn.Module:
    """As `Llama4.build` of llama-models does it, without a tokenizer."""
    args = ModelArgs(**json.loads((folder / "params.json").read_text()), max_seq_len=64, max_batch_size=2)
    state = maybe_reshard_state_dict(
        sorted(folder.glob("*.pth")), n_kv_heads=args.n_kv_heads, moe_num_experts=args.moe_args.num_experts
    )
    torch.set_default_dtype(torch.bfloat16)
    model = Transformer(args)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == unexpected == [], (missing, unexpected)
    return convert_to_quantized_model(model, str(folder), QuantizationMode.fp8_mixed, use_rich_progress=False).eval()


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter; codes and scales of quantized ones."""
    found = {}
    for name, parameter in model.named_parameters():
        if type(parameter) is torch.nn.Parameter:
            found[name] = parameter.detach().clone()
        else:
            found |= {name: parameter.weight, f"{name}.scale": parameter.scale}
    return found


def logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter:
            parameter.data = parameter.data.float()
    tokens, image = inputs["tokens"], None
    if "tiles" in inputs:
        with torch.no_grad():
            embedding = model.vision_embeddings(
                [[inputs["tiles"]], []], inputs["image_mask"], model.tok_embeddings(tokens)
            )
        image = MaskedEmbedding(embedding=embedding, mask=inputs["image_mask"])
    return model(TransformerInput(tokens=tokens, tokens_position=0, image_embedding=image)).logits


def main(folder: str, inputs: str, outputs: str, store: str, rank: str, num_ranks: str) -> None:
    torch.set_num_threads(1)
    rendezvous = torch.distributed.FileStore(store, int(num_ranks))
    torch.distributed.init_process_group("gloo", store=rendezvous, rank=int(rank), world_size=int(num_ranks))
    initialize_model_parallel(int(num_ranks))
    library = emulate()
    model = build(Path(folder))
    found = parameters(model)
    found_logits = logits(model, torch.load(inputs, weights_only=True))
    torch.save({"parameters": found, "logits": found_logits}, outputs)
    torch.distributed.barrier()
    library._destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
