"""The Nitro Security Module, simulated request for request, in the device's own CBOR messages.

Source: aws-nitro-enclaves-nsm-api (messages, error codes), the Linux driver (sizes), QEMU's virtio-nsm (registers). Its
documents have the form of real ones, down to the order of their keys, and are signed under a local root. It lives in a
role that no image contains, so that no image can certify itself.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Final, Self

import cbor2

from parley_deploy.measure import image_measurements
from parley_deploy.pki import Chain, LocalRoot, system_now_ms
from parley_protocol import cose, limits
from parley_protocol.attestation.document import ZERO_PCR, extended
from parley_protocol.encoding import Value, decode, sha384
from parley_protocol.errors import MalformedError

__all__ = ["LocalRoot", "SimulatedNsm", "image_measurements", "serve"]

RANDOM_BYTES: Final = 256
"""What one GetRandom gives."""
BOOT_PCRS: Final = 16
"""Registers 0 to 15 are the hypervisor's: locked before the enclave runs."""
INSTANCE_PCR: Final = 4
VERSION: Final = (1, 2, 0)

_U16: Final = range(1 << 16)
_LENGTH: Final = struct.Struct(">I")


class _Refused(Exception):
    """The module answers with an error code of its own."""


class SimulatedNsm:
    """One module of one enclave. `pcrs`: the measured registers (0, 1, 2 and, where wanted, 3 and 8), 48 bytes each.

    `now_ms` is the module's clock and `random` its source of randomness (count in, bytes out). Threads may share one.
    """

    def __init__(
        self,
        root: LocalRoot,
        pcrs: Mapping[int, bytes],
        *,
        now_ms: Callable[[], int],
        random: Callable[[int], bytes],
    ) -> None:
        self._now_ms = now_ms
        self._random = random
        self._mutex = threading.Lock()
        instance = f"i-0{random(8).hex()}"
        self.module_id: Final = f"{instance}-enc{random(8).hex()}"
        self._chain = Chain(root, self.module_id, random=random)
        self._registers = dict.fromkeys(range(limits.PCRS), ZERO_PCR)
        self._registers[INSTANCE_PCR] = extended(instance.encode())
        for index, value in pcrs.items():
            if index not in range(BOOT_PCRS) or len(value) != limits.PCR_BYTES:
                raise ValueError(f"register {index} is not one of 0 to {BOOT_PCRS - 1} with 48 bytes")
            self._registers[index] = value
        self._locked = set(range(BOOT_PCRS))

    @classmethod
    def create(cls, root: LocalRoot, pcrs: Mapping[int, bytes]) -> Self:
        """A module with this machine's clock and randomness."""
        return cls(root, pcrs, now_ms=system_now_ms, random=os.urandom)

    def request(self, message: bytes) -> bytes:
        """The response to one request. What is wrong with a request is said in the response, as the device does."""
        with self._mutex:
            try:
                answer = self._answer(message)
            except _Refused as refused:
                answer = {"Error": str(refused)}
        response: bytes = cbor2.dumps(answer)
        if len(response) > limits.NSM_RESPONSE_BYTES:
            return cbor2.dumps({"Error": "BufferTooSmall"})
        return response

    def _answer(self, message: bytes) -> object:
        if len(message) > limits.NSM_REQUEST_BYTES:
            raise _Refused("InputTooLarge")
        try:
            request = decode(message, foreign=True)
        except MalformedError:
            raise _Refused("InvalidOperation") from None
        if request == "DescribeNSM":
            return {"DescribeNSM": self._describe()}
        if request == "GetRandom":
            return {"GetRandom": {"random": self._random(RANDOM_BYTES)}}
        if type(request) is not dict or len(request) != 1:
            raise _Refused("InvalidOperation")
        ((name, fields),) = request.items()
        if type(fields) is not dict:
            raise _Refused("InvalidOperation")
        match name:
            case "DescribePCR":
                index = self._index(_fields(fields, "index"))
                return {name: {"lock": index in self._locked, "data": self._registers[index]}}
            case "ExtendPCR":
                index = self._writable(_fields(fields, "index", "data"))
                data = fields["data"]  # type: ignore[index]
                if type(data) is not bytes:
                    raise _Refused("InvalidArgument")
                self._registers[index] = sha384(self._registers[index] + data)
                return {name: {"data": self._registers[index]}}
            case "LockPCR":
                self._locked.add(self._writable(_fields(fields, "index")))
                return name
            case "LockPCRs":
                count = _fields(fields, "range")["range"]
                if type(count) is not int or count not in _U16:
                    raise _Refused("InvalidArgument")
                if count > limits.PCRS:
                    raise _Refused("InvalidIndex")
                self._locked.update(range(count))
                return name
            case "Attestation":
                return {name: {"document": self._attest(_fields(fields, "user_data", "nonce", "public_key"))}}
        raise _Refused("InvalidOperation")

    def _describe(self) -> dict[str, object]:
        return {
            "version_major": VERSION[0],
            "version_minor": VERSION[1],
            "version_patch": VERSION[2],
            "module_id": self.module_id,
            "max_pcrs": limits.PCRS,
            "locked_pcrs": sorted(self._locked),
            "digest": "SHA384",
        }

    def _index(self, fields: Mapping[str, Value]) -> int:
        index = fields["index"]
        if type(index) is not int or index not in _U16:
            raise _Refused("InvalidArgument")
        if index >= limits.PCRS:
            raise _Refused("InvalidIndex")
        return index

    def _writable(self, fields: Mapping[str, Value]) -> int:
        index = self._index(fields)
        if index in self._locked:
            raise _Refused("ReadOnlyIndex")
        return index

    def _attest(self, fields: Mapping[str, Value]) -> bytes:
        for name, value in fields.items():
            if value is not None and type(value) is not bytes:
                raise _Refused("InvalidArgument")
            if value is not None and len(value) > limits.ATTESTED_FIELD_BYTES:
                raise _Refused("InputTooLarge")
            if name == "public_key" and value == b"":
                raise _Refused("InvalidArgument")
        now = self._now_ms()
        cabundle, leaf = self._chain.at(now)
        # In the order in which real modules write the keys.
        payload = {
            "module_id": self.module_id,
            "digest": "SHA384",
            "timestamp": now,
            "pcrs": {index: self._registers[index] for index in sorted(self._locked)},
            "certificate": leaf.der,
            "cabundle": list(cabundle),
            "public_key": fields["public_key"],
            "user_data": fields["user_data"],
            "nonce": fields["nonce"],
        }
        return cose.sign(cbor2.dumps(payload), leaf.key)


def _fields(fields: Mapping[str, Value] | Mapping[int, Value], *names: str) -> Mapping[str, Value]:
    given: set[object] = set(fields)
    if given != set(names):
        raise _Refused("InvalidArgument")
    return fields  # type: ignore[return-value]  # its keys are these texts


def serve(nsm: SimulatedNsm, connection: socket.socket) -> None:
    """Answers one connection of a stream socket until its other side closes it: u32 BE length and message, both ways.

    A message longer than the device takes ends the connection, as nothing after it could be read.
    """
    with connection, connection.makefile("rb") as messages:
        while len(header := messages.read(_LENGTH.size)) == _LENGTH.size:
            (length,) = _LENGTH.unpack(header)
            if length > limits.NSM_REQUEST_BYTES:
                return
            message = messages.read(length)
            if len(message) < length:
                return
            response = nsm.request(message)
            connection.sendall(_LENGTH.pack(len(response)) + response)
