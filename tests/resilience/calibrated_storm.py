"""Kills calibrated conversions at random moments until it was often enough; started by the tests as its own process.

    python calibrated_storm.py SOURCE DATA OUT NUM_KILLS SEED

Every output that is finished in between is compared with that of an uninterrupted run. Prints what was met as JSON.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from calibrated_runs import calibrate
from resilience.attempts import fork
from resilience.resilience_tools import STAGING, contents, num_finished

from llama4_quant.scheme import preset

SCHEME = preset("W4A16", group_size=32, quantize=["attention"])


def run(source: Path, data: str, out: Path) -> None:
    calibrate(source, out, [data], scheme=SCHEME, num_samples=4, min_tokens_per_expert=12)


def storm(source: Path, data: str, out: Path, num_kills: int, seed: int) -> dict[str, int]:
    rng, reference = random.Random(seed), out.with_name("reference")
    started = time.monotonic()
    assert wait(fork(lambda: run(source, data, reference))) == 0
    seconds = time.monotonic() - started
    expected = contents(reference)
    counts = {"kills": 0, "finished": 0, "resumed": 0, "in survey": 0, "in layers": 0}
    # A machine that has become slower since the reference was made would be killed in the survey each time: so moments
    # come later and later until they fall into the layers.
    reach, attempts = 0.6, 0
    while counts["kills"] < num_kills or (counts["in layers"] < num_kills // 4 and attempts < 4 * num_kills):
        attempts += 1
        counts["resumed"] += num_finished(out) > 0
        pid = fork(lambda: run(source, data, out))
        time.sleep(rng.uniform(0, reach * seconds))
        os.kill(pid, signal.SIGKILL)
        status = wait(pid)
        assert status in {0, -signal.SIGKILL}, status
        scratch = out / STAGING / "calibration"
        counts["in survey"] += any(scratch.glob("survey-*")) and not (scratch / "samples.json").exists()
        is_in_layers = (scratch / "state.json").exists()
        counts["in layers"] += is_in_layers
        reach = max(0.6, reach / 1.2) if is_in_layers else min(3.0, reach * 1.15)
        counts["kills"] += status != 0
        if (out / "config.json").exists():
            counts["finished"] += compare(out, expected)
    assert wait(fork(lambda: run(source, data, out))) == 0
    counts["finished"] += compare(out, expected)
    return counts


def compare(out: Path, expected: dict[str, bytes]) -> bool:
    found = {name: data for name, data in contents(out).items() if name != STAGING}
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    differ = [name for name in expected if found[name] != expected[name]]
    assert not differ, differ
    shutil.rmtree(out)
    return True


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not live through a fork
    _, source, data, out, num_kills, seed = sys.argv
    print(json.dumps(storm(Path(source), data, Path(out), int(num_kills), int(seed))))
