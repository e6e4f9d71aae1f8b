"""One conversion by AutoRound, in its own environment: `python worker_autoround.py JOB.json RESULT.json`.

Needs nothing but auto-round (0.16 was used) and what it brings. The wanted linears are quantized, all others are named
as 16-bit. AutoRound takes Llama4ForConditionalGeneration for a vision-language model and wants a processor; the
tokenizer does for text. It puts an expert's score on its output (`SequentialLlama4TextMoe` in
auto_round/modeling/fused_moe/llama4.py), so its experts are tuned for inputs that they never get.
"""

import json
import os
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch  # noqa: PLC0415 - after the environment is set
    from auto_round import AutoRound  # noqa: PLC0415
    from transformers import AutoTokenizer, Llama4ForConditionalGeneration  # noqa: PLC0415

    started = time.perf_counter()
    model = Llama4ForConditionalGeneration.from_pretrained(job["model"], dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    samples = [json.loads(line)["input_ids"] for line in Path(job["tokens"]).read_text(encoding="utf-8").splitlines()]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.tensor(samples).split(8)]
    target = re.compile(f".*language_model.*{job['target']}")
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    kept = {name: {"bits": 16} for name in linears if not target.match(name)}
    tuner = AutoRound(
        model,
        tokenizer,
        processor=tokenizer,
        scheme="W4A16",
        group_size=job["group_size"],
        iters=job["iters"],
        nsamples=len(samples),
        seqlen=len(samples[0]),
        batch_size=8,
        dataset=batches,
        seed=job["seed"],
        layer_config=kept,
        enable_torch_compile=False,
        device_map="cpu",
    )
    loaded = time.perf_counter()
    output = Path(job["output"])
    tuner.quantize_and_save(str(output), format="llm_compressor")
    done = time.perf_counter()
    if not (output / "config.json").exists():  # it makes a folder of its own inside
        (inner,) = (path.parent for path in output.glob("*/config.json"))
        for path in list(inner.iterdir()):
            path.rename(output / path.name)
        inner.rmdir()
    seconds = {"load": loaded - started, "oneshot": done - loaded}
    result = {"seconds": seconds, "version": version("auto-round"), "threads": torch.get_num_threads()}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
