"""Does the real vLLM engine read and run our checkpoints as our own runtime does?

    python tests/parity/vllm_dense.py --vllm-python PATH_TO_PYTHON_OF_AN_ENVIRONMENT_WITH_VLLM

Trains a small dense Llama 4, converts it with attention quantized, lets vLLM (its CPU build will do) and our runtime
continue the same prompts greedily, and compares texts and log-probabilities. See docs/vllm.md. Not a test that
pytest collects: vLLM wants an environment of its own.

Differences are measured in sigmas, the standard deviation that rounding alone gives two correct engines
(vllm_rounding.py). The script passes if, for every checkpoint:

- texts are the same, or part first at a near tie: our logits of the two engines' choices are within NEAR_TIE_SIGMAS;
- the log-probabilities of all prompt tokens, and of new tokens up to there, differ by at most MAX_RMS_SIGMAS in root
  mean square, and none by more than MAX_SIGMAS;
- MIN_DECIDED of the new tokens are no near ties;
- and, as a check of the check, our logits of the *unquantized* model fail the second test against vLLM's quantized one.

FP8 in BF16 arithmetic is left out of the last: rounding activations to FP8 turns BF16's noise into about as much as the
quantization itself. Hence FP8 also runs in float32, where it does not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import vllm_model
from vllm_compare import HEADER, Continuation, Verdict, compare
from vllm_rounding import Rounding, hidden_noise

from llama4_quant.conversion.convert import convert
from llama4_quant.runtime.loader import load
from llama4_quant.runtime.model import Llama4Model
from llama4_quant.scheme import Scheme, SchemeName, preset

BLOCK_SIZE = 32
"""Tokens per block of vLLM's KV cache; it has to divide the attention chunk."""

WORKER = Path(__file__).with_name("vllm_worker.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One checkpoint in one compute dtype; `scheme` None is the BF16 checkpoint."""

    name: str
    scheme: Scheme | None
    dtype: str = "bfloat16"

    @property
    def label(self) -> str:
        return self.name if self.dtype == "bfloat16" else f"{self.name}, {self.dtype}"

    @property
    def has_fp8_activations(self) -> bool:
        return self.scheme is not None and self.scheme.name == SchemeName.FP8_DYNAMIC

    @property
    def has_control(self) -> bool:
        return self.scheme is not None and not (self.has_fp8_activations and self.dtype == "bfloat16")


def cases() -> tuple[Case, ...]:
    """vLLM's CPU kernel for int4 does not do float32."""
    roles = ("attention",)
    sizes = {"g32": 32, "g64": 64, "g128": 128, "channel": -1}
    fp8 = preset("FP8_DYNAMIC", quantize=roles)
    return (
        Case(name="bf16", scheme=None),
        *(
            Case(name=f"w4a16-{k}", scheme=preset("W4A16", group_size=size, quantize=roles))
            for k, size in sizes.items()
        ),
        Case(name="fp8-dynamic", scheme=fp8),
        Case(name="fp8-dynamic", scheme=fp8, dtype="float32"),
    )


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.work is not None:
        sys.exit(run(arguments, arguments.work))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(arguments, Path(folder)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, required=True, help="python of an environment that has vLLM")
    parser.add_argument("--work", type=Path, help="keep checkpoints here, and use the trained model that is here")
    parser.add_argument("--steps", type=int, default=240, help="training steps (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=12, help="number of prompts (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    return parser.parse_args()


def run(arguments: argparse.Namespace, work: Path) -> int:
    """All cases; returns the exit code."""
    work.mkdir(parents=True, exist_ok=True)
    source = work / "bf16"
    if not (source / "config.json").exists():
        loss = vllm_model.train(source, arguments.steps)
        print(f"trained a dense Llama 4 for {arguments.steps} steps: {loss:.3f} nats per byte", flush=True)
    prompts = vllm_model.prompts(arguments.prompts, arguments.new_tokens)
    failures = []
    print(HEADER)
    for case in cases():
        folder = work / case.name
        if case.scheme is not None:
            convert(source, folder, scheme=case.scheme, overwrite=folder.exists())
        theirs = run_vllm(arguments.vllm_python, folder, case.dtype, prompts, arguments.new_tokens)
        verdict = judge(case.label, case, folder, prompts, theirs)
        failures += verdict.failures()
        if case.has_control and judge("  vs BF16 weights", case, source, prompts, theirs).logprobs_agree:
            failures.append(f"{case.label}: the unquantized model passes as well, so the comparison shows nothing")
    print("\n".join(["", *failures] if failures else ["", "PASS: vLLM and llama4-quant agree on every checkpoint"]))
    return 1 if failures else 0


def judge(
    name: str, case: Case, folder: Path, prompts: Sequence[Sequence[int]], theirs: Sequence[Continuation]
) -> Verdict:
    """Compare our runtime on the checkpoint in `folder` with vLLM's answers, and print a line of the table."""
    model = load(folder, dtype=case.dtype)
    noise = rounding(model, case)
    results = tuple(compare(model, noise, *pair) for pair in zip(prompts, theirs, strict=True))
    verdict = Verdict(name=name, results=results)
    print(verdict.row(), flush=True)
    return verdict


def run_vllm(
    python: Path, folder: Path, dtype: str, prompts: Sequence[Sequence[int]], num_new: int
) -> list[Continuation]:
    """Run the engine in its own process and environment."""
    job = {
        "model": str(folder.resolve()),
        "dtype": dtype,
        "prompts": prompts,
        "num_new": num_new,
        "max_model_len": vllm_model.MAX_LENGTH,
        "block_size": BLOCK_SIZE,
        "attn_temperature_tuning": True,
    }
    with tempfile.TemporaryDirectory() as exchange:
        job_file, result_file, log_file = (Path(exchange, name) for name in ("job.json", "result.json", "log.txt"))
        job_file.write_text(json.dumps(job), encoding="utf-8")
        with log_file.open("w") as log:
            finished = subprocess.run([python, WORKER, job_file, result_file], stdout=log, stderr=log, check=False)
        if finished.returncode != 0 or not result_file.exists():
            sys.exit(f"{log_file.read_text(errors='replace')[-6000:]}\nvLLM failed on {folder.name}; its log is above")
        results = json.loads(result_file.read_text(encoding="utf-8"))
    return [
        Continuation(tokens=tuple(x["new_tokens"]), logprobs=(*x["prompt_logprobs"], *x["new_logprobs"]))
        for x in results
    ]


def rounding(model: Llama4Model, case: Case) -> Rounding:
    """What rounding may do to a checkpoint's log-probabilities."""
    state = model.state_dict()
    num_layers = model.config.text.num_hidden_layers
    return Rounding(
        dtype=case.dtype,
        eps=hidden_noise(num_layers, case.dtype, fp8_activations=case.has_fp8_activations),
        head=state["lm_head.weight"].float(),
        norm=state["model.norm.weight"].float(),
    )


if __name__ == "__main__":
    main()
