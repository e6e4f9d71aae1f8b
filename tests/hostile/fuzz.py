"""Thousands of damaged headers, indices, configurations, manifests, journals and pickles: each is read or refused.

    python tests/hostile/fuzz.py --num-cases 20000 --seed 0
    python tests/hostile/fuzz.py --seed 0 --case 1234       # one case again, with its files kept

A finding is: an error that is no Llama4QuantError, or whose message is not one short printable line; more processor
time or memory than a case may take, or no end at all; a file changed that is not the output. Worker processes have a
limited address space. Which files a case has depends on seed and number alone.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Lock

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile.cases import VICTIM, Bases, make_bases
from hostile.fuzz_targets import UndetectedError, choose, clear, prepare
from hostile.sandbox import CrashError, HangError, Process, snapshot
from hostile.worker import limit_memory, peak

from llama4_quant.errors import Llama4QuantError

MAX_SECONDS = 3.0
"""Of the processor."""
TIMEOUT = 60.0
MAX_RESIDENT = 400 * 2**20
MAX_MESSAGE = 1500


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A case that went wrong, and how."""

    number: int
    target: str
    what: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Of a run: cases by (target, "read" or "refused"), and findings."""

    counts: Counter[tuple[str, str]]
    findings: tuple[Finding, ...]


def run_case(seed: int, number: int, bases: Bases, root: Path, only: str | None = None) -> dict[str, str]:
    """Make and run one case in folder `root`; says how it ended."""
    target, rng = choose(seed, number, only)
    file, is_damaged = prepare(target, rng, bases, root)
    before = snapshot(root, leave_out="out")
    started = time.process_time()
    ending, what = "read", ""
    try:
        target.use(root, rng)
    except Llama4QuantError as error:
        ending, message = "refused", str(error)
        if not message.isprintable() or len(message) > MAX_MESSAGE:
            what = f"unclear message: {message[:500]!r}"
    except UndetectedError:
        what = "verify found nothing wrong" if is_damaged else ""
    except Exception:  # noqa: BLE001 - this is what is looked for
        what = traceback.format_exc()
    seconds = time.process_time() - started
    if not what and seconds > MAX_SECONDS:
        what = f"slow: {seconds:.1f} s of the processor"
    after = snapshot(root, leave_out="out")
    if after != before:
        what += f"changed: {[name for name in {*before, *after} if before.get(name) != after.get(name)]}"
    return {"target": target.name, "ending": ending, "what": f"{file}: {what}" if what else ""}


def serve(folder: Path) -> None:
    """Run cases that are asked for, one line of JSON each; `folder` holds the bases."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    limit_memory()
    at_first = peak()
    print(json.dumps({"peak": at_first}), file=answers)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "victim.bin").write_bytes(VICTIM)
        os.chdir(root)
        for line in sys.stdin:
            request = json.loads(line)
            answer = run_case(request["seed"], request["number"], Bases(folder), root, request["only"])
            clear(root)
            if not answer["what"] and peak() - at_first > MAX_RESIDENT:
                answer["what"] = f"memory: {(peak() - at_first) / 2**20:.0f} MiB more than at the start"
            print(json.dumps(answer), file=answers)


def fuzz(seed: int, num_cases: int, num_workers: int, only: str | None = None, progress: bool = False) -> Outcome:
    """Run cases 0 to `num_cases` - 1 in worker processes."""
    counts: Counter[tuple[str, str]] = Counter()
    findings: list[Finding] = []
    numbers, lock = count(), Lock()

    def work(folder: Path) -> None:
        process = None
        while (number := next(numbers)) < num_cases:
            process = process or Process("fuzz.py", "--serve", str(folder))
            try:
                answer = process.ask({"seed": seed, "number": number, "only": only}, TIMEOUT)
            except (HangError, CrashError) as problem:
                process, target = None, choose(seed, number, only)[0].name
                answer = {"target": target, "ending": "lost", "what": f"{type(problem).__name__}: {problem}"}
            with lock:
                counts[answer["target"], answer["ending"]] += 1
                if answer["what"]:
                    findings.append(Finding(number=number, target=answer["target"], what=answer["what"]))
                if answer["what"].partition(": ")[2].startswith("memory") and process is not None:
                    process.close()  # the peak never falls: the next case would be blamed too
                    process = None
            if progress and number and number % 1000 == 0:
                print(f"{number} cases, {len(findings)} findings", file=sys.stderr, flush=True)
        if process is not None:
            process.close()

    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(num_workers) as pool:
        make_bases(Path(name))
        before = snapshot(Path(name))
        for done in [pool.submit(work, Path(name)) for _ in range(num_workers)]:
            done.result()
        assert snapshot(Path(name)) == before, "a case changed a file of the sound checkpoints"
    return Outcome(counts=counts, findings=tuple(sorted(findings, key=lambda finding: finding.number)))


def table(outcome: Outcome) -> str:
    """Cases by target."""
    targets = sorted({target for target, _ in outcome.counts})
    lines = [f"{'damaged':20} {'cases':>7} {'refused':>8} {'read':>7} {'findings':>9}"]
    for target in targets:
        read, refused = outcome.counts[target, "read"], outcome.counts[target, "refused"]
        total = sum(number for (name, _), number in outcome.counts.items() if name == target)
        found = sum(finding.target == target for finding in outcome.findings)
        lines.append(f"{target:20} {total:7} {refused:8} {read:7} {found:9}")
    read, refused = (sum(n for (_, end), n in outcome.counts.items() if end == kind) for kind in ("read", "refused"))
    total = sum(outcome.counts.values())
    return "\n".join([*lines, f"{'all':20} {total:7} {refused:8} {read:7} {len(outcome.findings):9}"])


def repeat(seed: int, number: int, only: str | None) -> None:
    """One case again, here; its files stay."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    (folder / "case").mkdir()
    (folder / "case" / "victim.bin").write_bytes(VICTIM)
    os.chdir(folder / "case")
    bases = make_bases(folder / "bases")
    target, rng = choose(seed, number, only)
    (folder / "files").mkdir()
    file, _ = prepare(target, rng, bases, folder / "files")
    print(f"{target.name}: {file} is damaged; files in {folder / 'files'}")
    answer = run_case(seed, number, bases, folder / "case", only)
    shutil.rmtree(folder / "bases")
    print(answer["what"] or f"{answer['ending']}, as it should be")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", help="one target, by its name in the table")
    parser.add_argument("--case", type=int, help="run one case again")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    if options.case is not None:
        repeat(options.seed, options.case, options.only)
        return
    started = time.monotonic()
    outcome = fuzz(options.seed, options.num_cases, options.workers, options.only, progress=True)
    for finding in outcome.findings:
        only = f" --only {finding.target!r}" if options.only else ""
        print(f"--seed {options.seed}{only} --case {finding.number} ({finding.target}): {finding.what}\n")
    print(table(outcome))
    print(f"seed {options.seed}, {time.monotonic() - started:.0f} s with {options.workers} workers")
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.exit(1 if outcome.findings else 0)


if __name__ == "__main__":
    main()
