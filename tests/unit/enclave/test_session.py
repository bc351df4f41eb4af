"""What a session forgets, and what it never shows."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import Any

from parley_enclave import keys
from parley_enclave.admission import Brought, Checked, Opened
from parley_enclave.session import Joined, Session
from parley_protocol.chain import ChainState
from parley_protocol.transcript import Join, Offer, Upload

SECRET = b"\xa5" * 32


def session() -> Session:
    made = keys.make(os.urandom)
    offer = Offer(bytes(16), bytes(48), made.sealing_public, made.signing_public, bytes(48), 1)
    join = Join(offer.digest, "amber", (bytes(48),), b"sealed", bytes(48), bytes(32))
    opened = Opened(join, (Brought(Upload(b"header", bytes(48)), 1, SECRET),), SECRET)
    agreement: Any = None
    state = Session(agreement, bytes(16), offer, ChainState(), made, SECRET)
    state.joins["amber"] = Joined(opened, b"receipt")
    state.tables[bytes(48)] = Checked(4711, SECRET, SECRET)
    state.admitting[bytes(48)] = Future()
    state.job = object()  # type: ignore[assignment]
    return state


def test_ses_12_nothing_that_opens_a_table_is_kept() -> None:
    state = session()
    state.forget()
    assert state.keys is None and state.guard_key == b"" and state.job is None
    assert not state.joins and not state.tables and not state.admitting


def test_no_secret_is_printed() -> None:
    state = session()
    shown = repr(state) + repr(state.joins) + repr(state.tables)
    assert repr(SECRET)[2:20] not in shown and SECRET.hex() not in shown and "4711" not in shown
