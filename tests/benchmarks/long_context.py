"""A prompt of 131,072 tokens on the sample model: seconds, and memory beside what was predicted.

    python tests/benchmarks/long_context.py [--tokens 131072] [--peer-tokens 8192] [--output FILE.json]

The sample's weights with a larger `max_position_embeddings`, bf16, its held-out text again and again. Each row runs in
a process of its own. Cache: bytes allocated at the end, beside what `cache_bytes` says. Peak: VmHWM over what the
process had when the model was loaded and warm, so the cache is in it. Decode: the best of eight tokens after the
prompt. transformers computes a prompt that it can bear, at once, with its own cache.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from synthetic import circumstances

from llama4_quant.sample import SAMPLE_DIR

ROOT = Path(__file__).parents[2]
COMMON = """
import json, re, sys, time
from pathlib import Path
import torch
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
folder, num_tokens, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
from llama4_quant.runtime.tokenizer import Tokenizer
from llama4_quant.sample import HELD_OUT_TEXT
tokens = Tokenizer.from_folder(Path(folder)).encode(HELD_OUT_TEXT.read_text(encoding="utf-8"), bos=True)
ids = torch.tensor([(tokens * (num_tokens // len(tokens) + 1))[:num_tokens]])
"""
OURS = (
    COMMON
    + """
from llama4_quant import load
from llama4_quant.runtime.cache import cache_bytes
from llama4_quant.runtime.cache_formats import CacheDtype
model, kind, steps = load(folder), sys.argv[4], 8
def prefill(ids, capacity):
    cache = model.new_cache(1, capacity, kind)
    return cache, model.prefill(ids, cache=cache, chunk_size=step)
with torch.inference_mode():
    cache, _ = prefill(ids[:, : step + 64], step + 65)
    model(ids[:, :1], cache=cache, logits="last")
    del cache
    before, started = peak(), time.perf_counter()
    cache, logits = prefill(ids, num_tokens + steps)
    seconds, decode = time.perf_counter() - started, []
    assert bool(torch.isfinite(logits).all())
    for column in range(steps):
        started = time.perf_counter()
        model(ids[:, column : column + 1], cache=cache, logits="last")
        decode.append(time.perf_counter() - started)
predicted = cache_bytes(model.config.text, num_tokens + steps, kind=CacheDtype(kind))
report = {"seconds": seconds, "decode": min(decode), "cache": cache.num_bytes, "predicted": predicted}
print(json.dumps(report | {"peak": peak() - before}))
"""
)
THEIRS = (
    COMMON
    + """
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
with torch.inference_mode():
    past = model(input_ids=ids[:, :64], use_cache=True).past_key_values
    model(input_ids=ids[:, :1], past_key_values=past, use_cache=True)
    before, started, decode = peak(), time.perf_counter(), []
    past = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    seconds = time.perf_counter() - started
    for column in range(8):
        started = time.perf_counter()
        model(input_ids=ids[:, column : column + 1], past_key_values=past, use_cache=True)
        decode.append(time.perf_counter() - started)
cache = sum(t.nbytes for layer in past.layers for t in (layer.keys, layer.values))
report = {"seconds": seconds, "decode": min(decode), "cache": cache, "predicted": None}
print(json.dumps(report | {"peak": peak() - before}))
"""
)


def measure(name: str, program: str, folder: Path, num_tokens: int, step: int, kind: str) -> dict[str, Any]:
    command = [sys.executable, "-c", program, str(folder), str(num_tokens), str(step), kind]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        return {"name": name, "tokens": num_tokens, "problem": done.stderr.strip().splitlines()[-1][:100]}
    return {"name": name, "tokens": num_tokens, **json.loads(done.stdout.splitlines()[-1])}


def show(row: dict[str, Any]) -> str:
    if "problem" in row:
        return f"{row['name']:14} {row['tokens']:>8,} {row['problem']}"
    predicted = "" if row["predicted"] is None else f"{row['predicted']:,}"
    return (
        f"{row['name']:14} {row['tokens']:>8,} {row['seconds']:8.1f} {row['tokens'] / row['seconds']:9,.0f} "
        f"{row['decode'] * 1e3:10.1f} {row['cache']:14,} {predicted:>14} {row['peak'] / 2**20:9,.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--peer-tokens", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens computed at a time")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    print(f"{'':14} {'tokens':>8} {'s':>8} {'tokens/s':>9} {'decode, ms':>10}", end=" ")
    print(f"{'cache bytes':>14} {'predicted':>14} {'peak MiB':>9}")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        shutil.copytree(SAMPLE_DIR, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["text_config"]["max_position_embeddings"] = max(options.tokens, options.peer_tokens)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        found = []
        for name, program, num_tokens, kind in (
            ("ours, bf16", OURS, options.tokens, "bf16"),
            ("ours, fp8", OURS, options.tokens, "fp8"),
            ("ours, int8", OURS, options.tokens, "int8"),
            ("ours, bf16", OURS, options.peer_tokens, "bf16"),
            ("transformers", THEIRS, options.peer_tokens, ""),
        ):
            found.append(measure(name, program, folder, num_tokens, options.chunk, kind))
            print(show(found[-1]), flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(circumstances() | {"rows": found}, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(row.get("predicted") not in {None, row.get("cache")} for row in found))


if __name__ == "__main__":
    main()
