"""Parley: compute together over data that nobody shows to anybody.

A party joins a session of an agreement that all members signed::

    import parley

    me = parley.Member.load("beijing.key")
    agreement = parley.Agreement.load("smoking.parley")
    with parley.connect("coordinator:7443", me, cert="coordinator.crt") as coordinator:
        session = coordinator.session(agreement)
        session.submit({"patients": "patients.parquet"})
        session.wait()
        release = session.release()
    release["odds_ratio"].to_pandas()
    print(release.explain())

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from parley.agreements import load_signed, load_source, save_signed
    from parley.backups import backup, restore
    from parley.connection import AgreementStatus, Connection, Event, InboxItem, connect
    from parley.contacts import Contact, Contacts
    from parley.files import Agreement
    from parley.images import AcceptedImage, measure_file
    from parley.member import Member
    from parley.reading import PreparedTable, prepare
    from parley.release import Output, Release
    from parley.session import Session, SessionStatus
    from parley.spool import SealedTable
    from parley.standing import Standing
    from parley.state import State
    from parley_protocol.agreement.signed import SignedAgreement
    from parley_protocol.errors import (
        AgreementError,
        DataError,
        MalformedError,
        ParleyError,
        RefusedError,
        StateError,
        UnavailableError,
        VerificationError,
    )
    from parley_protocol.measurement import Image

__all__ = [
    "AcceptedImage",
    "Agreement",
    "AgreementError",
    "AgreementStatus",
    "Connection",
    "Contact",
    "Contacts",
    "DataError",
    "Event",
    "Image",
    "InboxItem",
    "MalformedError",
    "Member",
    "Output",
    "ParleyError",
    "PreparedTable",
    "RefusedError",
    "Release",
    "SealedTable",
    "Session",
    "SessionStatus",
    "SignedAgreement",
    "Standing",
    "State",
    "StateError",
    "UnavailableError",
    "VerificationError",
    "backup",
    "connect",
    "load_signed",
    "load_source",
    "measure_file",
    "prepare",
    "restore",
    "save_signed",
]

_WHERE: Final = {
    "AcceptedImage": "parley.images",
    "Agreement": "parley.files",
    "AgreementError": "parley_protocol.errors",
    "AgreementStatus": "parley.connection",
    "Connection": "parley.connection",
    "Contact": "parley.contacts",
    "Contacts": "parley.contacts",
    "DataError": "parley_protocol.errors",
    "Event": "parley.connection",
    "Image": "parley_protocol.measurement",
    "InboxItem": "parley.connection",
    "MalformedError": "parley_protocol.errors",
    "Member": "parley.member",
    "Output": "parley.release",
    "ParleyError": "parley_protocol.errors",
    "PreparedTable": "parley.reading",
    "RefusedError": "parley_protocol.errors",
    "Release": "parley.release",
    "SealedTable": "parley.spool",
    "Session": "parley.session",
    "SessionStatus": "parley.session",
    "SignedAgreement": "parley_protocol.agreement.signed",
    "Standing": "parley.standing",
    "State": "parley.state",
    "StateError": "parley_protocol.errors",
    "UnavailableError": "parley_protocol.errors",
    "VerificationError": "parley_protocol.errors",
    "backup": "parley.backups",
    "connect": "parley.connection",
    "load_signed": "parley.agreements",
    "load_source": "parley.agreements",
    "measure_file": "parley.images",
    "prepare": "parley.reading",
    "restore": "parley.backups",
    "save_signed": "parley.agreements",
}


def __getattr__(name: str) -> Any:
    try:
        module = _WHERE[name]
    except KeyError:
        raise AttributeError(f"module 'parley' has no attribute {name!r}") from None
    found = getattr(import_module(module), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
