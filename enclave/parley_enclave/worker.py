"""A worker: `python -m parley_enclave.worker FD [confined]`, where FD is its end of a socket pair with the main process.

It holds no key but those of the uploads that it works on, and opens no connection: each task brings one of the host's.
A parcel in is one of
    ["context", guard key, [[party, table, header, blob, frame key, rows]...]] + canonical agreement, then the
        index and the tags of each source
    ["admit", party, table, header, blob, frame key, frames digest, guard key] + canonical agreement
    ["scan", number of the range]
and the answer to the last two is any number of ["progress", percent], then ["done"] with parts, ["refused", code],
["unserved"] or ["failed", place].
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from parley_enclave import exchange
from parley_enclave.confine import confine_worker
from parley_enclave.exchange import Parcel
from parley_protocol import limits
from parley_protocol.agreement.canonical import parse
from parley_protocol.agreement.model import Agreement
from parley_protocol.errors import RefusedError
from parley_protocol.table import Layout
from parley_protocol.transcript import UploadHeader


class Worker:
    """The tasks of one worker, one after the other."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._plan: Any = None
        self._guard_key = b""
        self._told = 0.0

    def run(self) -> None:
        """Works until the main process is gone."""
        while True:
            try:
                parcel, fds = exchange.receive_with_files(self._control)
            except EOFError:
                return
            if parcel.fields[:1] == ["context"]:
                self._context(parcel)
                continue
            (fd,) = fds
            with socket.socket(fileno=fd) as connection:
                fields, parts = self._answer(parcel, connection)
            exchange.send(self._control, fields, parts)

    def _answer(self, parcel: Parcel, connection: socket.socket) -> tuple[list[str], tuple[bytes, ...]]:
        # Here and not above: numpy is not needed before the first task.
        from parley_enclave.engine.frames import FrameError
        from parley_enclave.serve import Serve, UnservedError

        serve = Serve(connection)
        try:
            if parcel.fields[0] == "admit":
                return ["done"], self._admit(parcel, serve)
            return ["done"], self._scan(parcel, serve)
        except UnservedError:
            return ["unserved"], ()
        except FrameError:
            return ["refused", "frame"], ()
        except RefusedError as refusal:
            return ["refused", refusal.code], ()
        except Exception as error:  # noqa: BLE001  # whatever it is, it must not end the thread
            return ["failed", _place(error)], ()

    def _admit(self, parcel: Parcel, serve: Any) -> tuple[bytes, ...]:
        from parley_enclave.engine import admit

        # The main process sends nothing else; what it sends is not checked again.
        fields: list[Any] = list(parcel.fields)
        _, party, table, header, blob, frame_key, frames_digest, guard_key = fields
        agreement = parse(parcel.parts[0])
        source = _source(agreement, [party, table, header, blob, frame_key])
        admitted = admit(source, agreement, frames_digest, guard_key, serve.pull, self._progress)
        return admitted.rows.to_bytes(8, "big"), admitted.index, admitted.tags

    def _context(self, parcel: Parcel) -> None:
        from parley_enclave.engine import Admitted, plan

        fields: list[Any] = list(parcel.fields)
        _, guard_key, sources = fields
        agreement = parse(parcel.parts[0])
        arrays = iter(parcel.parts[1:])
        self._guard_key = guard_key
        self._plan = plan(
            agreement,
            [
                (_source(agreement, item[:5]), Admitted(rows=item[5], index=next(arrays), tags=next(arrays)))
                for item in sources
            ],
        )

    def _scan(self, parcel: Parcel, serve: Any) -> tuple[bytes, ...]:
        from parley_enclave.engine import scan

        fields: list[Any] = list(parcel.fields)
        return (scan(self._plan, fields[1], self._guard_key, serve.pull, self._progress),)

    def _progress(self, percent: int) -> None:
        now = time.monotonic()
        if now - self._told >= limits.PROGRESS_MS / 2000:
            self._told = now
            exchange.send(self._control, ["progress", percent])


def _source(agreement: Agreement, fields: list[Any]) -> Any:
    from parley_enclave.engine import Source

    party, table, header_bytes, blob, frame_key = fields
    header = UploadHeader.from_bytes(header_bytes)
    layout = Layout.of(header, agreement.tables[table].widths)
    return Source(party=party, table=table, header=header, layout=layout, blob=blob, frame_key=frame_key)


def _place(error: BaseException) -> str:
    """Type and line of code of an error: never its text, which may hold a value."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return type(error).__name__
    return f"{type(error).__name__} at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


def _end_with(control: socket.socket) -> None:
    """Ends this process as soon as the main one is gone, also in the middle of a pull."""
    poll = select.poll()
    poll.register(control, 0)
    poll.poll()
    os._exit(0)


def main() -> None:
    """Runs a worker on the file descriptor that is the first argument."""
    if sys.argv[2:] == ["confined"]:
        confine_worker()
    # Ctrl-C is for the main process, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(control,), daemon=True).start()
    Worker(control).run()


if __name__ == "__main__":
    main()
