"""Conversions that are killed, or run out of disk, at random moments, and continued, until it was often enough.

    python tests/resilience/storm.py                                    100 of each kind, as docs/resilience.md shows
    python tests/resilience/storm.py --num-failures 20 --only kill      fewer

Kinds: `kill`, kill -9 of a process that converts with two threads; `torchrun`, kill -9 of one of two processes under
torchrun (which ends the other one), or of all three at once; `full-disk`, a small file system of its own (a tmpfs in a
private namespace) that something else fills up, both where space can be reserved and where it cannot. After each
failure the same conversion is started again. Every output that is finished in between has to be equal, byte by byte,
to that of a conversion that nobody disturbed. Items are slowed down, so that random moments fall into the work; where
the failures hit is counted, and shown.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkpoints import make_checkpoint, text_config  # noqa: E402
from resilience.attempts import SCHEMES, Work, full_disk, kill_process, kill_torchrun  # noqa: E402
from resilience.resilience_tools import STAGING, contents  # noqa: E402

from llama4_quant.checkpoint.journal import read_journals  # noqa: E402
from llama4_quant.checkpoint.resume import FINGERPRINT_NAME, digest  # noqa: E402

PARTS = 5
PHASES = ("set-up", "0 items", *(f"to {100 * part // PARTS} %" for part in range(1, PARTS + 1)), "publishing")
ATTEMPTS: dict[str, Callable[[Work, random.Random], bool]] = {
    "kill": kill_process,
    "torchrun": kill_torchrun,
    "full-disk": full_disk,
}


@dataclass(kw_only=True)
class Storm:
    """One kind of failure, and what came of it.

    `resumed`: failures after which there was something to continue; `hits`: where they hit; `compared`: outputs that
    were finished, and equal.
    """

    kind: str
    num_items: int
    failures: int = 0
    resumed: int = 0
    compared: int = 0
    seconds: float = 0.0
    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))


def main() -> None:
    """Parse, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-failures", type=int, default=100, help="of each kind")
    parser.add_argument("--only", nargs="+", choices=ATTEMPTS, default=list(ATTEMPTS))
    parser.add_argument("--format", choices=SCHEMES, default="compressed-tensors", help="of the output")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print JSON, one line for each kind, and no table")
    parser.add_argument("--here", action="store_true", help="the folder is a small disk already")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = make_checkpoint(Path(folder) / "bf16", text_config())
        storms = [
            (brew if kind != "full-disk" or options.here else in_small_disk)(
                kind, Work(source=source, out=Path(folder) / kind / "out", storage=options.format), options
            )
            for kind in options.only
        ]
    if options.json:
        print("\n".join(json.dumps(asdict(storm)) for storm in storms))
    else:
        print(table(storms))


def brew(kind: str, work: Work, options: argparse.Namespace) -> Storm:
    """Fail so often; a wrong byte or an unexpected end raises AssertionError."""
    work.out.parent.mkdir(exist_ok=True)
    rng, num_items = random.Random(options.seed), 0

    def count(what: str, _num_bytes: int) -> None:
        nonlocal num_items
        num_items += what != ""

    reference = replace(work, out=work.out.with_name("reference"))
    reference.convert(progress=count)
    expected, work = contents(reference.out), replace(work, num_items=num_items)
    storm, started = Storm(kind=kind, num_items=num_items), time.monotonic()
    while storm.failures < options.num_failures:
        resumes = (work.out / STAGING / FINGERPRINT_NAME).exists()
        if ATTEMPTS[kind](work, rng):
            check(work.out, expected)
            storm.compared += 1
        else:
            assert not work.is_finished()
            storm.failures += 1
            storm.resumed += resumes
            storm.hits[where(work.out, num_items)] += 1
            if storm.failures % 10 == 0:
                print(f"{kind}: {storm.failures} failures, {storm.compared} outputs compared", file=sys.stderr)
    work.convert()
    check(work.out, expected)
    storm.compared += 1
    storm.seconds = time.monotonic() - started
    return storm


def check(out: Path, expected: dict[str, bytes]) -> None:
    """The output is complete and right; then it is removed."""
    # Who is killed when config.json is in place has left the staging folder at most.
    shutil.rmtree(out / STAGING, ignore_errors=True)
    found = contents(out)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    shutil.rmtree(out)


def where(out: Path, num_items: int) -> str:
    """How far an unfinished conversion is."""
    staging = out / STAGING
    if not (staging / FINGERPRINT_NAME).exists():
        return PHASES[0]
    if (staging / "publishing").exists():
        return PHASES[-1]
    finished = len(read_journals(staging, digest(json.loads((staging / FINGERPRINT_NAME).read_bytes()))))
    return PHASES[1 + -(-PARTS * finished // num_items)]


def in_small_disk(kind: str, work: Work, options: argparse.Namespace) -> Storm:
    """Run this script again in a namespace where the output's folder is a small file system."""
    folder = work.out.parent
    folder.mkdir()
    inner = [sys.executable, __file__, "--only", kind, "--json", "--here", "--folder", str(folder)]
    inner += ["--num-failures", str(options.num_failures), "--seed", str(options.seed), "--format", work.storage]
    mount = f'mount -t tmpfs -o size={4 * size_of(work.source)} tmpfs "$0" && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, str(folder), *inner], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"the storm on a small disk failed: {done.stderr}")
    return Storm(**json.loads(done.stdout))


def size_of(folder: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def table(storms: list[Storm]) -> str:
    """A table in Markdown."""
    names = ["", "failures", "resumed", *PHASES, "outputs compared", "seconds"]
    rows = [
        [s.kind, s.failures, s.resumed, *(s.hits[phase] for phase in PHASES), s.compared, round(s.seconds)]
        for s in storms
    ]
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    main()
