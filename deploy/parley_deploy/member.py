"""One member of a demo as a process of its own: runs the real command line, once per line that it is given.

    python -m parley_deploy.member FOLDER

Standard input has one JSON array of arguments per line; standard output answers with `{"out": line}` or `{"err": line}` for
each line that the command prints, then `{"exit": code}`. The process stands in its member's folder, with its key and state,
and imports the library once: seventeen parties on a laptop would otherwise spend their time importing.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable
from typing import IO


class _Lines(io.TextIOBase):
    """A text stream that forwards whole lines under a name."""

    def __init__(self, name: str, to: IO[str]) -> None:
        self._name = name
        self._to = to
        self._rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            _send(self._to, {self._name: line})
        return len(text)

    def flush(self) -> None:
        """Keeps a half line back: the reader takes whole lines."""

    def end(self) -> None:
        """Forwards a last line without its newline."""
        if self._rest:
            self.write("\n")


def _send(to: IO[str], message: dict[str, object]) -> None:
    to.write(json.dumps(message) + "\n")
    to.flush()


def main(arguments: Iterable[str]) -> int:
    """Answers command lines until standard input ends."""
    (folder,) = arguments
    os.chdir(folder)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    out, err = _Lines("out", answers), _Lines("err", answers)
    sys.stdout, sys.stderr = out, err
    from parley.cli.app import preload, run

    preload()
    for line in sys.stdin:
        code = run(json.loads(line))
        out.end()
        err.end()
        _send(answers, {"exit": code})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
