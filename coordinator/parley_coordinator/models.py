"""The tables of the store. Times in milliseconds since the epoch, digests 48 bytes, statements in their COSE envelopes.

Rows are read-only once their transaction has ended.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, LargeBinary, Text, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

REVISION: Final = "0003"
"""The newest of the folder `migrations`, which leads to these tables."""

LIVE: Final = ("launching", "open", "rostered", "computing")
"""Phases of a session whose enclave is needed. The others are `released` and `lost`."""


class Base(DeclarativeBase):
    """All tables."""

    type_annotation_map = {  # noqa: RUF012  # SQLAlchemy declares it so
        bytes: LargeBinary,
        str: Text,
        # Milliseconds need 64 bits, which SQLite's INTEGER has; and it counts rows up under this name alone.
        int: BigInteger().with_variant(Integer(), "sqlite"),
    }


class SchemaVersion(Base):
    """One row: a number at which the first programs looked, so that they refuse tables that they do not know."""

    __tablename__ = "schema_version"
    version: Mapped[int] = mapped_column(primary_key=True)


class Operator(Base):
    """A member key that may put agreements and open sessions."""

    __tablename__ = "operators"
    key: Mapped[bytes] = mapped_column(primary_key=True)
    label: Mapped[str]
    added_ms: Mapped[int]


class AgreementRow(Base):
    """One version of an agreement; `complete_ms` is when the last member signed."""

    __tablename__ = "agreements"
    digest: Mapped[bytes] = mapped_column(primary_key=True)
    series: Mapped[bytes] = mapped_column(index=True)
    version: Mapped[int]
    replaces: Mapped[bytes | None]
    canonical: Mapped[bytes]
    put_by: Mapped[bytes]
    put_ms: Mapped[int]
    complete_ms: Mapped[int | None]
    expires_ms: Mapped[int]


class Membership(Base):
    """A member of an agreement and its signing key (32 bytes)."""

    __tablename__ = "memberships"
    agreement: Mapped[bytes] = mapped_column(ForeignKey("agreements.digest"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[bytes] = mapped_column(index=True)


class SignatureRow(Base):
    """A member's signature of an agreement."""

    __tablename__ = "signatures"
    agreement: Mapped[bytes] = mapped_column(ForeignKey("agreements.digest"), primary_key=True)
    member: Mapped[str] = mapped_column(primary_key=True)
    cose: Mapped[bytes]
    at_ms: Mapped[int]


class UploadRow(Base):
    """An upload. `number` names its blob; the first `stored` bytes of `size` are on the disk for good.

    `writer` counts the streams that have written it: the newest one alone may say what is stored. `state` is what the blob
    store needs to go on.
    """

    __tablename__ = "uploads"
    __table_args__ = (Index("uploads_of_party", "agreement", "party", "table_name"), {"sqlite_autoincrement": True})
    number: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[bytes] = mapped_column(unique=True)
    agreement: Mapped[bytes] = mapped_column(ForeignKey("agreements.digest"))
    party: Mapped[str]
    table_name: Mapped[str]
    cose: Mapped[bytes]
    owner: Mapped[bytes] = mapped_column(index=True)
    size: Mapped[int]
    stored: Mapped[int]
    begun_ms: Mapped[int]
    complete_ms: Mapped[int | None]
    writer: Mapped[int] = mapped_column(default=0, server_default="0")
    state: Mapped[str] = mapped_column(default="", server_default=text("''"))


class SessionRow(Base):
    """A session. `session` (16 bytes), `offer` and `document` are there as soon as the enclave has begun it; `start` is the
    statement that closed the inputs, `roster` the digest of the standing roster."""

    __tablename__ = "sessions"
    __table_args__ = (
        Index(
            "one_live_session",
            "series",
            unique=True,
            sqlite_where=text("phase IN ('launching', 'open', 'rostered', 'computing')"),
            postgresql_where=text("phase IN ('launching', 'open', 'rostered', 'computing')"),
        ),
        {"sqlite_autoincrement": True},
    )
    number: Mapped[int] = mapped_column(primary_key=True)
    session: Mapped[bytes | None] = mapped_column(unique=True)
    agreement: Mapped[bytes] = mapped_column(ForeignKey("agreements.digest"))
    series: Mapped[bytes] = mapped_column(index=True)
    begin: Mapped[bytes]
    phase: Mapped[str]
    code: Mapped[str] = mapped_column(default="")
    enclave: Mapped[str] = mapped_column(default="")
    offer: Mapped[bytes | None]
    document: Mapped[bytes | None]
    start: Mapped[bytes | None]
    roster: Mapped[bytes | None]
    opened_ms: Mapped[int]
    deadline_ms: Mapped[int] = mapped_column(default=0)
    ended_ms: Mapped[int | None]
    stored_told: Mapped[bool] = mapped_column(default=False)


class LeaseRow(Base):
    """Which coordinator serves a session, until when by the database's clock. Whoever takes it over counts `token` up, and
    changes of the session are made under the newest token alone. `node` is where the session's enclave lives: only the
    coordinators there reach it. `address` is where the holder takes calls that another coordinator passes on.
    """

    __tablename__ = "leases"
    number: Mapped[int] = mapped_column(ForeignKey("sessions.number"), primary_key=True, autoincrement=False)
    node: Mapped[str]
    holder: Mapped[str] = mapped_column(index=True)
    address: Mapped[str]
    token: Mapped[int]
    expires_ms: Mapped[int]


class DoomedBlob(Base):
    """A blob that nothing names any more, and that is still to be deleted."""

    __tablename__ = "doomed_blobs"
    name: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    at_ms: Mapped[int]


class OpenRequest(Base):
    """A caller's request id and the session that answers it."""

    __tablename__ = "open_requests"
    key: Mapped[bytes] = mapped_column(primary_key=True)
    request: Mapped[bytes] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(ForeignKey("sessions.number"))


class JoinRow(Base):
    """A join, or a KMS join that was tried in this session: pending without receipt and code, admitted with a receipt, refused with a code."""

    __tablename__ = "joins"
    number: Mapped[int] = mapped_column(ForeignKey("sessions.number"), primary_key=True)
    digest: Mapped[bytes] = mapped_column(primary_key=True)
    party: Mapped[str]
    cose: Mapped[bytes]
    receipt: Mapped[bytes | None]
    code: Mapped[str] = mapped_column(default="")
    at_ms: Mapped[int]


class KmsJoinRow(Base):
    """The KMS join of a party that stands: the one with the greatest number."""

    __tablename__ = "kms_joins"
    agreement: Mapped[bytes] = mapped_column(ForeignKey("agreements.digest"), primary_key=True)
    party: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[bytes]
    number: Mapped[int]
    cose: Mapped[bytes]
    at_ms: Mapped[int]


class RosterRow(Base):
    """A roster. `ended` is empty, or why it led to no release: lapsed, declined."""

    __tablename__ = "rosters"
    digest: Mapped[bytes] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(ForeignKey("sessions.number"), index=True)
    cose: Mapped[bytes]
    expires_ms: Mapped[int]
    issued_ms: Mapped[int]
    ended: Mapped[str] = mapped_column(default="")


class CountersignatureRow(Base):
    """A party's consent to a roster; `former`: a PutCountersignatureRequest that holds the former rosters alone."""

    __tablename__ = "countersignatures"
    roster: Mapped[bytes] = mapped_column(ForeignKey("rosters.digest"), primary_key=True)
    party: Mapped[str] = mapped_column(primary_key=True)
    cose: Mapped[bytes]
    former: Mapped[bytes]
    at_ms: Mapped[int]


class RefusalRow(Base):
    """A party's refusal of a roster."""

    __tablename__ = "refusals"
    roster: Mapped[bytes] = mapped_column(ForeignKey("rosters.digest"), primary_key=True)
    party: Mapped[str] = mapped_column(primary_key=True)
    cose: Mapped[bytes]
    at_ms: Mapped[int]


class RecordRow(Base):
    """A record of a series' chain, with its document. `head` is the series' head after it."""

    __tablename__ = "records"
    __table_args__ = (UniqueConstraint("series", "sequence"),)
    head: Mapped[bytes] = mapped_column(primary_key=True)
    series: Mapped[bytes]
    sequence: Mapped[int]
    previous: Mapped[bytes]
    agreement: Mapped[bytes] = mapped_column(ForeignKey("agreements.digest"))
    number: Mapped[int] = mapped_column(ForeignKey("sessions.number"), unique=True)
    cose: Mapped[bytes]
    document: Mapped[bytes]
    at_ms: Mapped[int]


class BundleRow(Base):
    """A bundle in the blob store."""

    __tablename__ = "bundles"
    number: Mapped[int] = mapped_column(ForeignKey("sessions.number"), primary_key=True)
    size: Mapped[int]
    at_ms: Mapped[int]


class FetchRow(Base):
    """A member that has got a whole bundle."""

    __tablename__ = "fetches"
    number: Mapped[int] = mapped_column(ForeignKey("sessions.number"), primary_key=True)
    member: Mapped[str] = mapped_column(primary_key=True)
    at_ms: Mapped[int]


class EventRow(Base):
    """What happened, in order. Numbers are never used twice."""

    __tablename__ = "events"
    __table_args__ = (Index("events_of_agreement", "agreement", "number"), {"sqlite_autoincrement": True})
    number: Mapped[int] = mapped_column(primary_key=True)
    agreement: Mapped[bytes] = mapped_column(ForeignKey("agreements.digest"))
    session: Mapped[bytes | None] = mapped_column(index=True)
    kind: Mapped[str]
    member: Mapped[str] = mapped_column(default="")
    table_name: Mapped[str] = mapped_column(default="")
    code: Mapped[str] = mapped_column(default="")
    percent: Mapped[int] = mapped_column(default=0)
    at_ms: Mapped[int]
