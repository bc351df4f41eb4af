"""In place of the enclave's own program, in an image of the tests: streams to measure, and the kernel's module unchanged.

The first byte of a connection says what it is: `e` echoes, `s` takes as many bytes as the next eight say and then says so,
`g` gives them, `n` passes requests to /dev/nsm: u32 big-endian length and message, both ways.
"""

from __future__ import annotations

import socket
import sys
import threading
from typing import BinaryIO

PIECE = 1 << 16


def main() -> None:
    """Listens where --listen says, each connection in a thread."""
    kind, _, place = sys.argv[sys.argv.index("--listen") + 1].partition(":")
    if kind == "vsock":
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, int(place)))
    else:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(place)
    listener.listen(128)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


def serve(connection: socket.socket) -> None:
    """One connection."""
    with connection, connection.makefile("rb") as stream:
        match stream.read(1):
            case b"e":
                while data := stream.read1(PIECE):  # type: ignore[attr-defined]
                    connection.sendall(data)
            case b"s":
                left = int.from_bytes(stream.read(8), "big")
                while left:
                    left -= len(stream.read1(min(left, PIECE)))  # type: ignore[attr-defined]
                connection.sendall(b"!")
            case b"g":
                left, piece = int.from_bytes(stream.read(8), "big"), bytes(PIECE)
                while left:
                    connection.sendall(piece[:left])
                    left -= min(left, PIECE)
            case b"n":
                pass_requests(connection, stream)


def pass_requests(connection: socket.socket, stream: BinaryIO) -> None:
    """Requests and responses as they are."""
    from parley_enclave.device import open_device

    device = open_device("dev:/dev/nsm")
    while header := stream.read(4):
        answer = device.request(stream.read(int.from_bytes(header, "big")))
        connection.sendall(len(answer).to_bytes(4, "big") + answer)


if __name__ == "__main__":
    main()
