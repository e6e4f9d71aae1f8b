"""Meta's files converted by us and by transformers' own script: every tensor, bit for bit.

The script, `src/transformers/models/llama4/convert_llama4_weights_to_hf.py`, is in transformers' repository and in no
package of it: these tests run when LLAMA4_CONVERSION_SCRIPT names a copy. It is written for the published checkpoints
(8 files, hidden size 5120, experts 8192 wide); the test runs it with these numbers replaced by a tiny model's.
"""

import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint.meta_files import meta_shards, params_json, write_meta
from checkpoints import multimodal_config, random_tensors
from safetensors.torch import load_file

from llama4_quant import convert

SCRIPT = os.environ.get("LLAMA4_CONVERSION_SCRIPT")
pytestmark = pytest.mark.skipif(SCRIPT is None, reason="LLAMA4_CONVERSION_SCRIPT does not name transformers' script")

NUM_RANKS = 8
CONFIG = multimodal_config(num_attention_heads=8, num_key_value_heads=8, head_dim=16)
TEXT, VISION = CONFIG["text_config"], CONFIG["vision_config"]


class ConvertedError(Exception):
    """Ends the script where it has all tensors; what follows downloads and generates."""


def tiny_script() -> types.ModuleType:
    """transformers' script, for the tiny model."""
    assert SCRIPT is not None
    text = Path(SCRIPT).read_text()
    width = TEXT["intermediate_size"] // NUM_RANKS
    for found, tiny in ((", 1024)", f", {width})"), (", 5120)", f", {TEXT['hidden_size']})")):
        assert found in text
        text = text.replace(found, tiny)
    module = types.ModuleType("conversion_script")
    exec(compile(text, SCRIPT, "exec"), module.__dict__)

    def text_config(**settings: Any) -> transformers.Llama4TextConfig:
        names = ("vocab_size", "intermediate_size", "head_dim", "bos_token_id", "eos_token_id", "pad_token_id")
        return transformers.Llama4TextConfig(**settings | {name: TEXT[name] for name in names})

    def vision_config(**settings: Any) -> transformers.Llama4VisionConfig:
        names = ("patch_size", "intermediate_size", "projector_input_dim", "projector_output_dim")
        return transformers.Llama4VisionConfig(**settings | {name: VISION[name] for name in names})

    module.Llama4TextConfig, module.Llama4VisionConfig = text_config, vision_config
    return module


def converted_by_transformers(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """The state dict that the script makes and its model accepts."""
    module, converted = tiny_script(), {}

    class Recorder(transformers.Llama4ForConditionalGeneration):
        def load_state_dict(self, state_dict: dict[str, torch.Tensor], *args: Any, **settings: Any) -> None:
            super().load_state_dict(state_dict, *args, **settings)
            converted.update(state_dict)
            raise ConvertedError

    module.Llama4ForConditionalGeneration = Recorder
    with pytest.raises(ConvertedError):
        module.write_model(str(out), str(folder), NUM_RANKS, convert_checkpoints=True)
    return converted


def test_every_tensor_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    shards = meta_shards(CONFIG, tensors, NUM_RANKS, fused=True)
    for shard in shards:  # the script cannot read an empty BytesIO
        for name in [name for name in shard if name.endswith("_extra_state")]:
            del shard[name]
    folder = write_meta(tmp_path / "meta", params_json(CONFIG), shards)
    theirs = converted_by_transformers(folder, tmp_path / "theirs")
    convert(folder, tmp_path / "ours", format="bf16")
    ours = {
        name: t for file in sorted((tmp_path / "ours").glob("*.safetensors")) for name, t in load_file(file).items()
    }
    assert theirs.keys() == ours.keys() == tensors.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor), name
