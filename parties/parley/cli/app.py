"""The `parley` command: its commands, and the way in and out that they share.

Modules of commands import nothing heavy at their top: `parley --help` reads them all. Commands of other roles (`demo`,
`local`) come in through the entry-point group `parley.commands`, so that the client imports no other role.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, Any, Final, ParamSpec

import typer
from typer.core import TyperCommand, TyperGroup

from parley.cli.exits import Exit, describe, epilog

P = ParamSpec("P")

ENTRY_POINTS: Final = "parley.commands"
PLUGIN_HELP: Final = {
    "demo": "Whole computations on real data, on this machine.",
    "local": "A coordinator with simulated enclaves on this machine.",
}
"""Lines of help for commands of other roles, so that they are listed without being loaded."""
SETTINGS: Final[dict[str, Any]] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def make_app(help_text: str, cls: type[TyperGroup] = TyperGroup) -> typer.Typer:
    """A group of commands with the settings that all groups share."""
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=SETTINGS,
        cls=cls,
    )


def command(app: typer.Typer, name: str, **settings: Any) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Registers a command whose errors end as one line and an exit code, never as a traceback (but with --debug)."""

    def register(function: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                function(*args, **kwargs)
            except KeyboardInterrupt:
                typer.echo("\nstopped; what was sent stays sent: run the same line again", err=True)
                raise typer.Exit(Exit.STOPPED) from None
            except BrokenPipeError:
                # The reader of the output went away, as `head` does.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(Exit.DONE) from None
            except typer.Exit:
                raise
            except Exception as error:
                raise typer.Exit(_report(error, as_json=kwargs.get("as_json") is True)) from None

        # Annotations are texts: they mean what they mean in the command's own module, not in this one.
        run.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
        app.command(name, help=inspect.getdoc(function), **settings)(run)
        return run

    return register


def _report(error: Exception, *, as_json: bool) -> int:
    import json

    if _settings.debug:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    message, name, code = describe(error)
    # What the other side wrote reaches no terminal as control codes.
    message = "".join(character if character.isprintable() or character == "\n" else "?" for character in message)
    if as_json:
        details = {"code": name, "exit": int(code), "message": message}
        for field in ("step", "row", "column"):
            if getattr(error, field, None) is not None:
                details[field] = getattr(error, field)
        typer.echo(json.dumps({"error": details}, ensure_ascii=False), err=True)
    else:
        typer.echo(message, err=True)
    return int(code)


@dataclass(slots=True)
class _Settings:
    """What stands before the command. Set anew by each command line."""

    debug: bool = False


_settings = _Settings()


class _Plugins(TyperGroup):
    """The commands of this package, and by name those of installed roles, which are loaded when they run."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, this package's own first."""
        own = super().list_commands(ctx)
        return [*own, *(name for name in sorted(_plugins()) if name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, for a plug-in a stand-in that knows its line of help."""
        own = super().get_command(ctx, cmd_name)
        if own is None and cmd_name in _plugins():
            return TyperCommand(cmd_name, help=PLUGIN_HELP.get(cmd_name, f"From {_plugins()[cmd_name].module}."))
        return own

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that runs, loaded where it is a plug-in's."""
        name = args[0]
        if super().get_command(ctx, name) is None and name in _plugins():
            loaded = typer.main.get_command(_plugins()[name].load())
            loaded.name = name
            return name, loaded, args[1:]
        return super().resolve_command(ctx, args)


@functools.cache
def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


app = make_app(
    "Compute together over data that nobody shows to anybody.\n\n"
    "A first session: keygen, contact add, agreement sign, submit, fetch, show. `parley demo flights` shows all of it.",
    _Plugins,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"parley {version('parley')}")
        raise typer.Exit


@app.callback(epilog=epilog())
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (also PARLEY_DEBUG=1).")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    _settings.debug = debug or os.environ.get("PARLEY_DEBUG", "") not in ("", "0")


def build() -> typer.Typer:
    """The whole application, with the commands of installed roles."""
    from parley.cli import agreements, images, keeping, kms, members, releases, sessions

    for module in (members, agreements, sessions, releases, images, kms, keeping):
        module.register(app)
    return app


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. Each call stands alone; a process may call it many times."""
    try:
        _command()(args=None if arguments is None else list(arguments), prog_name="parley", standalone_mode=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(Exit.DONE if end.code is None else Exit.REFUSED)
    return int(Exit.DONE)


def preload() -> None:
    """Imports what commands import when they run, so that the first one of a long-lived process is as fast as the next."""
    for name in ("parley.connection", "parley.reading", "parley.release", "parley.cli.summary"):
        import_module(name)
    _command()


@functools.cache
def _command() -> Callable[..., Any]:
    return typer.main.get_command(build())
