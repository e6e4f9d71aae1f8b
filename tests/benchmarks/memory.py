"""Peak memory of a conversion against its cap, for a checkpoint with one huge tensor of experts.

    python tests/benchmarks/memory.py                       # [128, 5120, 16384] in BF16: 21.5 GB, in a sparse file
    python tests/benchmarks/memory.py --caps 1GiB 2GiB --scheme FP8_DYNAMIC --output memory.json

The source is a sparse file: it takes no room, and reads as zeros. The output is real: about 9 GB for W4A16 and 17 GB
for FP8. Every conversion runs in a process of its own, and its peak resident memory (VmHWM) is taken over what the
process had after importing torch. All files are deleted.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llama4_quant.architecture import Llama4Config, tensor_specs
from llama4_quant.checkpoint.header import encode_header

CHILD = """
import json, re, sys
from pathlib import Path
import torch
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
baseline = peak()
import time
from llama4_quant import convert, preset
source, out, scheme, observer, storage, cap, workers = sys.argv[1:]
started = time.perf_counter()
cap = None if cap == "smallest" else cap
chosen = preset(scheme, observer=observer)
if cap is None:
    from llama4_quant.convert import dry_run
    cap = dry_run(source, scheme=chosen, format=storage).memory.smallest
report = convert(source, out, scheme=chosen, format=storage, max_memory=cap, workers=int(workers) or None)
print(json.dumps({
    "cap_bytes": report.memory.limit, "predicted_bytes": report.memory.predicted,
    "workers": report.memory.num_workers, "peak_bytes": peak() - baseline,
    "baseline_bytes": baseline, "seconds": time.perf_counter() - started,
}))
"""


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    """One MoE layer, and as little else as the architecture allows (Meta's layout: as the format allows)."""
    hidden, is_meta = options.hidden, options.format == "meta-fp8"
    return {
        "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "vocab_size": 128, "hidden_size": hidden,
        "intermediate_size": options.intermediate, "intermediate_size_mlp": options.intermediate,
        "num_hidden_layers": 3 if is_meta else 1, "interleave_moe_layer_step": 2 if is_meta else 1,
        "num_attention_heads": hidden // 128 if is_meta else 2, "num_key_value_heads": hidden // 128 if is_meta else 1,
        "head_dim": 128, "num_local_experts": options.experts, "num_experts_per_tok": 1, "attention_chunk_size": 8192,
        "use_qk_norm": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "floor_scale": 8192, "attn_scale": 0.1,
        "attn_temperature_tuning": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def make_sparse(folder: Path, config: dict[str, Any]) -> int:
    """A checkpoint of zeros that takes no room; returns the bytes of its largest tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    specs = tensor_specs(Llama4Config.from_dict(config))
    header = encode_header((spec.name, torch.bfloat16, spec.shape, 2 * spec.num_weights) for spec in specs)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(2 * spec.num_weights for spec in specs))
    return max(2 * spec.num_weights for spec in specs)


def measure(source: Path, out: Path, options: argparse.Namespace, cap: str) -> dict[str, Any]:
    """Convert in a process of its own."""
    arguments = [source, out, options.scheme, options.observer, options.format, cap, options.workers]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)], check=False, capture_output=True, text=True
    )
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Peak memory of a conversion against its cap.")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--observer", default="absmax")
    parser.add_argument("--format", default="compressed-tensors")
    parser.add_argument("--caps", nargs="+", default=["smallest", "1GiB", "2GiB"])
    parser.add_argument("--workers", type=int, default=0, help="0: one for each core")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    return parser.parse_args()


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="llama4-quant-memory-") as name:
        source, out = Path(name) / "source", Path(name) / "out"
        largest = make_sparse(source, config_of(options))
        print(f"largest tensor {largest / 1e9:.1f} GB; {options.scheme}, {options.observer}; {cpu_name()}")
        print(f"{'cap MiB':>9} {'predicted MiB':>14} {'measured MiB':>13} {'workers':>8} {'seconds':>8}")
        rows = []
        for cap in options.caps:
            row = measure(source, out, options, cap)
            rows.append(row)
            sizes = [row[key] / 2**20 for key in ("cap_bytes", "predicted_bytes", "peak_bytes")]
            print(
                f"{sizes[0]:9.0f} {sizes[1]:14.0f} {sizes[2]:13.0f} {row['workers']:8} {row['seconds']:8.1f}",
                flush=True,
            )
    if options.output is not None:
        facts = {"largest_tensor_bytes": largest, "scheme": options.scheme, "observer": options.observer}
        stamp = {"when": time.strftime("%Y-%m-%d"), "machine": cpu_name(), "torch": torch.__version__}
        options.output.write_text(json.dumps({**stamp, **facts, "rows": rows}, indent=1) + "\n")


def cpu_name() -> str:
    """The processor, as Linux calls it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else "unknown processor"


if __name__ == "__main__":
    main()
