"""A process that runs commands of llama4-quant one after the other, with bounded memory, and says how each ended.

Reads one JSON list of arguments a line; answers one JSON object a line: exit code, what was printed, processor seconds,
and by how much the peak of resident memory is above what it was at the start. Started by sandbox.py.
"""

import contextlib
import io
import json
import os
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

import llama4_quant
from llama4_quant.cli.main import main
from llama4_quant.config import Llama4Config
from llama4_quant.errors import Llama4QuantError
from llama4_quant.runtime.processor import ProcessorSettings
from llama4_quant.runtime.sampling import GenerationSettings
from llama4_quant.runtime.tokenizer import Tokenizer

ADDRESS_SPACE = 2**30
"""How much more than at the start may be mapped: several times what the limits of the package allow."""


def limit_memory() -> None:
    """Let every further allocation beyond ADDRESS_SPACE fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def peak() -> int:
    """Bytes of the largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def library(arguments: list[str]) -> None:
    """Commands that the command line does not have."""
    command, path = arguments[0], Path(arguments[1])
    if command == "load":
        llama4_quant.load(path)
    elif command == "chat":
        Tokenizer.from_folder(path).render_chat([{"role": "user", "content": "hello"}])
    else:
        config = Llama4Config.from_file(path / "config.json")
        GenerationSettings.from_folder(path)
        if config.vision is not None:
            ProcessorSettings.from_folder(path, config.vision)


def run(arguments: list[str]) -> int:
    """Exit code of one command; errors are printed as the command line does."""
    try:
        if arguments[0] in {"load", "chat", "settings"}:
            library(arguments)
        else:
            with mock.patch.object(sys, "argv", ["llama4-quant", *arguments]):
                main()
    except SystemExit as ending:
        return int(ending.code or 0)
    except Llama4QuantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001 - whatever it is, it is what this looks for
        traceback.print_exc()
        return 3
    return 0


def answer(arguments: list[str], folder: str) -> dict[str, object]:
    """Run a command in a folder."""
    os.chdir(folder)
    out, err = io.StringIO(), io.StringIO()
    started = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    seconds = time.process_time() - started
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": seconds, "peak": peak()}


def serve() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what prints by accident must not look like an answer
    warnings.simplefilter("ignore")
    import transformers  # noqa: F401, PLC0415 - seconds that belong to no case

    limit_memory()
    print(json.dumps({"peak": peak()}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(request["arguments"], request["folder"])), file=answers)


if __name__ == "__main__":
    serve()
