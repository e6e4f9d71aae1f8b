"""Turn by turn: what a line of input does in a chat.

Answers go to stdout; what is said about them, and what commands say, to stderr.
"""

import contextlib
import difflib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

import click

from llama4_quant.cli.summary import answer_json, summary_line
from llama4_quant.cli.tables import size
from llama4_quant.errors import Llama4QuantError, UsageError
from llama4_quant.runtime.chat import ChatSession, Reply
from llama4_quant.runtime.image_files import rgb_pixels

PROMPT = "> "


class ChatLoop:
    """Reads messages and commands, and shows answers."""

    def __init__(self, session: ChatSession, images: Sequence[Path], *, quiet: bool, as_json: bool) -> None:
        """Begin with images that go with the first message."""
        self._session = session
        self._images = list(images)
        self._quiet = quiet
        self._as_json = as_json
        self._saved: set[Path] = set()
        self._last = "there was no answer yet"
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/image": (self._image, "/image PATH    show an image with the next message"),
            "/system": (self._system, "/system TEXT   change what the model is told beforehand; without TEXT: nothing"),
            "/reset": (self._reset, "/reset         forget all messages"),
            "/save": (self._save, "/save FILE     write the chat as JSON"),
            "/stats": (self._stats, "/stats         counts and speeds of the last answer, and what the cache holds"),
            "/help": (self._help, "/help          this; //... says something that begins with a slash"),
            "/exit": (self._help, "/exit          end, like Ctrl-D"),
        }

    def run(self, *, is_terminal: bool) -> bool:
        """Go on until there is no more input, or /exit.

        Args:
            is_terminal: ask with a prompt, and let Ctrl-C interrupt an answer instead of the program.

        Returns:
            Whether every line could be carried out.
        """
        all_well = True
        for line in _lines_of_terminal() if is_terminal else _lines_of_stdin():
            text = line.strip()
            if text == "/exit":
                break
            try:
                self._carry_out(text, is_terminal=is_terminal)
            except (Llama4QuantError, OSError) as error:
                if isinstance(error, BrokenPipeError):  # nobody reads the answers
                    raise
                click.echo(f"error: {error}", err=True)
                all_well = False
        return all_well

    def _carry_out(self, text: str, *, is_terminal: bool) -> None:
        if text.startswith("//"):
            self._answer(text[1:], is_terminal=is_terminal)
        elif text.startswith("/"):
            name, _, argument = text.partition(" ")
            if name not in self._commands:
                close = difflib.get_close_matches(name, self._commands, n=1)
                hint = f"did you mean {close[0]}?" if close else "/help lists them"
                raise UsageError(f"{name} is no command; {hint} (to say it, begin with //)")
            self._commands[name][0](argument.strip())
        elif text:
            self._answer(text, is_terminal=is_terminal)

    def _answer(self, text: str, *, is_terminal: bool) -> None:
        with _CtrlC() if is_terminal else contextlib.nullcontext() as ctrl_c:
            reply = None
            try:
                reply = self._session.send(text, self._images)
                self._show(reply, ctrl_c)
            except KeyboardInterrupt:
                if ctrl_c is None:
                    raise
            if reply is not None:
                reply.close()
        if reply is None or (reply.completion.finish_reason is None and not reply.completion.text):
            click.echo("(interrupted before the answer began: the message is forgotten)", err=True)
            return
        self._images = []
        self._finish(reply)

    def _show(self, reply: Reply, ctrl_c: "_CtrlC | None") -> None:
        for piece in reply:
            if not self._as_json:
                click.echo(piece, nl=False)
            if ctrl_c is not None:
                ctrl_c.can_wait = True
                if ctrl_c.was_pressed:
                    return

    def _finish(self, reply: Reply) -> None:
        completion, timing = reply.completion, reply.timing
        if self._as_json:
            cached = {"num_cached_tokens": timing.num_cached_tokens}
            click.echo(json.dumps({**answer_json(completion, timing), **cached}))
        else:
            click.echo()
        ended_by = "Ctrl-C" if completion.finish_reason is None else str(completion.finish_reason)
        self._last = summary_line(timing, timing.first_token_seconds, ended_by)
        if not self._quiet:
            click.echo(f"[{self._last}]", err=True)

    def _image(self, argument: str) -> None:
        if not argument:
            raise UsageError("/image needs a file: /image cat.jpg")
        path = Path(argument).expanduser()
        self._session.check_takes_images()
        rgb_pixels(path)  # so that a mistake is told here, and not with the next message
        self._images.append(path)
        self._say(f"{len(self._images)} image{'s' if len(self._images) > 1 else ''} with the next message")

    def _system(self, argument: str) -> None:
        self._session.system = argument or None
        self._say("the system message is new; the chat is computed again" if argument else "there is no system message")

    def _reset(self, _argument: str) -> None:
        self._session.reset()
        self._images = []
        self._say("all messages are forgotten")

    def _save(self, argument: str) -> None:
        if not argument:
            raise UsageError("/save needs a file: /save chat.json")
        path = Path(argument).expanduser()
        if path not in self._saved and path.exists():
            raise UsageError(f"{path} exists; choose another name")
        path.write_text(json.dumps({"messages": self._session.messages}, indent=1) + "\n", encoding="utf-8")
        self._saved.add(path)
        self._say(f"wrote {path}")

    def _stats(self, _argument: str) -> None:
        session = self._session
        self._say(
            f"last answer: {self._last}\n{len(session.messages)} messages; the cache holds {session.num_cached_tokens} "
            f"of at most {session.max_tokens} tokens in {size(session.num_cache_bytes)}"
        )

    def _help(self, _argument: str) -> None:
        self._say("\n".join(text for _, text in self._commands.values()))

    def _say(self, text: str) -> None:
        """Answer a command, also with --quiet: who gives one wants to know."""
        click.echo(text, err=True)


class _CtrlC:
    """While an answer comes, Ctrl-C ends it after the token in hand.

    Before the first token, which may take minutes, or if it is pressed again, it raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.can_wait = False
        self.was_pressed = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_exception: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, _number: int, _frame: FrameType | None) -> None:
        is_urgent = self.was_pressed or not self.can_wait
        self.was_pressed = True  # first: where it is raised now, in a hook of `fork` for one, it may be swallowed
        if is_urgent:
            raise KeyboardInterrupt


def _lines_of_stdin() -> Iterator[str]:
    yield from sys.stdin


def _lines_of_terminal() -> Iterator[str]:
    """Lines that are typed, with history and editing; Ctrl-C drops one, Ctrl-D ends."""
    with contextlib.suppress(ImportError):  # a Python without it can still read lines
        import readline  # noqa: F401, PLC0415 - `input` uses it once it is there
    while True:
        try:
            yield input(PROMPT)
        except KeyboardInterrupt:
            click.echo("\n(Ctrl-D or /exit ends the chat)", err=True)
        except EOFError:
            click.echo()
            return
