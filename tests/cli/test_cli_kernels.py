"""`--kernel`, `--lm-head` and `inspect --kernels` on the command line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from cli_runs import run_cli

from llama4_quant import load
from llama4_quant.inspect import inspect
from llama4_quant.ops import native_attention, native_elementwise
from llama4_quant.runtime.attention import TextAttention
from llama4_quant.runtime.elementwise import Gate, RMSNorm
from llama4_quant.sample import HELD_OUT_TEXT, SAMPLE_DIR

PROMPT = ["--prompt", "Return a new string object with", "--raw", "--max-new-tokens", 8]
WINDOWS = ["--text", HELD_OUT_TEXT, "--seq-length", 64, "--num-windows", 2, "--json"]


def _evaluation(*arguments: object) -> dict[str, Any]:
    ran = run_cli("eval", SAMPLE_DIR, "--reference", SAMPLE_DIR, *WINDOWS, *arguments)
    assert ran.code == 0, ran.err
    result: dict[str, Any] = json.loads(ran.out)
    return result


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_another_kernel_computes_the_same_model(kernel: str) -> None:
    scheme = ["--scheme", "W4A16", "--group-size", 64, "--kernel"]
    losses = [math.log(_evaluation(*scheme, name)["perplexity"]["value"]) for name in (kernel, "reference")]
    # bfloat16 rounds logits of 8 to 16 by up to 2^-5, so the loss of a token by up to twice that; wrong weights cost
    # several nats.
    assert abs(losses[0] - losses[1]) < 2 * 2**-5
    assert run_cli("generate", SAMPLE_DIR, *PROMPT, *scheme, kernel).out.startswith(" the same")


def test_a_kernel_that_cannot_is_one_message() -> None:
    ran = run_cli("generate", SAMPLE_DIR, *PROMPT, "--scheme", "FP8_DYNAMIC", "--dtype", "float32", "--kernel", "torch")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.count("\n") == 1
    assert "torch: dtype float32: the kernels take bfloat16; reference: can run" in ran.err


@pytest.mark.parametrize(("lm_head", "bound"), [("int8", 1e-4), ("int4", 2e-2)])
def test_a_quantized_head_moves_the_logits_a_little(lm_head: str, bound: float) -> None:
    """Logits that are off by independent errors of variance v move a softmax by v / 2 nats.

    int8: half a step is 1/254 of a row's largest weight, which is four times the rms or less, and an error spreads
    evenly over a step: v < (4 / 254)^2 / 3 of the logits' variance, which is of order 1 here, so v / 2 < 1e-4. int4
    with a scale per 32: the largest of 32 weights is 2.5 times the rms, half a step 1/15 of it: v / 2 < (2.5 / 15)^2
    / 6 < 5e-3, and four times that for logits with a deviation of 2.
    """
    result = _evaluation("--lm-head", lm_head)
    divergence = result["comparison"]["divergence"]["value"]
    assert 0 < divergence < bound


def test_inspect_names_kernels_and_reasons(tmp_path: Path) -> None:
    found = json.loads(run_cli("inspect", SAMPLE_DIR, "--kernels", "--json").out)
    assert {kernel["operator"] for kernel in found["kernels"]} == {"linear_dense", "grouped_dense"}
    assert json.loads(run_cli("inspect", SAMPLE_DIR, "--json").out)["kernels"] == []
    assert run_cli("convert", SAMPLE_DIR, "-o", tmp_path / "out", "--scheme", "FP8_DYNAMIC").code == 0
    table = run_cli("inspect", tmp_path / "out", "--kernels").out
    assert "grouped_fp8" in table
    assert "Kernels, in bfloat16 on this processor" in table
    assert "attention of one token, int8 cache" in table


def test_inspect_says_of_other_work_what_a_loaded_model_does() -> None:
    other = json.loads(run_cli("inspect", SAMPLE_DIR, "--kernels", "--json").out)["other_kernels"]
    found = {work["work"]: work for work in other}
    modules = list(load(SAMPLE_DIR).modules())
    groups: dict[str, list[RMSNorm] | list[Gate] | list[TextAttention]] = {
        "norm": [module for module in modules if isinstance(module, RMSNorm)],
        "gate": [module for module in modules if isinstance(module, Gate)],
        "attention of one token, fp8 cache": [module for module in modules if isinstance(module, TextAttention)],
    }
    for work, doing in groups.items():
        assert found[work]["count"] == len(doing) > 0
        assert {module.is_native for module in doing} == {found[work]["kernel"] == "native"}
        assert bool(found[work]["rejected"]) == (found[work]["kernel"] != "native")
    assert 0 < found["rotation"]["count"] < len(groups["attention of one token, fp8 cache"])  # a NoPE layer has none


def test_without_a_compiler_inspect_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in (native_attention, native_elementwise):
        monkeypatch.setattr(library, "_library", lambda: "no C++ compiler")
    found = {work.work: work for work in inspect(SAMPLE_DIR, kernels=True).other_kernels}
    for work in ("norm", "rotation", "gate", "attention of one token, int8 cache"):
        assert (found[work].kernel, found[work].rejected) == ("torch", (("native", "no C++ compiler"),))
