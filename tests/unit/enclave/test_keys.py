"""The session's keys: from both sources of randomness, and never shown."""

from __future__ import annotations

import copy
import os
import pickle

import pytest

from parley_enclave import keys
from parley_protocol import hpke
from parley_protocol.errors import VerificationError


def test_both_sources_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", bytes)
    assert keys.random_bytes(bytes, 32) == keys.random_bytes(bytes, 32)
    assert keys.random_bytes(lambda count: b"\1" * count, 32) != keys.random_bytes(bytes, 32)
    monkeypatch.setattr("os.urandom", lambda count: b"\1" * count)
    assert keys.random_bytes(bytes, 32) != keys.random_bytes(lambda count: b"\1" * count, 32)


def test_what_is_sealed_to_a_session_opens_there_alone() -> None:
    mine, other = keys.make(os.urandom), keys.make(os.urandom)
    sealed = hpke.seal(mine.sealing_public, b"plain", b"info")
    assert mine.sealing.open(sealed, b"info") == b"plain"
    with pytest.raises(VerificationError):
        other.sealing.open(sealed, b"info")
    with pytest.raises(VerificationError):
        mine.sealing.open(sealed, b"other info")
    assert mine.signing_public != other.signing_public


def test_keys_are_not_printed_or_pickled() -> None:
    made = keys.make(os.urandom)
    shown = repr(made) + str(made)
    for secret in (made.signing.private_bytes_raw(), made.sealing.private_bytes()):
        assert secret.hex() not in shown and repr(secret)[2:12] not in shown
    for way in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            way(made)


def test_the_kernel_takes_more_randomness() -> None:
    asked: list[int] = []

    def module(count: int) -> bytes:
        asked.append(count)
        return os.urandom(count)

    keys.seed_kernel(module)
    assert asked == [256]
