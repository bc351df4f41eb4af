"""Exit codes: one table, printed by `parley --help`, and the one place where an error becomes a line and a code."""

from __future__ import annotations

from enum import IntEnum
from errno import EDQUOT, EFBIG, ENOSPC
from typing import Final


class Exit(IntEnum):
    """What a command ends with."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    DATA = 3
    UNAVAILABLE = 4
    LOST = 5
    INTERNAL = 70
    STOPPED = 130


MEANING: Final[dict[Exit, str]] = {
    Exit.DONE: "done",
    Exit.REFUSED: "refused: something did not verify, or somebody said no; nothing more was sent",
    Exit.USAGE: "usage: an unknown option or name, or a file that is not there",
    Exit.DATA: "data: your table or agreement has an error; the line says where",
    Exit.UNAVAILABLE: "unavailable, or not yet: run the same line again later",
    Exit.LOST: "the session is lost: join the next one; nothing is uploaded twice",
    Exit.INTERNAL: "an error in parley itself: run again with --debug and report it",
    Exit.STOPPED: "stopped by Ctrl-C: run the same line again",
}


class Failure(Exception):
    """A command cannot go on: a line for people, an exit code, and a stable code for programs."""

    def __init__(self, message: str, code: Exit = Exit.USAGE, name: str = "usage") -> None:
        super().__init__(message)
        self.code = code
        self.name = name


_DATA: Final = frozenset({"schema", "order", "domain", "range", "multiplicity", "rows", "data", "nesting", "memory"})
_LATER: Final = frozenset({"busy", "phase", "quota", "no-capacity", "unavailable"})
_UNKNOWN: Final = frozenset({"unknown-session", "unknown-agreement", "unknown-upload"})


def code_of(name: str) -> Exit:
    """The exit code for a stable code of `parley_protocol.errors.CODES`."""
    if name in _DATA:
        return Exit.DATA
    if name in _LATER:
        return Exit.UNAVAILABLE
    if name in _UNKNOWN:
        return Exit.USAGE
    if name == "lost":
        return Exit.LOST
    return Exit.INTERNAL if name == "internal" else Exit.REFUSED


def describe(error: Exception) -> tuple[str, str, Exit]:
    """(line for people, stable code, exit code) of anything that a command raised."""
    from parley_protocol.errors import AgreementError, DataError, ParleyError, StateError, UnavailableError

    if isinstance(error, Failure):
        return str(error), error.name, error.code
    if isinstance(error, ParleyError):
        if isinstance(error, DataError | AgreementError):
            code = Exit.DATA
        elif isinstance(error, UnavailableError):
            code = Exit.UNAVAILABLE if error.code != "lost" else Exit.LOST
        elif isinstance(error, StateError):
            code = Exit.REFUSED
        else:
            code = code_of(error.code)
        # A table is read to its end before anything is sealed.
        said = f"{error.message}.  Nothing was sent." if isinstance(error, DataError) else error.message
        return said, error.code, code
    if isinstance(
        error, FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError | FileExistsError
    ):
        return f"{error.filename}: {error.strerror}", "file", Exit.USAGE
    if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG):
        return f"{error.filename or 'the disk'}: {error.strerror}", "file", Exit.UNAVAILABLE
    # The text of a foreign error may quote a value of the data, so only its type is shown.
    return f"an error in parley itself ({type(error).__name__})", "internal", Exit.INTERNAL


def epilog() -> str:
    """The table of exit codes as help text."""
    rows = "\n".join(f"  {code.value:<4}{MEANING[code]}" for code in Exit)
    return f"\b\nExit codes:\n{rows}\n"
