"""`--config FILE`: flags from a YAML or JSON file; and `--help-all`, for flags that `--help` leaves out.

A command shows at most 20 flags. The rarer ones are documented in docs/cli.md and work like all others, on the command
line and in the file.
"""

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from llama4_quant.checkpoint.json_files import one_line, shown
from llama4_quant.errors import UsageError

MAX_BYTES = 2**20
"""Of a configuration file: more is a mistake."""


def configurable(*, rare: Sequence[str] = ()) -> Callable[[click.Command], click.Command]:
    """Give a command `--config FILE` and `--help-all`, and leave the `rare` flags out of `--help`."""

    def decorate(command: click.Command) -> click.Command:
        options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        for flag in rare:
            next(option for option in options if flag in option.opts).hidden = True
        command.params += [_config_option(), _help_all_option()]
        return command

    return decorate


def load_config(path: Path, context: click.Context) -> dict[str, Any]:
    """Read the values of a command's flags from a file.

    Args:
        path: a mapping in JSON (`.json`) or YAML. Keys are flags without the dashes in front, `_` and `-` being the
            same. A flag without a value is true or false; one that is repeatable takes a list.
        context: of the command.

    Returns:
        Values by the command's parameter names, to be used as defaults.

    Raises:
        UsageError: the file cannot be read, or a key or a value is wrong.
    """
    known = {
        _longest(option): option
        for option in context.command.params
        if isinstance(option, click.Option) and option.expose_value
    }
    values: dict[str, Any] = {}
    for given, value in _mapping(path).items():
        key = str(given).replace("-", "_")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
            raise UsageError(f"{path}: {context.info_name} has no flag {shown(given)}; {hint}")
        option = known[key]
        if option.name in values:
            raise UsageError(f"{path}: {key} is there twice")
        if value is not None:
            values[option.name or key] = _checked(f"{path}: {key}", option, value, context)
    return values


def _checked(where: str, option: click.Option, value: Any, context: click.Context) -> Any:
    """The value as click takes it from a default map, of the right kind."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise UsageError(f"{where} is {shown(value)}, expected true or false")
        return value
    items = value if option.multiple and isinstance(value, list) else [value]
    if any(isinstance(item, (dict, list, bool)) for item in items):
        kind = "texts or numbers" if option.multiple else "one text or number"
        raise UsageError(f"{where} is {shown(value)}, expected {kind} (words like 'yes' need quotes)")
    texts = [str(item) for item in items]  # as on the command line, so that 3.7 is no more an integer here than there
    try:
        option.type_cast_value(context, texts if option.multiple else texts[0])
    except click.BadParameter as error:
        raise UsageError(f"{where}: {one_line(error.message)}") from error
    return texts if option.multiple else texts[0]


def _mapping(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text in UTF-8 ({one_line(error)})") from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: expected at most {MAX_BYTES:,} bytes of flags, and the file is larger")
    found = _json(path, text) if path.suffix == ".json" else _yaml(path, text)
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected flags and their values, like 'group_size: 64', found {shown(found)}")
    return found


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: this is not JSON ({one_line(error)})") from error


def _yaml(path: Path, text: str) -> Any:
    import yaml  # noqa: PLC0415 - few runs need it

    try:
        return yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: this is not YAML ({one_line(error)})") from error


def _config_option() -> click.Option:
    return click.Option(
        ["--config"],
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        metavar="FILE",
        is_eager=True,  # before other flags look for their defaults
        expose_value=False,
        callback=_use_config,
        help="Flags from a YAML or JSON file, like 'group_size: 64'. Flags given here win.",
    )


def _use_config(context: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    if path is not None:
        context.default_map = {**(context.default_map or {}), **load_config(path, context)}


def _help_all_option() -> click.Option:
    return click.Option(
        ["--help-all"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_show_all,
        help="Show this and the rarer flags.",
    )


def _show_all(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value:
        return
    hidden = [option for option in context.command.params if isinstance(option, click.Option) and option.hidden]
    for option in hidden:
        option.hidden = False
    try:
        click.echo(context.get_help())
    finally:
        for option in hidden:
            option.hidden = True
    context.exit()


def _longest(option: click.Option) -> str:
    """The key of a flag: `--max-memory` is max_memory."""
    return max(option.opts, key=len).removeprefix("--").replace("-", "_")
