"""What a member does for an agreement without a session: tables are read, sealed, sent, and joined by KMS.

`Standing` is that and no more; `parley.session.Session` adds an enclave to it. Nothing is sealed but for an enclave that was
verified now, or under an agreement that all have signed whose KMS key of this member was read now and is as agreed: that
key opens the tables to no other enclave (kms-15, kms-18).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from parley.kms import CheckedKey
from parley.spool import SealedTable, content_key
from parley.state import Series
from parley_protocol.agreement.model import Agreement
from parley_protocol.claims import VerifiedOffer, needs_countersignatures
from parley_protocol.cose import payload_unverified
from parley_protocol.errors import DataError, RefusedError, StateError
from parley_protocol.transcript import (
    NO_ROSTER_KEY,
    KmsJoin,
    kms_context,
    kms_plaintext,
    kms_share_context,
    share_digest,
)

if TYPE_CHECKING:
    from parley.connection import Connection
    from parley.kms import Key
    from parley.reading import PreparedTable, Source

Progress = Callable[[str, int, int], None]
"""Called with a step's name (verify, read, sort, seal, upload, join, wait, compute, fetch), done and total."""

NOISE_SHARE: Final = b"parley/1/noise-share"


class Bringing:
    """A member's tables and joins by KMS under one agreement, over a connection."""

    def __init__(self, connection: Connection, agreement: Agreement) -> None:
        self.agreement = agreement
        self.member = connection.member
        self.name = connection.member.name_in(agreement)
        self._connection = connection
        self._transport = connection.transport
        self._state = connection.member.state

    # Tables

    def upload(self, tables: Sequence[SealedTable], progress: Progress | None = None) -> None:
        """Sends what the coordinator lacks of sealed tables."""
        for table in tables:
            self._transport.upload(table.upload, table.cose, table.blob, progress)

    def _check_tables(self, tables: Mapping[str, Source]) -> None:
        wanted = self.agreement.tables_of(self.name)
        if not wanted:
            raise RefusedError("not-a-member", f"{self.name} brings no table to {self.agreement.title}")
        if sorted(tables) != list(wanted):
            raise DataError(
                f"you bring {', '.join(wanted)}, not {', '.join(sorted(tables)) or 'nothing'}", code="schema"
            )

    def _seal(
        self, tables: Mapping[str, Source], proof: VerifiedOffer | CheckedKey, progress: Progress | None
    ) -> list[SealedTable]:
        tell(progress, "verify", 1, 1)
        from parley.sealing import seal

        # All are read before the first is sealed: an error leaves nothing behind.
        found = {name: self._prepared(name, tables[name], progress) for name in self.agreement.tables_of(self.name)}
        sealed = []
        for item in found.values():
            if isinstance(item, SealedTable):
                sealed.append(item)
                continue
            digest, prepared = item
            sealed.append(
                seal(
                    prepared,
                    proof,
                    self.name,
                    self.member.identity,
                    self._state.vault,
                    self._state.spool,
                    source=digest,
                    progress=progress,
                )
            )
        return sealed

    def _prepared(
        self, name: str, source: Source, progress: Progress | None
    ) -> SealedTable | tuple[bytes, PreparedTable]:
        # The engine takes a quarter of a second to import, which nothing but reading needs.
        from parley.reading import prepare
        from parley.sealing import source_digest

        is_file = isinstance(source, (str, Path))
        digest, before = b"", tuple[int, ...]()
        if is_file:
            if not Path(source).is_file():
                raise DataError("no such file", source=str(source))
            before = _identity_of(Path(source))
            digest = source_digest(source)
            known = self._spooled(name, digest)
            if known is not None:
                return known
        prepared = prepare(source, self.agreement, name, progress=progress)
        if is_file and _identity_of(Path(source)) != before:
            raise DataError("the file was changed while it was read", source=Path(source).name)
        if not is_file:
            digest = source_digest(source, prepared)
            known = self._spooled(name, digest)
            if known is not None:
                return known
        return digest, prepared

    def _spooled(self, table: str, source: bytes) -> SealedTable | None:
        for entry, sealed in self._state.uploads(self.agreement.digest, table):
            if entry.source == source and entry.party == self.name and sealed.blob.is_file():
                return sealed
        return None

    def _uploads(self, tables: Sequence[SealedTable] | None) -> tuple[bytes, ...]:
        wanted = self.agreement.tables_of(self.name)
        if tables is not None:
            found = {table.table: table.upload for table in tables}
        else:
            before = [joined for joined in self._state.sessions() if joined.agreement == self.agreement.digest]
            by_kms = self._state.kms_join(self.agreement.digest)
            if by_kms is not None:
                return by_kms[0].uploads
            spooled = [sealed for name in wanted for _, sealed in self._state.uploads(self.agreement.digest, name)]
            newest = sorted(spooled, key=lambda sealed: sealed.folder.stat().st_mtime_ns)
            last = {upload for joined in before for upload in joined.join.uploads}
            # What was joined before wins over what was only sealed.
            found = {sealed.table: sealed.upload for sealed in newest}
            found |= {sealed.table: sealed.upload for sealed in newest if sealed.upload in last}
        if sorted(found) != list(wanted):
            raise StateError("no upload of each of your tables is here: submit them")
        return tuple(found[name] for name in wanted)

    # The series

    def _known_series(self, trust_head: bytes | None) -> Series:
        series = self._state.series(self.agreement.series)
        if series is not None:
            return series
        if trust_head is None:
            raise StateError(
                "nothing is known here of this series: restore your state, or trust a head that another member tells you"
            )
        return self._state.trust(self.agreement, trust_head)

    def _check_newest(self, series: Series | None) -> None:
        if series is not None and series.newest.agreement != self.agreement.digest:
            raise StateError(f"you signed version {series.newest.version}; sessions of other versions are not joined")

    # Joins by KMS

    def kms_key(self, given: str | Key | None = None) -> Key | None:
        """This member's KMS key by the agreement; None where it names none. StateError where `given` is another one.

        `given`: its ARN, or the key itself where it is not reached with what AWS's configuration says."""
        agreed = self.agreement.kms.get(self.name)
        name = given if given is None or isinstance(given, str) else given.arn
        if agreed is None:
            if name is not None:
                raise StateError(f"the agreement names no KMS key of {self.name}: an amendment can", code="agreement")
            return None
        if name not in (None, agreed.text):
            raise StateError(f"the agreement names another KMS key of {self.name}, {agreed}", code="agreement")
        if given is not None and not isinstance(given, str):
            return given
        from parley.kms import Key

        return Key.connect(agreed.text)

    def _own_key(self, given: str | Key | None) -> Key:
        key = self.kms_key(given)
        if key is None:
            raise StateError(f"the agreement names no KMS key of {self.name}", code="agreement")
        return key

    def check_kms_key(self, key: Key) -> CheckedKey:
        """Verifies that nobody but the enclaves of this agreement gets at what the key will hold: the key, its live policy and its
        grants are read and compared (kms-15). StateError, code "policy", with everything that is otherwise."""
        from parley import kms

        principals = self._state.principals(key.arn)
        if principals is None:
            raise StateError(
                f"who stands in the policy of {key.arn} is not known here: `parley kms check` with --coordinator-role and"
                " --admin, once",
                code="policy",
            )
        return kms.checked(key, self.agreement, principals)

    def join_by_kms(
        self,
        tables: Sequence[SealedTable] | None = None,
        progress: Progress | None = None,
        *,
        kms_key: str | Key | None = None,
    ) -> KmsJoin:
        """Lets every session of this agreement open the uploads by this member's KMS key, until a later one (kms-16).

        Without `tables`: those of the last one. It is neither forward secret nor post-quantum; the key's policy revokes it.
        """
        with self._state.joining(self.agreement.series):
            tell(progress, "join", 0, 1)
            self._check_newest(self._state.series(self.agreement.series))
            uploads = self._uploads(tables)
            known = self._state.kms_join(self.agreement.digest)
            key = self._own_key(kms_key)
            self.check_kms_key(key)
            same = known is not None and known[0].uploads == uploads
            refused = self._refused()
            if known is not None and same and not refused and self._usable(known[0]):
                join, cose = known
            else:
                # A join that was refused is not tried again, so the same one would change nothing (kms-14). Where the key
                # was closed, its ciphertext is still good.
                join, cose = self._new_kms_join(uploads, None if same and refused == "revoked" else key)
            self._transport.put_kms_join(cose)
            tell(progress, "join", 1, 1)
            return join

    def _refused(self) -> str:
        """The code with which the KMS join that stands was refused; none where no session lives."""
        return ""

    def _usable(self, join: KmsJoin) -> bool:
        """Whether a KMS join can still lead to a computation: its one-time key is there where one is needed."""
        return not needs_countersignatures(self.agreement) or self._state.has_roster_key(join.roster_key)

    def _new_kms_join(self, uploads: tuple[bytes, ...], key: Key | None) -> tuple[KmsJoin, bytes]:
        """A KMS join with a fresh one-time key, kept. Without `key` with the last one's ciphertext, which the coordinator
        has: then nothing new is given away."""
        identity, agreement = self.member.identity, self.agreement
        share = identity.derive(NOISE_SHARE, kms_share_context(agreement.digest, uploads), 32)
        if key is None:
            known = self._state.kms_join(agreement.digest)
            assert known is not None and known[0].uploads == uploads
            ciphertext = known[0].ciphertext
        else:
            keys = tuple(content_key(self._state.upload(upload), self._state.vault) for upload in uploads)
            context = kms_context(agreement.digest, self.name, uploads)
            ciphertext = key.encrypt(kms_plaintext(keys, share), context)
        roster_key = Ed25519PrivateKey.generate() if needs_countersignatures(agreement) else None
        public = NO_ROSTER_KEY if roster_key is None else roster_key.public_key().public_bytes_raw()

        def make(number: int) -> bytes:
            join = KmsJoin(agreement.digest, self.name, uploads, ciphertext, share_digest(share), public, number)
            return identity.sign(join.to_bytes())

        cose = self._state.begin_kms_join(agreement.series, agreement.digest, roster_key, make)
        return KmsJoin.from_bytes(payload_unverified(cose)), cose


class Standing(Bringing):
    """What stands for every session of an agreement, also for those of enclaves that do not live yet: the tables of a member
    whose KMS key the agreement names, and its join by that key. Nobody has to be there when a session comes."""

    def __repr__(self) -> str:
        return f"Standing({self.agreement.title})"

    def submit(
        self,
        tables: Mapping[str, Source],
        progress: Progress | None = None,
        *,
        trust_head: bytes | None = None,
        kms_key: str | Key | None = None,
    ) -> KmsJoin:
        """Checks the key, seals and uploads one table for each name, and joins by KMS. The same again resumes.

        Errors as of `seal` and `Session.submit`.
        """
        key = self._own_key(kms_key)
        sealed = self.seal(tables, progress, trust_head=trust_head, kms_key=key)
        self.upload(sealed, progress)
        return self.join_by_kms(sealed, progress, kms_key=key)

    def seal(
        self,
        tables: Mapping[str, Source],
        progress: Progress | None = None,
        *,
        trust_head: bytes | None = None,
        kms_key: str | Key | None = None,
    ) -> list[SealedTable]:
        """Reads, checks and seals tables into the spool, once all signatures of the agreement and the policy of the key are
        verified; a table that stands there sealed already is not sealed again.

        `trust_head` as of `Session.verify`. VerificationError where a member has not signed; StateError, code "policy", where
        the key is not as agreed, "agreement" where there is none, or a newer version was signed.
        """
        key = self._own_key(kms_key)
        self._check_tables(tables)
        self._check_newest(self._known_series(trust_head))
        self._connection.lineage(self.agreement)
        return self._seal(tables, self.check_kms_key(key), progress)


def _identity_of(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def tell(progress: Progress | None, step: str, done: int, total: int) -> None:
    """Reports progress to whom wants to know."""
    if progress is not None:
        progress(step, done, total)
