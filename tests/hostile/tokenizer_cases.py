"""Tokenizers and chat templates that try to run code or to be somewhere else."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hostile.cases import Bases, Case

from llama4_quant import sample

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
REFUSED = "the chat template does not take these messages: .*"

TEMPLATES = {
    "subclasses": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", REFUSED + "unsafe"),
    "os through globals": (
        "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}",
        REFUSED + "(unsafe|undefined|no attribute)",
    ),
    "format string": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", REFUSED + "(unsafe|attribute)"),
    "import": ("{% import 'os' as os %}{{ os }}", REFUSED),
    "include": ("{% include '/etc/passwd' %}", REFUSED),
    "extends": ("{% extends '/etc/passwd' %}", REFUSED),
    "changes the messages": ("{{ messages.append(1) }}", REFUSED + "unsafe"),
    "range of 10^9": ("{{ range(10**9) | list }}", REFUSED + "[Rr]ange"),
    "20 GB of text": ("{{ 'a' * 20000000000 }}", REFUSED + "it took more than 512 MiB"),
    "20 GB of padding": ("{{ 'a'.ljust(20000000000) }}", REFUSED + "it took more than 512 MiB"),
    "20 MB of text": ("{{ 'a' * 20000000 }}", REFUSED + "it wrote more than 16 MiB"),
    "loops without end": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        REFUSED + "it took more than 5 s",
    ),
    "not a template": ("{% for %}", REFUSED),
    "endless": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", REFUSED + "recursion"),
    "message with a terminal escape": ("{{ raise_exception('\x1b[2J' * 1000) }}", REFUSED),
    "message of a megabyte": ("{{ raise_exception('x' * 1000000) }}", REFUSED),
}


def _case(name: str, change: Callable[[Path], object], message: str) -> Case:
    def make(root: Path, _bases: Bases) -> None:
        model = root / "model"
        model.mkdir()
        for file in FILES:
            shutil.copy(Path(sample.__file__).parent / "model" / file, model)
        change(model)

    return Case(name=name, make=make, commands=("chat",), message=message)


def _template(text: str) -> Callable[[Path], object]:
    return lambda model: (model / "chat_template.jinja").write_text(text)


def _replaced(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / file).unlink(missing_ok=True)
        make(model / file)

    return change


def _own_code(model: Path) -> None:
    """A tokenizer that is code of the checkpoint's own."""
    (model / "evil.py").write_text("open('ran', 'w')\nclass Evil: pass\n")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))


def tokenizer_cases() -> list[Case]:
    """All of them."""
    damaged = "tokenizer.json|cannot be loaded"
    return [
        *(_case(f"template: {name}", _template(text), message) for name, (text, message) in TEMPLATES.items()),
        _case("tokenizer: pipe", _replaced("tokenizer.json", os.mkfifo), damaged),
        _case("tokenizer: /dev/zero", _replaced("tokenizer.json", lambda p: p.symlink_to("/dev/zero")), damaged),
        _case("tokenizer: garbage", _replaced("tokenizer.json", lambda p: p.write_bytes(b"\xff" * 1000)), damaged),
        _case("tokenizer: nested", _replaced("tokenizer.json", lambda p: p.write_bytes(b"[" * 10**6)), damaged),
        _case("tokenizer: config is a pipe", _replaced("tokenizer_config.json", os.mkfifo), "tokenizer|template"),
        _case("tokenizer: own code", _own_code, "tokenizer|template"),
    ]
