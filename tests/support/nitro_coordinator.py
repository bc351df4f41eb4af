"""`parley-coordinator run` on a played parent: python nitro_coordinator.py COORDINATOR_FOLDER HOST_FOLDER.

All is as the daemon does it, but for the address of an enclave: a played one's vsock port is a Unix socket.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from pathlib import Path

from parley_coordinator import config, log, server
from parley_coordinator.clock import now_ms
from parley_coordinator.nitro import NitroLauncher

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import nitro_host  # the folder of the tests is not installed


def main() -> None:
    """Runs until SIGTERM."""
    found = config.load(Path(sys.argv[1]) / config.FILE)
    log.setup(found.log_level)
    address = partial(nitro_host.address, Path(sys.argv[2]))
    asyncio.run(server.serve(found, NitroLauncher(found.nitro, found.enclaves, now_ms, address)))


if __name__ == "__main__":
    main()
