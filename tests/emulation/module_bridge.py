"""In place of the enclave's own program, in an image of the tests: gives the host the kernel's security module, unchanged.

Over vsock, as the simulated module speaks over its socket: u32 big-endian length, then the message, both ways.
"""

from __future__ import annotations

import socket

from parley_enclave.device import open_device
from parley_protocol.framing import ENCLAVE_PORT


def main() -> None:
    """Serves one connection after the other, for ever."""
    device = open_device("dev:/dev/nsm")
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((socket.VMADDR_CID_ANY, ENCLAVE_PORT))
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rwb") as stream:
                while header := stream.read(4):
                    answer = device.request(stream.read(int.from_bytes(header, "big")))
                    stream.write(len(answer).to_bytes(4, "big") + answer)
                    stream.flush()


if __name__ == "__main__":
    main()
