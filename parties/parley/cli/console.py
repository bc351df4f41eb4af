"""What a command prints: plain lines for people, or JSON for programs; progress bars only on a terminal.

With `--json` every command prints one JSON value per line on standard output and nothing else there. Errors go to standard
error, with `--json` as `{"error": {...}}`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import typer

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LABEL_WIDTH = 10
"""Columns of the label in front of a line, as in `receipt   9f0c...11de`."""


class Bar(Protocol):
    """A progress bar of one step: absolute figures, so that a repeated call does no harm."""

    def __call__(self, done: int, total: int) -> None: ...


class Console:
    """Where a command's output goes."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json

    def line(self, label: str, text: str = "") -> None:
        """One labelled line for people."""
        if not self.as_json:
            gap = "" if len(label) < LABEL_WIDTH else "  "
            typer.echo(printable(f"{label:<{LABEL_WIDTH}}{gap}{text}".rstrip()))

    def text(self, text: str = "") -> None:
        """One line for people."""
        if not self.as_json:
            typer.echo(printable(text))

    def result(self, **values: Any) -> None:
        """The command's result for programs: one JSON object on one line."""
        if self.as_json:
            typer.echo(json.dumps(values, ensure_ascii=False, default=_plain))

    def note(self, text: str) -> None:
        """A remark on standard error, with and without --json."""
        typer.echo(printable(text), err=True)

    def columns(self, rows: Sequence[Sequence[str]]) -> None:
        """Rows of text in aligned columns."""
        if not self.as_json and rows:
            widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
            for row in rows:
                line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
                typer.echo(printable(line.rstrip()))

    def confirm(self, question: str, yes: bool) -> bool:
        """Asks; `yes` answers without asking. Without a terminal the answer is no."""
        if yes:
            return True
        if self.as_json or not sys.stdin.isatty():
            return False
        return typer.confirm(question)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Bars for the steps of long work."""
        bars = Progress(not self.as_json and sys.stderr.isatty())
        try:
            yield bars
        finally:
            bars.close()


class Progress:
    """Named bars. Without a terminal they show nothing: what is done is said by the lines that follow."""

    def __init__(self, shown: bool) -> None:
        self._rich: RichProgress | None = None
        self._tasks: dict[str, Any] = {}
        if shown:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            self._rich = Bars(
                TextColumn(f"{{task.description:<{LABEL_WIDTH - 1}}}"),
                BarColumn(24),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(compact=True),
                console=RichConsole(stderr=True),
                transient=True,
            )
            self._rich.start()

    def update(self, step: str, done: int, total: int) -> None:
        """Sets the bar of a step."""
        if self._rich is None:
            return
        if step not in self._tasks:
            self._tasks[step] = self._rich.add_task(step, total=max(total, 1))
        self._rich.update(self._tasks[step], completed=done, total=max(total, 1))

    def bar(self, step: str) -> Bar:
        """The bar of one step."""

        def update(done: int, total: int) -> None:
            self.update(step, done, total)

        return update

    def close(self) -> None:
        """Takes the bars away."""
        if self._rich is not None:
            self._rich.stop()
            self._rich = None


def printable(text: str) -> str:
    """Text for a terminal: what a coordinator or an agreement wrote moves no cursor and turns no line around."""
    return "".join(character if character.isprintable() or character in "\n\t" else "?" for character in text)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    return str(value)


def short(digest: bytes) -> str:
    """A digest as people compare it at a glance: the first and last two bytes. Not for decisions."""
    return f"{digest[:2].hex()}...{digest[-2:].hex()}"


def session_name(session: bytes) -> str:
    """A session as it is shown: the first eight hex digits in two groups."""
    return f"{session[:2].hex()}-{session[2:4].hex()}"


def plural(number: int, one: str, many: str | None = None) -> str:
    """`1 output`, `3 outputs`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def size(number: int) -> str:
    """Bytes for people, in decimal units."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} B"


def when(ms: int) -> str:
    """A time for people, in UTC."""
    from datetime import UTC, datetime

    try:
        moment = datetime.fromtimestamp(ms / 1000, UTC)
    except (OverflowError, ValueError, OSError):  # the coordinator says so, and may say anything
        return "no time"
    return f"{moment.day} {moment:%B}, {moment:%H:%M} UTC"


def ago(ms: int, now_ms: int) -> str:
    """How long ago, in one unit."""
    seconds = max(0, now_ms - ms) // 1000
    for name, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            return f"{plural(seconds // length, name)} ago"
    return f"{plural(seconds, 'second')} ago"
