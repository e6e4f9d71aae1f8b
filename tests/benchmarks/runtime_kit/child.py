"""Workers in processes of their own, so that memory is theirs alone and environments can differ."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
THREADS = os.cpu_count() or 1


class ChildFailedError(Exception):
    """A worker stopped; the message is what it said last."""


def run_worker(python: Path, folder: Path, worker: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a worker of this kit.

    Args:
        python: of the environment that has what it imports.
        folder: for job and result.
        worker: module name.
        job: what it reads; it gets as many threads as there are cores.

    Raises:
        ChildFailedError: it did not finish.
    """
    job_path, result_path = (folder / f"{worker}.{what}.json" for what in ("job", "result"))
    job_path.write_text(json.dumps(dict(job) | {"threads": THREADS}), encoding="utf-8")
    result_path.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": str(HERE.parents[1]),
        "OMP_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
    }
    command = [python, "-m", f"{Path(__file__).parent.name}.{worker}", job_path, result_path]
    done = subprocess.run(command, cwd=HERE, env=environment, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ChildFailedError(f"{worker}: exit code {done.returncode}: {said[-1] if said else 'no message'}")
    result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
    return result
