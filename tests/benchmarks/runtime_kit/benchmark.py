"""The run itself: files, rows, and bandwidth before each row."""

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from synthetic import make_checkpoint

from llama4_quant import preset
from llama4_quant.architecture import Llama4Config

from .artifacts import Workshop, needs
from .child import THREADS, ChildFailedError, run_worker
from .contenders import SCHEMES, Contender, System, named
from .results import Row, apart
from .shapes import TINY, Shape
from .traffic import Traffic, of_gguf, planned

WORKERS = {
    System.OURS: "worker_ours",
    System.TRANSFORMERS: "worker_transformers",
    System.LLAMA_CPP: "worker_llamacpp",
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every row computes.

    Attributes:
        prompt: tokens of the prompt that prefill is timed on, and that decoding with one row starts from.
        batch: rows of the other decode; their prompts share `prompt` tokens evenly.
        steps: decode steps of a round.
        rounds: at most so many; the best counts.
        seconds: after which no new round of a kind begins (but two always run).
    """

    prompt: int
    batch: int
    steps: int
    rounds: int
    seconds: float

    def job(self, vocabulary: int) -> dict[str, Any]:
        """Random tokens, always the same."""
        dice, steps = random.Random(0), self.steps * self.rounds

        def tokens(count: int) -> list[int]:
            return [dice.randrange(vocabulary) for _ in range(count)]

        return {
            "prompt": tokens(self.prompt),
            "batch": [tokens(max(1, self.prompt // self.batch)) for _ in range(self.batch)],
            "decode": [tokens(steps) for _ in range(self.batch)],
            "steps": self.steps,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "capacity": -(-(self.prompt + steps + 16) // 256) * 256,
        }


@dataclass(kw_only=True)
class Benchmark:
    """One run.

    Attributes:
        folder: for all files.
        pythons: of an environment that has each system.
        reads: bytes per second by size of the buffer and by way of reading, before each row.
    """

    shape: Shape
    work: Work
    folder: Path
    pythons: Mapping[System, Path]
    read_bytes: int
    read_rounds: int
    keep: bool
    rows: list[Row] = field(default_factory=list)
    reads: list[dict[str, dict[str, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = Llama4Config.from_dict(self.shape.config())
        python = self.pythons.get(System.LLAMA_CPP, Path(sys.executable))
        self._workshop = Workshop(folder=self.folder, run=partial(run_worker, python, self.folder))

    def measure(self, chosen: Sequence[Contender]) -> None:
        """All rows; one that fails says why."""
        if not self._workshop.source.exists():
            make_checkpoint(self._workshop.source, self.shape.config(), sparse=False, runs=True)
        for index, contender in enumerate(chosen):
            if not self.keep:
                self._workshop.drop_all_but(frozenset().union(*(needs(later) for later in chosen[index:])))
            try:
                row = self._row(contender)
            except ChildFailedError as error:
                row = Row(contender=contender, problem=str(error))
            self.rows.append(row)
            print(f"{contender.name}: {row.problem or 'done'}", file=sys.stderr, flush=True)

    def _row(self, contender: Contender) -> Row:
        model = self._workshop.make(contender.files)
        traffic = self.traffic(contender)
        self._read()
        job = self.work.job(self.shape.vocabulary)
        result = self._run(contender, model, job, {"load": contender.arguments})
        return Row.from_result(contender, traffic, result, self.work.prompt)

    def _run(self, contender: Contender, model: Path, job: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        logits = self.folder / f"{model.name}-{contender.name}.logits"
        job = job | {"model": str(model), "logits": str(logits), **more}
        return run_worker(self.pythons[contender.system], self.folder, WORKERS[contender.system], job)

    def traffic(self, contender: Contender) -> Traffic:
        """What a row's decode step reads. What transformers has decompressed, it reads in BF16."""
        if contender.files.is_gguf:
            return of_gguf(self._workshop.tensors(contender.files), self.shape.experts)
        scheme = None
        if contender.system is System.OURS and contender.files in SCHEMES:
            name, roles = SCHEMES[contender.files]
            scheme = preset(name, quantize=roles)
        return planned(self.config, scheme, int8_head="lm_head" in contender.arguments)

    @property
    def leanest(self) -> int:
        """Bytes that a step of our int4 row reads, in whole pages for each thread."""
        unit = 4096 * THREADS
        return int(self.traffic(named("ours-int4")).per_step(1)) // unit * unit

    def _read(self) -> None:
        """Measure bandwidth on a buffer that no cache holds, and on one as large as what the leanest row reads."""
        job = {"sizes": [self.leanest, self.read_bytes], "rounds": self.read_rounds}
        self.reads.append(run_worker(Path(sys.executable), self.folder, "worker_bandwidth", job)["speeds"])

    def bandwidth(self, size: int) -> tuple[float, str]:
        """Best bytes per second of all reads of a buffer, and how it was read."""
        return max((speed, way) for speeds in self.reads for way, speed in speeds[str(size)].items())

    def check_gguf(self) -> float:
        """How far fp32 logits of llama.cpp are from ours on a tiny model: is it the same function?"""
        source, target = self.folder / "tiny", self.folder / "tiny.gguf"
        make_checkpoint(source, TINY.config(), sparse=False, runs=True)
        self._workshop.run("worker_gguf", {"source": str(source), "output": str(target), "type": "F32"})
        job = Work(prompt=64, batch=8, steps=1, rounds=2, seconds=1).job(TINY.vocabulary)
        for contender, model in ((named("ours-bf16"), source), (named("llamacpp-bf16"), target)):
            self._run(contender, model, job, {"load": {"dtype": "float32"}, "exact": True})
        theirs, ours = (self.folder / f"{name}.logits" for name in ("tiny.gguf-llamacpp-bf16", "tiny-ours-bf16"))
        return max(apart(theirs, ours, TINY.vocabulary))
