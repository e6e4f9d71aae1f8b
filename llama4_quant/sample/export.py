"""Write a trained model as a Hugging Face checkpoint in BF16 shards, and read one back with transformers."""

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Llama4ForConditionalGeneration

from llama4_quant.errors import CheckpointError
from llama4_quant.sample.configuration import MAX_POSITIONS, write_configs
from llama4_quant.sample.tokenizer import save_tokenizer, write_json

_MAX_SHARD_BYTES = 4_000_000


def export(weights: dict[str, Tensor], hub_config: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint; an older one in `folder` is replaced once the new one is complete.

    Args:
        weights: float32 tensors under their checkpoint names; rounded to BF16 here.
        hub_config: config.json.
        tokenizer: the tokenizer the model was trained with.
        folder: where the checkpoint goes.
    """
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    rounded = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    split = split_torch_state_dict_into_shards(rounded, max_shard_size=_MAX_SHARD_BYTES)
    for filename, names in split.filename_to_tensors.items():
        save_file({name: rounded[name] for name in names}, staging / filename, metadata={"format": "pt"})
        (staging / filename).chmod(0o644)  # safetensors leaves it readable by its owner alone
    write_json(
        staging / "model.safetensors.index.json",
        {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))},
    )
    write_configs(hub_config, staging)
    save_tokenizer(tokenizer, staging, max_length=MAX_POSITIONS)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def load_reference(folder: Path) -> Llama4ForConditionalGeneration:
    """Load a checkpoint with unmodified transformers, computing in float32.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape than the config says.
    """
    model, info = Llama4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {name: sorted(found) for name, found in info.items() if found}
    if wrong:
        raise CheckpointError(f"{folder}: the tensors do not match config.json: {wrong}; write the checkpoint again")
    return model.eval()
