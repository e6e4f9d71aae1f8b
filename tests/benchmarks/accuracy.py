"""What our algorithms and their peers lose at the same bits: the same tokens, the same weights, one judge.

    python tests/benchmarks/accuracy.py --peer-python PEER/bin/python            # W4A16, on the sample model
    python tests/benchmarks/accuracy.py --peer-python ... --scheme FP8_DYNAMIC
    python tests/benchmarks/accuracy.py --only ours,llmc-gptq --model DIR --calibration A.txt --held-out B.txt
    python tests/benchmarks/accuracy.py ablation                                 # what each part of `best` buys
    python tests/benchmarks/accuracy.py mixed --target-bits 4.125,4.25,4.5,5,6   # KL over bits against uniform schemes

PEER is a virtual environment with llmcompressor (torch first: `pip install torch==2.13.0`, then `pip install
llmcompressor==0.14.0.1 pillow`), which has to be apart from ours. `--auto-round-python` likewise names one with
auto-round. Calibration text is tokenized and packed once; every contender gets these tokens and quantizes exactly the
weights of --roles, which is checked in what it wrote. The judge is transformers in float32 on held-out windows
(accuracy_kit/judge.py). Columns: bits per quantized weight with scales; MB of quantized weights and of all tensors;
seconds of the whole process and of the conversion alone, CPU seconds of the process; peak resident memory; load of the
machine at the start.

Conversions and scores are cached in --work; a second run only does what is missing. Times are those of the run that
wrote the checkpoint: for good ones, rerun rows with --fresh on a quiet machine. Under FP8_DYNAMIC a last line says
what rounding the activations costs alone (accuracy_kit/activation_limit.py).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accuracy_kit import checkpoint_facts, tokens
from accuracy_kit.ablation import ablation_contenders
from accuracy_kit.activation_limit import activation_limit
from accuracy_kit.contenders import Contender, System, choose, contenders
from accuracy_kit.conversions import Setting, checkpoint_digest
from accuracy_kit.judge import Judge
from accuracy_kit.mixed import UNIFORM_BASE, mixed_contenders
from accuracy_kit.rows import HEADER, Row, Wanted, line, make_row, reference_perplexity
from accuracy_kit.verdicts import Verdict, mixed_verdict, verdicts

from llama4_quant.sample import SAMPLE_DIR


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        wanted = tokens.prepare(
            options.model,
            calibration=options.calibration,
            held_out=options.held_out,
            num_samples=options.num_samples,
            seq_length=options.seq_length,
            num_windows=options.num_windows,
            seed=options.seed,
        )
        chosen = choose(options.only, all_contenders(options))
    except ValueError as error:
        sys.exit(str(error))
    print(
        f"{options.model}: {len(wanted.calibration_SL)} calibration samples of {options.seq_length} tokens, "
        f"{len(wanted.held_out_WL)} held-out windows ({wanted.overlap:.2%} of their runs of {tokens.OVERLAP_TOKENS} "
        f"tokens are in the calibration samples)\n{HEADER}",
        flush=True,
    )
    rows = run(options, wanted, chosen)
    found = conclude(options, rows)
    limit = None
    if options.scheme == "FP8_DYNAMIC":
        limit = activation_limit(options.model, wanted.held_out_WL, options.roles)
        print(f"KL with exact weights, activations rounded to FP8: {limit:.6f}")
    if options.output is not None:
        write(options, wanted, rows, found, limit)
    failed = [row.name for row in rows if row.problem is not None and row.system == System.OURS]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def all_contenders(options: argparse.Namespace) -> tuple[Contender, ...]:
    """The table's or the curve's."""
    if options.what == "mixed":
        return mixed_contenders(options.target_bits, options.roles)
    if options.what == "ablation":
        return ablation_contenders(options.scheme, options.group_size, options.roles)
    return contenders(options.scheme, options.group_size, options.roles)


def run(options: argparse.Namespace, wanted: tokens.Tokens, chosen: Sequence[Contender]) -> list[Row]:
    """Make and print the rows."""
    path = options.work / f"tokens-{wanted.calibration_digest[:16]}.jsonl"
    setting = Setting(
        model=options.model,
        model_digest=checkpoint_digest(options.model),
        tokens=wanted.write_calibration(path),
        tokens_digest=wanted.calibration_digest,
        seed=options.seed,
        cache=options.work,
        pythons=options.pythons,
        fresh=options.fresh,
    )
    judge = Judge(options.model, wanted.held_out_WL)
    roles = checkpoint_facts.ROLES[options.roles]
    checked = Wanted(roles=roles, scheme=options.scheme, group_size=options.group_size)
    rows = []
    for contender in chosen:
        rows.append(make_row(contender, setting, checked, judge, wanted.held_out_digest))
        print(line(rows[-1]), flush=True)
    return rows


def conclude(options: argparse.Namespace, rows: Sequence[Row]) -> list[Verdict]:
    """Print what the rows mean."""
    print(f"perplexity of the reference: {reference_perplexity(rows)}")
    if options.what == "mixed":
        verdict = mixed_verdict(rows, UNIFORM_BASE)
        found = [verdict] if verdict else []
    else:
        found = verdicts(options.scheme, rows)
    for verdict in found:
        print(verdict.line)
    return found


def write(
    options: argparse.Namespace,
    wanted: tokens.Tokens,
    rows: Sequence[Row],
    found: Sequence[Verdict],
    limit: float | None,
) -> None:
    """All numbers as JSON."""
    report = {
        "when": time.strftime("%Y-%m-%d"),
        "model": options.model.name,
        "num_samples": options.num_samples,
        "seq_length": options.seq_length,
        "num_windows": len(wanted.held_out_WL),
        "overlap": wanted.overlap,
        "roles": options.roles,
        "scheme": options.scheme,
        "group_size": options.group_size,
        "seed": options.seed,
        "rows": [row.to_json() for row in rows],
        "verdicts": [verdict.line for verdict in found],
        "activation_limit": limit,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["table", "mixed", "ablation"], default="table")
    parser.add_argument("--model", type=Path, default=SAMPLE_DIR, help="BF16 Llama4ForConditionalGeneration")
    parser.add_argument("--calibration", type=Path, nargs="+", default=[], help="text files; default: the sample's")
    parser.add_argument("--held-out", type=Path, nargs="+", default=[], help="text files; default: the sample's")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--num-windows", type=int, help="held-out windows (default: all of the text)")
    parser.add_argument("--scheme", choices=["W4A16", "FP8_DYNAMIC"], default="W4A16")
    parser.add_argument("--group-size", type=int, default=64, help="of W4A16")
    parser.add_argument("--roles", choices=list(checkpoint_facts.ROLES), default="all-text-linears")
    parser.add_argument("--target-bits", type=_numbers, default=_numbers("4.125,4.25,4.5,5,6"), help="for mixed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="rows: ours, llmc-gptq, ...")
    parser.add_argument("--peer-python", type=Path, help="python of an environment with llmcompressor")
    parser.add_argument("--auto-round-python", type=Path, help="python of an environment with auto-round")
    parser.add_argument("--work", type=Path, default=Path("build/accuracy"), help="cache (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="convert again what is cached, for better timings")
    parser.add_argument("--output", type=Path, help="write all numbers here as JSON")
    options = parser.parse_args()
    named = {System.LLM_COMPRESSOR: options.peer_python, System.AUTO_ROUND: options.auto_round_python}
    options.pythons = {system: python.absolute() for system, python in named.items() if python is not None}
    if options.scheme != "W4A16":
        options.group_size = None
    return options


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
