"""The module as a virtio device (id 33): `/dev/nsm` of the guest, answered by the simulated NSM.

Linux queues a request and the buffer for its response as two chains, one after the other; a chain that holds both is
answered as well. A reset of the device changes no register, as nothing that a guest does brings a locked one back: a new
boot is a new device with a new module.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import cbor2

from parley_deploy.emulator.loop import Loop
from parley_deploy.emulator.vhost import Chain, Device, GuestError
from parley_deploy.nsm import SimulatedNsm
from parley_protocol import limits

VIRTIO_ID: Final = 33


class NsmDevice(Device):
    """One module of one guest."""

    queues = 1

    def __init__(
        self, loop: Loop, path: Path, module: SimulatedNsm, failed: Callable[[GuestError], None] | None = None
    ) -> None:
        self._module = module
        self._request: bytes | None = None
        super().__init__(loop, path, failed=failed)

    def kicked(self, index: int) -> None:
        """Answers the requests that wait."""
        ring = self.rings[index]
        answered = False
        while (chain := ring.take()) is not None:
            if chain.readable:
                # One byte more than the module takes: it says itself that this is too much.
                self._request = chain.read(limits.NSM_REQUEST_BYTES + 1)
            ring.finish(chain, self._respond(chain) if chain.writable else 0)
            answered = True
        if answered:
            ring.notify()

    def stopped(self) -> None:
        """Forgets a request whose buffer for the response did not come."""
        self._request = None

    def _respond(self, chain: Chain) -> int:
        """How many bytes were written: none without a request or for a buffer that takes not even an error."""
        if self._request is None:
            return 0
        response = self._module.request(self._request)
        self._request = None
        room = chain.writable_bytes
        if len(response) > room:
            response = cbor2.dumps({"Error": "BufferTooSmall"})
        if len(response) > room:
            return 0
        chain.write(response)
        return len(response)
