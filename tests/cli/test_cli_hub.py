"""Hub sources on the command line: what is downloaded, and what is said when something is in the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint.checkpoint_files import tree
from checkpoint.hub_server import COMMIT, TOKEN, LocalHub, running_hub, whole
from checkpoints import random_tensors, text_config, write_checkpoint
from huggingface_hub import constants

from llama4_quant.checkpoint import hub_cache
from llama4_quant.cli.main import main
from llama4_quant.conversion.convert import convert

ID = "org/model"
OTHER = "f" * 40
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = text_config(vocab_size=4096)
    return write_checkpoint(tmp_path_factory.mktemp("cli-hub") / "model", config, random_tensors(config), 4)


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with running_hub(tree(model), tmp_path / "home", monkeypatch) as served:
        yield served


class Ran:
    """How a command ended and what it said."""

    def __init__(self, code: int, err: str) -> None:
        self.code = code
        self.err = "\n".join(line for line in err.splitlines() if line.startswith("error:"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    def run_command(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["llama4-quant", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Ran(code, capsys.readouterr().err)

    return run_command


def manifest(folder: Path) -> bytes:
    return (folder / "manifest.json").read_bytes()


def test_branch_tag_and_commit(hub: LocalHub, model: Path, run: object, tmp_path: Path) -> None:
    """The default branch has another tokenizer than the rest, and the output's copy shows which one it was."""
    hub.revisions[OTHER] = {**hub.revisions[COMMIT], "tokenizer.json": b'{"other": 1}'}
    hub.names |= {"a/branch": OTHER, "v1.0": OTHER}
    for number, revision in enumerate((None, "main", "a/branch", "v1.0", OTHER)):
        out = tmp_path / str(number)
        flags = [] if revision is None else ["--revision", revision]
        assert run("convert", ID, "-o", out, *flags).code == 0
        assert (out / "tokenizer.json").read_bytes() == (b"{}" if revision in {None, "main"} else b'{"other": 1}')
        assert run("verify", out, "--source", ID, *flags).code == 0
    assert run("verify", tmp_path / "0", "--revision", "main").code == 1
    assert sorted(whole(hub)) == sorted(path.name for path in model.glob("*.safetensors"))  # each once, for all of them


REFUSALS = {
    "restricted, no token": ({"gated": True}, "access is restricted; accept the licence at https://huggingface.co/org"),
    "no such token": (
        {"refusal": (401, {"X_Error_Message": "Invalid credentials in Authorization header"})},
        "the Hub asks for a valid token (401); log in with `hf auth login` or set HF_TOKEN",
    ),
    "token without the right": ({"refusal": (403, {"X_Error_Message": "Forbidden"})}, "the token does not give access"),
    "no such repository": (
        {"refusal": (404, {"X_Error_Code": "RepoNotFound"})},
        "neither a local folder nor a repository that you can see on the Hub; check the spelling, and log in",
    ),
    "private, no token": (
        {"refusal": (401, {"X_Error_Code": "RepoNotFound", "X_Error_Message": "Invalid username or password."})},
        "neither a local folder nor a repository that you can see on the Hub",
    ),
    "no such revision": (
        {"refusal": (404, {"X_Error_Code": "RevisionNotFound"})},
        "the repository has no such revision; give a branch, tag or commit",
    ),
    "connections that end at once": ({"down": True}, "run the command again, it resumes"),
    "too many requests": ({"refusal": (429, {})}, "run the command again later"),
    "an error at the Hub": ({"refusal": (500, {})}, "run the command again later"),
}


@pytest.mark.parametrize("by_shard", [False, True])
@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line_that_says_what_to_do(
    hub: LocalHub, run: object, tmp_path: Path, case: str, by_shard: bool
) -> None:
    changes, message = REFUSALS[case]
    for name, value in changes.items():
        setattr(hub, name, value)
    ran = run("convert", ID, "-o", tmp_path / "out", *(["--delete-source-shards"] if by_shard else []))
    assert ran.code == 1
    assert message in ran.err
    assert ran.err.startswith(f"error: {ID}")
    assert ran.err.count("\n") == 0
    assert whole(hub) == []
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("by_shard", [False, True])
def test_no_connection(
    hub: LocalHub, run: object, tmp_path: Path, by_shard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    ran = run("convert", ID, "-o", tmp_path / "out", *(["--delete-source-shards"] if by_shard else []))
    assert (ran.code, "the Hub cannot be reached" in ran.err) == (1, True), ran.err
    assert ran.err.count("\n") == 0


def test_offline(hub: LocalHub, run: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ran = run("convert", ID, "-o", tmp_path / "out")
    assert (ran.code, "HF_HUB_OFFLINE is set" in ran.err) == (1, True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert run("convert", ID, "-o", tmp_path / "out").code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("convert", ID, "-o", tmp_path / "again").code == 0  # from the cache
    assert run("convert", ID, "--dry-run").code == 0
    assert manifest(tmp_path / "again") == manifest(tmp_path / "out")


def test_a_bad_plan_or_output_is_refused_before_weights_are_downloaded(
    hub: LocalHub, run: object, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for arguments, message in (
        (["-o", tmp_path / "out", "--ignore", "nothing"], "matches none of the model's"),
        (["-o", tmp_path / "out", "--max-memory", "1MiB"], "is too little"),
        (["-o", tmp_path / "full"], "not empty, and not a checkpoint"),
    ):
        ran = run("convert", ID, *arguments)
        assert (ran.code, message in ran.err) == (1, True), ran.err
    assert whole(hub) == []


def test_space_for_downloads_and_output_is_checked_before_weights_are_downloaded(
    hub: LocalHub, run: object, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cache and output are on one disk here: it has to hold both."""
    local = convert(model, tmp_path / "local")
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    output = local.totals.bytes_out
    free = weights + output - 1
    monkeypatch.setattr(hub_cache, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    ran = run("convert", ID, "-o", tmp_path / "out")
    assert ran.code == 1
    assert f"no space left: {weights + output:,} bytes needed, {free:,} free" in ran.err
    assert f"{weights:,} for {tmp_path / 'home' / 'hub'}, {output:,} for {tmp_path / 'out'}" in ran.err
    assert "--delete-source-shards" in ran.err
    assert whole(hub) == []
    assert not (tmp_path / "out").exists()
    free += 1
    assert run("convert", ID, "-o", tmp_path / "out").code == 0
    assert manifest(tmp_path / "out") == manifest(tmp_path / "local")
    free = output  # what is in the cache is not downloaded again
    assert run("convert", ID, "-o", tmp_path / "again").code == 0


def test_a_dry_run_of_another_layout_downloads_nothing(hub: LocalHub, run: object) -> None:
    hub.revisions[COMMIT] = {"params.json": b"{}", "consolidated.00.pth": b"0" * 50, "tokenizer.model": b"t"}
    ran = run("convert", ID, "--dry-run")
    assert ran.code == 1
    assert f"have to be downloaded whole: `hf download {ID}`" in ran.err
    assert whole(hub) == []


def client(hub: LocalHub, home: Path, **changes: str) -> dict[str, str]:
    """The environment of a user whose Hub is the local one."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    return {
        **kept,
        "HF_ENDPOINT": constants.ENDPOINT,
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **changes,
    }


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "llama4_quant.cli", *map(str, arguments)]


@pytest.mark.parametrize("place", ["HF_TOKEN", "HF_TOKEN_PATH", "login"])
def test_the_token_of_a_user(hub: LocalHub, model: Path, tmp_path: Path, place: str) -> None:
    """In a process of its own, as the client reads its environment when it is imported."""
    hub.gated = True
    home, changes = tmp_path / "user", {}
    home.mkdir()
    if place == "HF_TOKEN":
        changes = {"HF_TOKEN": TOKEN}
    elif place == "HF_TOKEN_PATH":
        (tmp_path / "secret").write_text(f"{TOKEN}\n")
        changes = {"HF_TOKEN_PATH": str(tmp_path / "secret")}
    else:
        (home / "token").write_text(TOKEN)  # what `hf auth login` writes
    convert(model, tmp_path / "local")
    done = subprocess.run(
        command("convert", ID, "-o", tmp_path / "out"),
        check=False, capture_output=True, text=True, env=client(hub, home, **changes),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert manifest(tmp_path / "out") == manifest(tmp_path / "local")
    assert hub.tokens_at_storage == []
    assert TOKEN not in done.stdout + done.stderr + (tmp_path / "out" / "quantization_report.json").read_text()


@pytest.mark.parametrize("by_shard", [False, True])
def test_a_download_that_is_killed_is_continued(hub: LocalHub, model: Path, tmp_path: Path, by_shard: bool) -> None:
    """Whole files that arrived are kept; the one on its way starts anew, since the client keeps no parts of it."""
    names = sorted(path.name for path in model.glob("*.safetensors"))
    arrived = []

    def hold(name: str) -> None:
        arrived.append(name)
        if len(arrived) > 2:
            deadline = time.monotonic() + 60
            while len(arrived) < 100 and time.monotonic() < deadline:
                os.sched_yield()  # `time.sleep` does nothing in these tests

    hub.on_download = hold
    flags = ["--delete-source-shards"] if by_shard else []
    environment = client(hub, tmp_path / "user", HF_HUB_DOWNLOAD_TIMEOUT="60")
    process = subprocess.Popen(
        command("convert", ID, "-o", tmp_path / "out", *flags),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    cache = tmp_path / "user" / "hub" / "models--org--model" / "snapshots" / COMMIT
    while len(arrived) < 3 or not (by_shard or len(list(cache.glob("*.safetensors"))) == 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.on_download = lambda _: None
    arrived += [""] * 100
    done = subprocess.run(
        command("convert", ID, "-o", tmp_path / "out", *flags, "--json"),
        check=False, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    convert(model, tmp_path / "local")
    assert json.loads(done.stdout)["totals"]
    assert manifest(tmp_path / "out") == manifest(tmp_path / "local")
    counts = {name: whole(hub).count(name) for name in names}
    assert min(counts.values()) == 1
    assert sum(counts.values()) < 2 * len(names)
