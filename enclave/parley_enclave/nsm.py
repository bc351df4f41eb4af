"""The Nitro Security Module, typed: registers, randomness, documents and the only clock that the enclave believes.

The module is trusted: it is the hypervisor. Messages are those of aws-nitro-enclaves-nsm-api (externally tagged serde).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from parley_enclave.device import Device
from parley_protocol import limits
from parley_protocol.attestation.document import parse_unverified
from parley_protocol.encoding import Encodable, Value, decode, encode
from parley_protocol.errors import MalformedError, ParleyError

_T = TypeVar("_T")


class NsmError(ParleyError):
    """The module refused a request, or answered what is no answer to it. `answer` is its own error code, such as
    ReadOnlyIndex, or what is wrong with what it said."""

    answer: str

    def __init__(self, answer: str) -> None:
        super().__init__(f"the NSM answers {answer}", code="internal")
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Description:
    """What the module says of itself."""

    module_id: str
    max_pcrs: int
    locked: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class Register:
    """A platform configuration register: its 48 bytes, and whether it can still change."""

    data: bytes
    locked: bool


class Nsm:
    """Typed requests to a device, and trusted time.

    Time is the timestamp of a document that the module signed, plus the monotonic clock since then; after
    `limits.NSM_TIME_AGE_MS` a new document is taken. The monotonic clock counts the processor's timestamp counter, which
    the hypervisor keeps; the wall clock, which the host may set, is never read. The delta counts from when the document
    had come back, so the result is never ahead of the module.
    """

    def __init__(self, device: Device, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._device = device
        self._monotonic_ns = monotonic_ns
        self._lock = threading.Lock()
        self._anchor: tuple[int, int] | None = None

    def describe(self) -> Description:
        """The module's description."""
        fields = self._ask("DescribeNSM", None)
        locked = fields.get("locked_pcrs")
        if type(locked) is not list:
            raise NsmError("no array of locked registers")
        return Description(
            module_id=_typed(fields, "module_id", str),
            max_pcrs=_typed(fields, "max_pcrs", int),
            locked=tuple(index for index in locked if type(index) is int),
            digest=_typed(fields, "digest", str),
        )

    def register(self, index: int) -> Register:
        """A register's present value."""
        fields = self._ask("DescribePCR", {"index": index})
        return Register(_typed(fields, "data", bytes), _typed(fields, "lock", bool))

    def extend(self, index: int, data: bytes) -> bytes:
        """Extends a register: SHA-384(old ‖ data), which is returned; NsmError ReadOnlyIndex where it is locked."""
        return _typed(self._ask("ExtendPCR", {"index": index, "data": data}), "data", bytes)

    def lock(self, index: int) -> None:
        """Locks a register until the enclave ends. Only locked registers stand in documents."""
        self._ask("LockPCR", {"index": index})

    def random(self, count: int) -> bytes:
        """`count` random bytes; the module gives at most 256 for one request."""
        data = bytearray()
        while len(data) < count:
            part = _typed(self._ask("GetRandom", None), "random", bytes)
            if not part:
                raise NsmError("no random bytes")
            data += part
        return bytes(data[:count])

    def attest(
        self, *, user_data: bytes | None = None, nonce: bytes | None = None, public_key: bytes | None = None
    ) -> bytes:
        """An attestation document (COSE_Sign1) with these three fields; each at most 512 bytes."""
        for value in (user_data, nonce, public_key):
            if value is not None and len(value) > limits.ATTESTED_FIELD_BYTES_MADE:
                raise ValueError("longer than an attested field may be")
        fields: dict[str, Encodable] = {"user_data": user_data, "nonce": nonce, "public_key": public_key}
        document = _typed(self._ask("Attestation", fields), "document", bytes)
        taken = self._monotonic_ns()
        try:
            timestamp = parse_unverified(document).timestamp_ms
        except MalformedError as error:
            raise NsmError("a document that is none") from error
        with self._lock:
            self._anchor = (timestamp, taken)
        return document

    def now_ms(self) -> int:
        """Milliseconds since the epoch by the module's clock, at most a request behind it."""
        with self._lock:
            anchor = self._anchor
        if anchor is None or self._since(anchor) > limits.NSM_TIME_AGE_MS:
            self.attest()
            with self._lock:
                anchor = self._anchor
            assert anchor is not None
        return anchor[0] + self._since(anchor)

    def _since(self, anchor: tuple[int, int]) -> int:
        return (self._monotonic_ns() - anchor[1]) // 1_000_000

    def _ask(self, name: str, fields: Mapping[str, Encodable] | None) -> Mapping[str, Value]:
        message = encode(name if fields is None else {name: dict(fields)})
        try:
            answer = decode(self._device.request(message), limit=limits.NSM_RESPONSE_BYTES, foreign=True)
        except MalformedError as error:
            raise NsmError(f"no CBOR to {name}") from error
        if answer == name:
            return {}
        if type(answer) is dict and len(answer) == 1:
            ((kind, value),) = answer.items()
            if kind == "Error" and type(value) is str:
                raise NsmError(value)
            if kind == name and type(value) is dict:
                return {key: field for key, field in value.items() if type(key) is str}
        raise NsmError(f"no answer to {name}")


def _typed(fields: Mapping[str, Value], name: str, kind: type[_T]) -> _T:
    value = fields.get(name)
    if type(value) is not kind:
        raise NsmError(f"{name}, which is no {kind.__name__}")
    return value
