"""One run of the vLLM engine, in vLLM's own environment: `python vllm_worker.py JOB.json RESULT.json`.

Needs nothing but vLLM and torch. The job names a checkpoint and prompts as token ids; the result has, per prompt, the
greedy continuation and the log-probability of every prompt token but the first and of every new token.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes half of the machine's memory
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling the sampler takes longer than all the work
}


def main() -> None:
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams  # noqa: PLC0415  reads the environment when it is imported

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine = LLM(
        model=job["model"],
        dtype=job["dtype"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=job["max_model_len"],
        block_size=job["block_size"],
        override_generation_config={"attn_temperature_tuning": job["attn_temperature_tuning"]},
    )
    settings = SamplingParams(
        temperature=0.0, max_tokens=job["num_new"], ignore_eos=True, detokenize=False, logprobs=0, prompt_logprobs=0
    )
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], settings, use_tqdm=False)
    results = [_result(output.prompt_token_ids, output.prompt_logprobs, output.outputs[0]) for output in outputs]
    Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")


def _result(prompt: list[int], prompt_logprobs: list[Any], completion: Any) -> dict[str, Any]:
    new = list(completion.token_ids)
    return {
        "new_tokens": new,
        "prompt_logprobs": [at[token].logprob for token, at in zip(prompt[1:], prompt_logprobs[1:], strict=True)],
        "new_logprobs": [at[token].logprob for token, at in zip(new, completion.logprobs, strict=True)],
    }


if __name__ == "__main__":
    main()
