"""Peak memory of a calibrated conversion against its prediction, at the width of Llama 4's experts.

    python tests/benchmarks/calibration_memory.py
    python tests/benchmarks/calibration_memory.py --scheme FP8_DYNAMIC --algorithms gptq --output memory.json

One MoE layer whose experts are [8192, 5120] and [5120, 8192], as Scout's and Maverick's; few of them, and few tokens,
because neither is held in memory. Weights are random BF16. Every conversion runs in a process of its own, with
--max-memory as predicted; its peak resident memory (VmHWM) is taken over what it had after importing torch.
Takes some minutes, and 3 GB of disk.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from llama4_quant.architecture import Llama4Config, tensor_specs
from llama4_quant.sample import SAMPLE_DIR

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
CHILD = """
import json, re, sys, time
from pathlib import Path
import torch
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
baseline = peak()
from llama4_quant.calibration.settings import make_calibration
from llama4_quant.conversion.convert import convert
from llama4_quant.conversion.dry_run import dry_run
from llama4_quant.scheme import preset
source, out, data, scheme, group_size, algorithm, length, *quantize = sys.argv[1:]
group = {} if scheme != "W4A16" else {"group_size": int(group_size)}
scheme = preset(scheme, quantize=quantize, **group)
calibration = make_calibration(algorithm, data=[data], max_seq_length=int(length))
cap = dry_run(source, scheme=scheme, calibration=calibration, workers=1, max_memory="100GiB").memory.smallest
started = time.perf_counter()
report = convert(source, out, scheme=scheme, calibration=calibration, workers=1, max_memory=cap)
print(json.dumps({
    "predicted_bytes": report.memory.predicted, "cap_bytes": cap, "peak_bytes": peak() - baseline,
    "seconds": round(time.perf_counter() - started, 1),
}))
"""


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    """One MoE layer with real attention."""
    hidden = options.hidden
    return {
        "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "vocab_size": options.vocabulary,
        "hidden_size": hidden, "intermediate_size": options.intermediate, "intermediate_size_mlp": options.intermediate,
        "num_hidden_layers": 1, "interleave_moe_layer_step": 1, "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(1, hidden // 640), "head_dim": 128, "num_local_experts": options.experts,
        "num_experts_per_tok": 1, "attention_chunk_size": 8192, "use_qk_norm": True, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "floor_scale": 8192, "attn_scale": 0.1, "attn_temperature_tuning": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def make_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Random BF16 weights, one shard for each tensor so that one is in memory at a time."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        shutil.copy(SAMPLE_DIR / name, folder)
    weight_map = {}
    for number, spec in enumerate(specs := tensor_specs(Llama4Config.from_dict(config)), 1):
        filename = f"model-{number:05d}-of-{len(specs):05d}.safetensors"
        values = torch.empty(spec.shape, dtype=torch.bfloat16)
        inputs = spec.shape[-2] if len(spec.shape) == 3 else spec.shape[-1]
        for part in values.view(-1).split(1 << 24):
            part.copy_(torch.randn(len(part)) * inputs**-0.5 if len(spec.shape) > 1 else torch.ones(len(part)))
        save_file({spec.name: values}, folder / filename, metadata={"format": "pt"})
        weight_map[spec.name] = filename
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Peak memory of a calibrated conversion against its prediction.")
    parser.add_argument("--experts", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=256, help="with --quantize lm-head: 202048 in Llama 4")
    parser.add_argument("--num-samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--quantize", nargs="*", default=[], help="attention, lm-head, for more and longer work")
    parser.add_argument("--algorithms", nargs="+", default=["gptq", "best"])
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    return parser.parse_args()


def main() -> None:
    options = parse()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="llama4-quant-calibration-memory-") as name:
        source, out, data = Path(name) / "source", Path(name) / "out", Path(name) / "tokens.jsonl"
        make_checkpoint(source, config_of(options))
        tokens = np.random.default_rng(0).integers(3, 256, (options.num_samples, options.length)).tolist()
        data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tokens))
        print(f"{options.scheme}, hidden {options.hidden}, intermediate {options.intermediate}")
        print(f"{'algorithm':>10} {'predicted MiB':>14} {'measured MiB':>13} {'seconds':>8}", flush=True)
        for algorithm in options.algorithms:
            arguments = (source, out, data, options.scheme, options.group_size, algorithm, options.length)
            arguments = (*arguments, *options.quantize)
            done = subprocess.run(
                [sys.executable, "-c", CHILD, *map(str, arguments)], check=False, capture_output=True, text=True
            )
            if done.returncode != 0:
                sys.exit(done.stderr)
            row = {"algorithm": algorithm, **json.loads(done.stdout.splitlines()[-1])}
            shutil.rmtree(out)
            rows.append(row)
            predicted, measured = (row[key] / 2**20 for key in ("predicted_bytes", "peak_bytes"))
            print(f"{algorithm:>10} {predicted:14.0f} {measured:13.0f} {row['seconds']:8}", flush=True)
    if options.output is not None:
        facts = {key: getattr(options, key) for key in ("scheme", "group_size", "hidden", "intermediate", "experts")}
        stamp = {"when": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        options.output.write_text(json.dumps({**stamp, **facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
