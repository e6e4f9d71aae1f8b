"""Several machines: namespaces with a hostname and a boot id of their own stand for them; they share folders and a CPU.

What is real: torchrun with two nodes, the processes, the kernel's locks, the kills. What is not: one kernel, so locks
and unsynced writes are seen by all "machines" unless a process is told to be blind to locks.
"""

import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from checkpoints import make_checkpoint, text_config
from resilience.driver import BLIND
from resilience.resilience_tools import DRIVER, ENVIRONMENT, STAGING, contents, num_finished, wait_for_items

from llama4_quant.checkpoint.pulse import SECONDS_BETWEEN_PULSES, SECONDS_TO_WATCH
from llama4_quant.conversion.convert import convert

SCHEME = ("--scheme", "FP8_DYNAMIC", "--max-shard-size", "200kB", "--workers", 1)
ENTER = (
    'hostname "$1" && mount --bind "$2" /proc/sys/kernel/random/boot_id && '
    'if [ -n "$3" ]; then mount -t tmpfs tmpfs "$3"; fi && shift 3 && exec "$@"'
)


class Host:
    """A machine, as far as this project can tell."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.boot = folder / f"boot-{name}"
        self.boot.write_text(f"{uuid.uuid4()}\n")

    def start(self, *command: object, private: Path | None = None, blind: bool = False) -> subprocess.Popen[str]:
        """Run something there; `private` is a folder that the others do not share, `blind` sees no locks of others."""
        entered = ["unshare", "-rmu", "sh", "-c", ENTER, "sh", self.name, str(self.boot), str(private or "")]
        return subprocess.Popen(
            [*entered, *map(str, command)],
            env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"} | ({BLIND: "1"} if blind else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def convert(self, source: Path, out: Path, seconds: float, *, blind: bool = False) -> subprocess.Popen[str]:
        """One process that converts."""
        return self.start(sys.executable, DRIVER, "run", source, out, seconds, *SCHEME, blind=blind)


@pytest.fixture
def hosts(tmp_path: Path) -> tuple[Host, Host]:
    both = (Host("alpha", tmp_path), Host("beta", tmp_path))
    probe = both[0].start("hostname")
    out, err = probe.communicate(timeout=60)
    if out != "alpha\n":
        pytest.skip(f"namespaces cannot be made here: {err.strip()}")
    return both


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hosts") / "bf16", text_config(num_hidden_layers=2))


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("hosts") / "reference"
    convert(source, out, scheme="FP8_DYNAMIC", max_shard_size="200kB")
    return contents(out)


def launch(
    hosts: tuple[Host, Host],
    source: Path,
    out: Path,
    seconds: float,
    *,
    private: Path | None = None,
    blind: bool = False,
) -> list[subprocess.Popen[str]]:
    """torchrun on both hosts, one process each; `private` and `blind` are the second one's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = []
    for number, host in enumerate(hosts):
        torchrun = ["-m", "torch.distributed.run", "--nnodes", 2, "--node-rank", number, "--nproc-per-node", 1]
        torchrun += ["--master-addr", "127.0.0.1", "--master-port", port]
        command = [sys.executable, *torchrun, DRIVER, "run", source, out, seconds, *SCHEME]
        nodes.append(host.start(*command, private=private if number else None, blind=blind and number == 1))
    return nodes


def end(process: subprocess.Popen[str]) -> str:
    """What it says on stderr, once it has ended."""
    return process.communicate(timeout=200)[1]


def kill_all(process: subprocess.Popen[str]) -> None:
    """The machine is gone: every process of its session, torchrun and ranks."""
    tree, pids = [process.pid], []
    while tree:
        pid = tree.pop()
        pids.append(pid)
        tree += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)


def test_two_machines_share_the_work(
    hosts: tuple[Host, Host], source: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    nodes = launch(hosts, source, out, 0.1)
    wait_for_items(nodes[0], out, 4)
    boots = [path.read_text() for path in sorted((out / STAGING).glob("journal-*.jsonl"))]
    assert [host.boot.read_text().strip() in boot for host, boot in zip(hosts, boots, strict=True)] == [True, True]
    errors = [end(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert contents(out) == reference


def test_a_machine_that_is_lost_loses_little_and_another_one_continues(
    hosts: tuple[Host, Host], source: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    """The other machine does its own share and says what is missing; a third one, alone, does that."""
    out = tmp_path / "out"
    nodes = launch(hosts, source, out, 0.2)
    wait_for_items(nodes[0], out, 4)
    kill_all(nodes[1])
    error = end(nodes[0])
    assert nodes[0].returncode != 0
    assert "pieces of work are missing, because another process of this conversion has ended" in error
    assert not (out / "config.json").exists()
    finished = num_finished(out)
    assert finished >= 4
    again = Host("gamma", tmp_path).convert(source, out, 0)
    error = end(again)
    assert again.returncode == 0, error
    assert contents(out) == reference


def test_the_lock_of_a_live_process_on_another_machine_is_respected(
    hosts: tuple[Host, Host], source: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    """Also where the file system does not pass the lock on; once that process is dead, it is taken over."""
    out = tmp_path / "out"
    holder = hosts[0].convert(source, out, 3.0)
    wait_for_items(holder, out, 1)
    sees = hosts[1].convert(source, out, 0)
    blind = hosts[1].convert(source, out, 0, blind=True)
    assert "another process is writing to this folder (process " in (message := end(sees))
    assert " on alpha); wait for it" in message
    assert " on alpha), and this file system does not pass its lock on to beta" in end(blind)
    assert (sees.returncode, blind.returncode) == (1, 1)
    assert holder.poll() is None
    kill_all(holder)
    after = hosts[1].convert(source, out, 0, blind=True)
    error = end(after)
    assert after.returncode == 0, error
    assert contents(out) == reference


def test_an_interrupted_conversion_leaves_nothing_to_wait_for(
    hosts: tuple[Host, Host], source: Path, tmp_path: Path
) -> None:
    """A holder that ends in order removes its signature, so that the next one need not watch for its pulse."""
    out = tmp_path / "out"
    holder = hosts[0].convert(source, out, 0.3)
    wait_for_items(holder, out, 1)
    os.kill(children(holder.pid)[0] if children(holder.pid) else holder.pid, signal.SIGTERM)
    end(holder)
    assert (out / STAGING / "lock").read_bytes() == b""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("what", ["blind", "private"])
def test_machines_that_do_not_share_the_folder_or_its_locks_do_not_begin(
    hosts: tuple[Host, Host], source: Path, tmp_path: Path, what: str
) -> None:
    out = tmp_path / "shared" / "out"
    out.parent.mkdir()
    nodes = launch(hosts, source, out, 0, private=out.parent if what == "private" else None, blind=what == "blind")
    errors = [end(node) for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1]
    expected = (
        "process 1 on beta does not see the file locks (flock) of process 0"
        if what == "blind"
        else "process 1 on beta does not see the folder that process 0 sees under this name"
    )
    assert all(expected in error for error in errors), errors
    assert not list(out.rglob("*.safetensors"))
    assert not list(out.rglob("meeting-*"))


def test_the_watch_is_longer_than_several_pulses() -> None:
    assert SECONDS_TO_WATCH >= 4 * SECONDS_BETWEEN_PULSES
