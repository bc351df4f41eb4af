"""What hides how an answer of KMS failed: the wait before the refusal, whoever held the lock before."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from parley_enclave import enclave as module
from parley_enclave import keys
from parley_enclave.enclave import Enclave
from parley_enclave.phases import Op, Phase
from parley_enclave.session import Session
from parley_protocol import limits
from parley_protocol.chain import ChainState
from parley_protocol.errors import VerificationError
from parley_protocol.transcript import GENESIS, Offer
from support.desk import NOW, SIMULATION
from support.enclave import Party, agreement_of, identities, rows_of
from support.kms import PaperKms, answer, arn

WAITED_S = 7.0
"""What a call waits for others, each time it takes the lock."""


class Busy:
    """A lock that others hold whenever it is taken: time goes on until it is free."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._clock.now += WAITED_S

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def notify_all(self) -> None:
        """Nobody waits."""


class Clock:
    """Time, which goes on where something waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        """Its seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Notes it."""
        self.slept.append(seconds)


@pytest.mark.parametrize("wrong", ["nothing", "other keys", "no answer is waited for"])
def test_kms_9_the_wait_begins_when_the_lock_is_taken(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    members = identities(["amber", "birch"])
    agreement = agreement_of(SIMULATION, members, kms={"amber": arn()})
    party = Party(agreement, "amber", members["amber"], {"visits": rows_of(1, 10)})
    made = keys.make(os.urandom)
    offer = Offer(os.urandom(16), agreement.digest, made.sealing_public, made.signing_public, GENESIS, NOW)
    asked: list[bytes] = []

    def attest(*, public_key: bytes, **_: object) -> bytes:
        asked.append(public_key)
        return b"document"

    nsm: Any = SimpleNamespace(attest=attest)
    pool: Any = None
    enclave = Enclave(nsm, pool, log=lambda line: None)
    enclave._phases.move(Op.LOAD, Phase.LOADED)
    enclave._phases.move(Op.BEGIN, Phase.OPEN)
    enclave._session = Session(agreement, os.urandom(16), offer, ChainState(), made, os.urandom(32))
    busy: Any = Busy(clock)
    enclave._changed = busy
    join = party.kms_join(PaperKms())
    uploads = [(upload.cose, upload.blob) for upload in join.uploads]
    given = b""
    if wrong != "no answer is waited for":
        enclave.recipient(offer.session, join.cose, uploads)
        given = answer(asked[0], bytes(len(party.kms_keys))) if wrong == "other keys" else b""
    before = clock.now
    with pytest.raises(VerificationError) as caught:
        enclave.kms_join(offer.session, join.cose, uploads, given, lambda percent: None)
    assert caught.value.code == "key"
    assert clock.now - before >= 2 * WAITED_S
    assert clock.slept == [pytest.approx(limits.KMS_OPEN_MS / 1000)]
