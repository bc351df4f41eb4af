"""Members of a demo, each a process of its own that runs the real command line, once per line that it is given.

    python -m parley_deploy.member SOCKET

This program imports the client once and then forks a process for each member that it is asked for: eighteen members on a
laptop would otherwise spend their time importing. It has no key, no state and no connection, so members share nothing but
code. A member stands in its own folder. Its standard input has one JSON array of arguments per line; its standard output
answers with `{"out": line}` or `{"err": line}` for each line that the command prints, then `{"exit": code}`.
"""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO, Any, Final

REQUEST_BYTES: Final = 1 << 16
"""Longest request: a folder and a few variables."""


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


def member(folder: Path, environment: Mapping[str, str], commands: IO[str], answers: IO[str]) -> None:
    """Runs command lines until `commands` ends, in `folder`."""
    from parley.cli.app import run

    os.chdir(folder)
    os.environ.update(environment)
    out, err = _Lines("out", answers), _Lines("err", answers)
    sys.stdout, sys.stderr = out, err
    for line in commands:
        code = run(json.loads(line))
        out.end()
        err.end()
        _send(answers, {"exit": code})


def main(path: str) -> int:
    """Forks members on request until the other side of the socket is gone."""
    from parley.cli.app import preload, run

    preload()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        # What libraries import at the first command. There is no such key, so the command does nothing.
        run(["contact", "list", "--key", os.path.join(os.devnull, "none")])
    gc.freeze()
    # Members that end are nobody's to wait for here.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.connect(path)
        while True:
            data, files, _, _ = socket.recv_fds(asking, REQUEST_BYTES, 2)
            if not data:
                gc.unfreeze()
                return 0
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                asking.close()
                _child(json.loads(data), files)
            for file in files:
                os.close(file)
            asking.send(str(pid).encode())


def _child(request: dict[str, Any], files: list[int]) -> None:
    code = 1
    try:
        with os.fdopen(files[0], encoding="utf-8") as commands, os.fdopen(files[1], "w", encoding="utf-8") as answers:
            member(Path(request["folder"]), request["environment"], commands, answers)
        code = 0
    finally:
        # Threads of the client, such as one that listens for events, do not keep a member alive.
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
