"""A launcher's command that puts a wire between coordinator and enclave: `launch.py CONTROL COMMAND... --dir DIR ...`.

The real command starts the enclave in DIR/r. Whoever listens at the socket CONTROL is asked to make DIR/enclave.sock, the
host's end of the wire. It needs nothing but the standard library: it is started for every enclave.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INNER = "r"
"""Folder of the real enclave in the one that the launcher knows."""


def main(arguments: Sequence[str]) -> int:
    """Starts the enclave; 0 when the host's end of the wire listens."""
    control, *command = arguments
    place = command.index("--dir") + 1
    folder = Path(command[place])
    inner = folder / INNER
    command[place] = str(inner)
    inner.mkdir(mode=0o700, exist_ok=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        return code
    for name in ("nsm.pid", "enclave.pid"):
        shutil.copy(inner / name, folder / name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.connect(control)
        asking.sendall(f"{folder}\n".encode())
        return 0 if asking.recv(1) == b"+" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
