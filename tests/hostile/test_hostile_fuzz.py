"""The fuzzer in small: two thousand cases, and that it finds what it looks for. docs/security.md has the large run."""

from pathlib import Path

import pytest
from hostile import fuzz as fuzz_module
from hostile.cases import VICTIM, Bases, make_bases
from hostile.fuzz import fuzz, run_case, table
from hostile.fuzz_targets import TARGETS, choose, clear, prepare
from hostile.sandbox import CrashError, HangError, Process, snapshot

from llama4_quant.errors import CheckpointError
from llama4_quant.inspect import inspect

NUM_CASES = 2000


def test_damaged_files_are_read_or_refused() -> None:
    outcome = fuzz(seed=1, num_cases=NUM_CASES, num_workers=2)
    assert outcome.findings == ()
    assert sum(outcome.counts.values()) == NUM_CASES
    read, refused = (sum(n for (_, end), n in outcome.counts.items() if end == kind) for kind in ("read", "refused"))
    assert read > NUM_CASES // 20  # some damage is none
    assert refused > NUM_CASES // 2
    assert {target for target, _ in outcome.counts} == {target.name for target in TARGETS}
    assert f" {NUM_CASES} " in table(outcome)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return make_bases(tmp_path_factory.mktemp("bases"))


def test_a_case_follows_from_seed_and_number(bases: Bases, tmp_path: Path) -> None:
    again = make_bases(tmp_path / "again")
    for number in range(60):
        contents = []
        for made in (bases, again):
            target, rng = choose(7, number)
            prepare(target, rng, made, tmp_path / "case")
            contents.append({path: entry.content for path, entry in snapshot(tmp_path / "case").items()})
            clear(tmp_path / "case")
        assert contents[0] == contents[1], target.name


def _fail(path: Path) -> None:
    raise KeyError(path)


def _mumble(path: Path) -> None:
    raise CheckpointError("two\nlines")


def _write(path: Path) -> None:
    (path.parent / "victim.bin").write_bytes(b"changed")


def _spend(path: Path) -> None:
    sum(range(10**7))


@pytest.mark.parametrize(
    ("use", "found"),
    [
        (_fail, "KeyError"),
        (_mumble, "unclear message"),
        (_write, "changed: ['victim.bin']"),
        (_spend, "slow"),
        (inspect, ""),
    ],
)
def test_what_is_found(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: object, found: str) -> None:
    """Otherwise no findings would mean nothing."""
    (tmp_path / "victim.bin").write_bytes(VICTIM)
    monkeypatch.setattr("hostile.fuzz_targets.inspect", use)
    monkeypatch.setattr(fuzz_module, "MAX_SECONDS", 0.05 if use is _spend else 60.0)
    what = run_case(0, 1, bases, tmp_path, "index")["what"]
    assert found in what
    assert bool(found) is bool(what)


def test_workers_have_limits_and_are_given_up() -> None:
    process = Process("worker.py")
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max address space")]
    assert "unlimited" not in line
    with pytest.raises(HangError):
        process.ask({"arguments": ["inspect", "nowhere"], "folder": "/"}, timeout=0)
    with pytest.raises(CrashError):
        process.ask({"arguments": ["inspect", "nowhere"], "folder": "/"})
