"""One conversion by llm-compressor, in its own environment: `python worker_llmcompressor.py JOB.json RESULT.json`.

Needs nothing but llm-compressor and what it brings. The job names the BF16 checkpoint, the file of tokens and a recipe;
the result says how long loading, `oneshot` and saving took. A recipe is a list of modifiers by class name with their
arguments; the mappings "per-layer" of AWQ and SmoothQuant are worked out here, since the ones llm-compressor has for
Llama 4 do not match a model with dense and MoE layers.
"""

import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODIFIERS = {
    "QuantizationModifier": "llmcompressor.modifiers.quantization",
    "GPTQModifier": "llmcompressor.modifiers.gptq",
    "AWQModifier": "llmcompressor.modifiers.transform.awq",
    "SmoothQuantModifier": "llmcompressor.modifiers.transform.smoothquant",
    "AutoRoundModifier": "llmcompressor.modifiers.autoround",
}

Mapping = tuple[str, list[str]]
"""A module's name, and the names of those that its output is the input of."""


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch  # noqa: PLC0415 - after the environment is set
    from datasets import Dataset  # noqa: PLC0415
    from llmcompressor import oneshot  # noqa: PLC0415
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe  # noqa: PLC0415
    from llmcompressor.pipelines.cache import IntermediatesCache  # noqa: PLC0415
    from transformers import AutoTokenizer, Llama4ForConditionalGeneration  # noqa: PLC0415

    if not torch.accelerator.is_available():
        # AWQ of 0.14 pins memory before it looks for a GPU, and fails without one. It changes no number.
        IntermediatesCache.pin_memory = lambda *_: None
    torch.manual_seed(job["seed"])
    clock = Stopwatch()
    with load_quantizable_moe(Llama4ForConditionalGeneration):
        model = Llama4ForConditionalGeneration.from_pretrained(job["model"], dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    clock.lap("load")
    samples = [json.loads(line)["input_ids"] for line in Path(job["tokens"]).read_text(encoding="utf-8").splitlines()]
    masks = [[1] * len(sample) for sample in samples]
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict({"input_ids": samples, "attention_mask": masks}),
        recipe=[modifier(name, arguments, model) for name, arguments in job["recipe"]],
        num_calibration_samples=len(samples),
        max_seq_length=len(samples[0]),
        shuffle_calibration_samples=False,
        **job["oneshot"],
    )
    clock.lap("oneshot")
    model.save_pretrained(job["output"], save_compressed=True)
    clock.lap("save")
    result = {"seconds": clock.laps, "version": version("llmcompressor"), "threads": torch.get_num_threads()}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


class Stopwatch:
    """Wall time of each step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def modifier(name: str, arguments: dict[str, Any], model: Any) -> Any:
    """An instance of a modifier."""
    kind = getattr(importlib.import_module(MODIFIERS[name]), name)
    if arguments.get("mappings") == "per-layer":
        spell = SPELLINGS[name]
        arguments = arguments | {"mappings": [spell(*mapping) for mapping in per_layer(model)]}
        if name == "SmoothQuantModifier":  # it takes no linear before a linear
            norms = [m for m in per_layer(model) if m[0].endswith("norm")]
            arguments = arguments | {"mappings": [spell(*mapping) for mapping in norms]}
    return kind(**arguments)


def per_layer(model: Any) -> list[Mapping]:
    """Every pair whose scales can be exchanged without changing the function, layer by layer."""
    names = [name for name, _ in model.named_modules()]
    mappings: list[Mapping] = []
    for layer in [name for name in names if re.search(r"language_model\.model\.layers\.\d+$", name)]:
        inside = [name for name in names if name.startswith(f"{layer}.")]
        attention = [f"{layer}.self_attn.{p}_proj" for p in "qkv"]
        mlp_inputs = [n for n in inside if ".feed_forward" in n and n.endswith(("router", "gate_proj", "up_proj"))]
        mappings.append((f"{layer}.input_layernorm", attention))
        mappings.append((f"{layer}.self_attn.v_proj", [f"{layer}.self_attn.o_proj"]))
        mappings.append((f"{layer}.post_attention_layernorm", mlp_inputs))
        ups = [name for name in mlp_inputs if name.endswith("up_proj")]
        mappings += [(up, [up.removesuffix("up_proj") + "down_proj"]) for up in ups]
    return mappings


def _exactly(name: str) -> str:
    return f"re:^{re.escape(name)}$"


def _awq(smooth: str, balance: list[str]) -> Any:
    from llmcompressor.modifiers.transform.awq import AWQMapping  # noqa: PLC0415

    return AWQMapping(_exactly(smooth), [_exactly(name) for name in balance])


def _smoothquant(smooth: str, balance: list[str]) -> Any:
    return [[_exactly(name) for name in balance], _exactly(smooth)]


SPELLINGS: dict[str, Callable[[str, list[str]], Any]] = {"AWQModifier": _awq, "SmoothQuantModifier": _smoothquant}


if __name__ == "__main__":
    main()
