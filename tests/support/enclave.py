"""A whole enclave for tests: the simulated module, the process, a host that may misbehave, and parties.

All of it speaks the real protocol over real sockets. Parties are built straight from `parley_protocol`, so that tests of
the enclave need neither the coordinator nor the client.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from parley.kms import Key
from parley_deploy.nsm import LocalRoot, SimulatedNsm, image_measurements, serve
from parley_deploy.pki import system_now_ms
from parley_protocol import framing, hpke, table
from parley_protocol.agreement.key_arn import KeyArn
from parley_protocol.agreement.model import (
    Agreement,
    Consent,
    Function,
    Grouping,
    Measurement,
    Output,
    OutputKind,
    Platform,
    Rules,
    Session,
    Unit,
    Value,
)
from parley_protocol.agreement.schema import Column, ColumnType, Table
from parley_protocol.claims import VerifiedOffer, verify_offer
from parley_protocol.identity import PrivateIdentity
from parley_protocol.output import OutputTable
from parley_protocol.transcript import (
    GENESIS,
    NO_ROSTER_KEY,
    AgreementSignature,
    Countersignature,
    Join,
    JoinKeys,
    KmsJoin,
    Record,
    Refusal,
    Roster,
    RosterConsent,
    SealedOutput,
    Start,
    Upload,
    UploadHeader,
    frame_key,
    join_info,
    key_commitment,
    kms_context,
    kms_plaintext,
    kms_share_context,
    noise_share_context,
    output_commitment,
    output_info,
    share_digest,
)
from parley_protocol.v1 import enclave_pb2 as pb
from support.kms import PaperKms

SECONDS = 60.0
"""How long a test waits for anything: the machine is shared."""


# The module and the process


class Simulation:
    """A folder with a local root, a simulated module in this process, and an enclave as its own process."""

    def __init__(self, folder: Path, *, workers: int = 1) -> None:
        self.folder = folder
        self.workers = workers
        self.command = [sys.executable]
        """What starts the interpreter."""
        self.arguments: list[str] = []
        """More of what the enclave is told."""
        self.ahead_ms = 0
        """How far the module's clock is ahead of this machine's."""
        self.root = LocalRoot.create(system_now_ms())
        self.registers = image_measurements(None)
        """What the module says that the image is measured to be, from the next boot on."""
        self.measurement = Measurement(self.registers[0], self.registers[1], self.registers[2])
        self.process: subprocess.Popen[bytes] | None = None
        self._nsm_listener: socket.socket | None = None
        self._boots = 0

    @property
    def path(self) -> Path:
        """The enclave's socket."""
        return self.folder / "enclave.sock"

    @property
    def log(self) -> str:
        """What the enclave wrote to standard error."""
        return (self.folder / "log").read_text()

    def now_ms(self) -> int:
        """The module's clock."""
        return system_now_ms() + self.ahead_ms

    def boot(self) -> Self:
        """Starts a fresh module and an enclave under it, and waits until it listens."""
        self.end()
        self._boots += 1
        self.nsm = SimulatedNsm(self.root, self.registers, now_ms=self.now_ms, random=os.urandom)
        nsm_path = self.folder / f"nsm{self._boots}.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(nsm_path))
        nsm_path.chmod(0o600)
        listener.listen(4)
        self._nsm_listener = listener
        threading.Thread(target=self._answer, args=(listener, self.nsm), daemon=True).start()
        command = [*self.command, "-P", "-m", "parley_enclave", "--listen", f"unix:{self.path}"]
        command += ["--nsm", f"unix:{nsm_path}", "--workers", str(self.workers), *self.arguments]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        until(lambda: self._listens() or self.process is None or self.process.poll() is not None)
        assert self.process.poll() is None, self.log
        return self

    def end(self) -> None:
        """Kills the enclave, as a host can at any time."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        self.path.unlink(missing_ok=True)
        if self._nsm_listener is not None:
            self._nsm_listener.close()
            self._nsm_listener = None

    def worker_pids(self) -> list[int]:
        """The worker processes of the enclave."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        threads = children.parent.parent.glob("*/children")
        return sorted({int(pid) for file in threads for pid in file.read_text().split()})

    def __enter__(self) -> Self:
        return self.boot()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @staticmethod
    def _answer(listener: socket.socket, nsm: SimulatedNsm) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(nsm, connection), daemon=True).start()

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.path))
            except OSError:
                return False
        return True


def until(holds: Callable[[], object], seconds: float = SECONDS) -> None:
    """Waits until `holds()` is true; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


# The host


class Dropped(Exception):
    """Raised by a hook: the host closes the Serve connection."""


Ranges = list[tuple[int, int]]
Hook = Callable[[int, Ranges, list[bytes]], list[bytes]]
"""(blob, ranges, their bytes) to what the host answers instead; it may raise Dropped."""


class Host:
    """A minimal host: asks, and serves blobs. `pull` is its hook for misbehaviour; `pulls` counts what it was asked."""

    def __init__(self, path: Path, blobs: Mapping[int, bytes] | None = None) -> None:
        self._path = path
        self.blobs: dict[int, bytes] = dict(blobs or {})
        self.pull: Hook | None = None
        self.pulls: list[tuple[int, Ranges]] = []
        self.progress: list[int] = []
        self._closed = False
        self._serves: set[socket.socket] = set()

    def connect(self) -> socket.socket:
        """A connection to the enclave."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(SECONDS)
        try:
            connection.connect(str(self._path))
        except OSError:
            connection.close()
            raise
        return connection

    def ask(self, **op: Any) -> pb.Answer:
        """The answer to one Ask, after any Progress. `op` is one field of Ask."""
        with self.connect() as connection:
            connection.sendall(framing.pack(pb.Ask(**op).SerializeToString()))
            while True:
                answer = pb.Answer.FromString(receive(connection)[0])
                if answer.WhichOneof("op") != "progress":
                    return answer
                self.progress.append(answer.progress.percent)

    def refused(self, **op: Any) -> str:
        """The code with which the enclave refuses an Ask; fails when it does not."""
        answer = self.ask(**op)
        assert answer.WhichOneof("op") == "failed", answer
        return answer.failed.code

    def want(self, kind: str, **op: Any) -> Any:
        """The field `kind` of the answer; fails when the answer is another."""
        answer = self.ask(**op)
        assert answer.WhichOneof("op") == kind, answer
        return getattr(answer, kind)

    def state(self) -> pb.State:
        """The enclave's status."""
        state: pb.State = self.want("state", status=pb.Status())
        return state

    def load(self, *signed: pb.SignedAgreement) -> int:
        """Loads the versions of an agreement and keeps as many Serve connections as the enclave asks for."""
        ready = self.want("ready", load=pb.Load(agreements=signed))
        self.keep(ready.serves)
        return int(ready.serves)

    def keep(self, serves: int) -> None:
        """Keeps `serves` Serve connections open, opening another whenever one ends."""
        for _ in range(serves):
            threading.Thread(target=self._keep, daemon=True).start()

    def close(self) -> None:
        """Ends all Serve connections for good."""
        self._closed = True
        for connection in list(self._serves):
            _shut(connection)

    def drop_serves(self) -> None:
        """Ends all Serve connections; the threads open new ones."""
        for connection in list(self._serves):
            _shut(connection)

    def _keep(self) -> None:
        while not self._closed:
            try:
                connection = self.connect()
            except OSError:
                return
            self._serves.add(connection)
            try:
                with connection:
                    connection.settimeout(None)
                    connection.sendall(framing.pack(pb.Ask(serve=pb.Serve()).SerializeToString()))
                    self._serve(connection)
            except (OSError, EOFError, Dropped):
                pass
            finally:
                self._serves.discard(connection)

    def _serve(self, connection: socket.socket) -> None:
        while True:
            pull = pb.Answer.FromString(receive(connection)[0]).pull
            ranges = [(part.offset, part.length) for part in pull.ranges]
            self.pulls.append((pull.blob, ranges))
            blob = self.blobs.get(pull.blob, b"")
            pieces = [blob[offset : offset + length] for offset, length in ranges]
            if self.pull is not None:
                pieces = self.pull(pull.blob, ranges, pieces)
            frames = pb.Frames(lengths=[len(piece) for piece in pieces])
            connection.sendall(framing.pack(pb.Ask(frames=frames).SerializeToString(), b"".join(pieces)))


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def receive(connection: socket.socket) -> tuple[bytes, bytes]:
    """(message, payload) of the next frame."""
    message, payload = framing.header(_take(connection, framing.HEADER_BYTES))
    return _take(connection, message), _take(connection, payload)


def _take(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


# An agreement


def agreement_of(
    simulation: Simulation,
    members: Mapping[str, PrivateIdentity],
    *,
    tables: Mapping[str, Sequence[str]] | None = None,
    analysts: Sequence[str] = (),
    kms: Mapping[str, KeyArn] | None = None,
    **session: Any,
) -> Agreement:
    """An agreement of a table `visits` (amount: decimal, score: float, site: category) that every party brings.

    All members that are no analysts are parties, unless `tables` says who brings what. Outputs: counts, units, sums and
    means by site, for all members. `session` replaces fields of its session.
    """
    parties = tuple(name for name in members if name not in analysts)
    columns = (
        Column("amount", ColumnType.DECIMAL, True, 0, 1_000_000, 2),
        Column("score", ColumnType.FLOAT, True, -10.0, 10.0),
        Column("site", ColumnType.CATEGORY, False, values=("north", "south", "west")),
    )
    bringing = tables or {"visits": parties}
    made = {name: Table(name, tuple(who), "id", 50, columns) for name, who in bringing.items()}
    outputs = {}
    for number, (name, brought) in enumerate(made.items()):
        amount, score, site = (brought.ref(column.name) for column in columns)
        assert site is not None
        outputs[f"by_site_{number}" if number else "by_site"] = Output(
            name=f"by_site_{number}" if number else "by_site",
            kind=OutputKind.AGGREGATE,
            table=name,
            joins=(),
            where=None,
            by=(Grouping("site", site, (), site.column.values),),
            values=(
                Value("rows", Function.COUNT),
                Value("people", Function.UNITS),
                Value("total", Function.SUM, amount),
                Value("mean_score", Function.MEAN, score),
            ),
            recipients=tuple(members),
        )
    plain = Session(
        start=tuple(members)[:1],
        quorum=len(parties),
        deadline_ms=14 * 86_400_000,
        countersign_within_ms=86_400_000,
        max_releases=4,
        consent=Consent.ROSTER,
    )
    return Agreement(
        version=1,
        series_digest=None,
        replaces=None,
        title="visits-by-site",
        purpose="A test.",
        expires=date(2099, 12, 31),
        platform=Platform.SIMULATED,
        root_sha256=simulation.root.sha256,
        measurements=(simulation.measurement,),
        members={name: identity.public for name, identity in members.items()},
        groups={},
        unit=Unit("person"),
        tables=made,
        outputs=outputs,
        rules=(Rules(None, 2, 1, 0),),
        session=replace(plain, **session),
        kms=kms or {},
    )


def identities(names: Iterable[str]) -> dict[str, PrivateIdentity]:
    """Fresh keys for members."""
    return {name: PrivateIdentity.generate(os.urandom) for name in names}


def signed(agreement: Agreement, members: Mapping[str, PrivateIdentity], head: bytes = GENESIS) -> pb.SignedAgreement:
    """The agreement with the signatures of all its members."""
    signatures = {
        name: members[name].sign(AgreementSignature(agreement.digest, name, head).to_bytes())
        for name in agreement.members
    }
    return pb.SignedAgreement(canonical=agreement.canonical, signatures=signatures)


# Parties


@dataclass(frozen=True)
class Rows:
    """The true rows of a `visits` table, sorted by key."""

    keys: np.ndarray[Any, Any]
    amount: np.ndarray[Any, Any]
    score: np.ndarray[Any, Any]
    site: np.ndarray[Any, Any]


def rows_of(seed: int, count: int) -> Rows:
    """Random rows: keys of a person for every 20 rows, of 60 at least, amounts in cents, scores, sites 1 to 3."""
    random = np.random.default_rng(seed)
    people = max(60, count // 20)
    return Rows(
        keys=np.sort(random.integers(1000, 1000 + people, count).astype("<u8")),
        amount=random.integers(0, 100_000, count).astype("<i8"),
        score=random.normal(size=count).clip(-9, 9).astype("<f8"),
        site=random.integers(1, 4, count).astype("u1"),
    )


@dataclass
class Sealed:
    """A sealed table: the signed upload, its blob, and the content key."""

    upload: Upload
    cose: bytes
    blob: bytes
    content_key: bytes = field(repr=False)


def seal(agreement: Agreement, name: str, identity: PrivateIdentity, table_name: str, rows: Rows) -> Sealed:
    """Seals a table of a party as a client does."""
    spec = agreement.tables[table_name]
    groups, group_rows = table.bucket(len(rows.keys))
    content_key = os.urandom(32)
    header = UploadHeader(
        agreement.digest,
        name,
        table_name,
        spec.schema_digest,
        groups,
        group_rows,
        os.urandom(16),
        key_commitment(content_key),
    )
    layout = table.Layout.of(header, spec.widths)
    total = groups * group_rows
    padded = [np.full(total, table.KEY_PAD, "<u8"), *(np.full(total, c.null_value, c.dtype) for c in spec.columns)]
    for column, values in zip(padded, (rows.keys, rows.amount, rows.score, rows.site), strict=True):
        column[: len(values)] = values
    aead = AESGCM(frame_key(content_key, header.to_bytes()))
    frames = [table.seal_manifest(aead, len(rows.keys))]
    for group in range(groups):
        part = slice(group * group_rows, (group + 1) * group_rows)
        frames += [
            table.seal_frame(aead, group, number, column[part].tobytes()) for number, column in enumerate(padded)
        ]
    digests = b"".join(_sha256(frame) for frame in frames)
    upload = Upload(header.to_bytes(), table.frames_digest(digests))
    blob = digests + b"".join(frames)
    assert len(blob) == layout.size
    return Sealed(upload, identity.sign(upload.to_bytes()), blob, content_key)


def _sha256(data: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(data).digest()


class Party:
    """A party: its keys, its sealed tables, and what it signed last."""

    def __init__(self, agreement: Agreement, name: str, identity: PrivateIdentity, tables: Mapping[str, Rows]) -> None:
        self.agreement = agreement
        self.name = name
        self.identity = identity
        self.sealed = [seal(agreement, name, identity, table_name, tables[table_name]) for table_name in sorted(tables)]
        self.numbers = [int.from_bytes(os.urandom(6), "big") for _ in self.sealed]
        """The host's numbers of the blobs."""
        self.join: Join | None = None
        self.kms_statement: KmsJoin | None = None
        self.kms_keys = b""
        self.kms_context: dict[str, str] = {}
        self._one_time: Ed25519PrivateKey | None = None

    @property
    def blobs(self) -> dict[int, bytes]:
        """What the host stores."""
        return dict(zip(self.numbers, (sealed.blob for sealed in self.sealed), strict=True))

    def joining(self, offer: VerifiedOffer, /, **wrong: Any) -> pb.Join:
        """A fresh join of a session; `wrong` replaces fields of the statement."""
        digests = tuple(sealed.upload.digest for sealed in self.sealed)
        share = self.identity.derive(
            b"parley/1/noise-share", noise_share_context(self.agreement.series, offer.offer.head), 32
        )
        keys = JoinKeys(tuple(sealed.content_key for sealed in self.sealed), share)
        info = join_info(offer.digest, self.name, digests)
        self._one_time = Ed25519PrivateKey.generate()
        join = Join(
            offer.digest,
            self.name,
            digests,
            hpke.seal(offer.offer.sealing_key, keys.to_bytes(), info),
            share_digest(share),
            self._one_time.public_key().public_bytes_raw(),
        )
        self.join = replace(join, **wrong)
        return pb.Join(
            session=offer.offer.session,
            cose=self.identity.sign(self.join.to_bytes()),
            uploads=self._signed_uploads(),
        )

    def kms_join(self, kms: PaperKms | Key, number: int = 1, /, **wrong: Any) -> pb.KmsJoin:
        """A KMS join, to which session and answer are to be added; `wrong` replaces fields of the statement."""
        digests = tuple(sealed.upload.digest for sealed in self.sealed)
        share = self.identity.derive(b"parley/1/noise-share", kms_share_context(self.agreement.digest, digests), 32)
        self.kms_keys = kms_plaintext(tuple(sealed.content_key for sealed in self.sealed), share)
        self.kms_context = kms_context(self.agreement.digest, self.name, digests)
        self._one_time = Ed25519PrivateKey.generate()
        standing = self.agreement.session.consent is Consent.STANDING
        join = KmsJoin(
            self.agreement.digest,
            self.name,
            digests,
            kms.encrypt(self.kms_keys, self.kms_context),
            share_digest(share),
            NO_ROSTER_KEY if standing else self._one_time.public_key().public_bytes_raw(),
            number,
        )
        self.kms_statement = replace(join, **wrong)
        return pb.KmsJoin(cose=self.identity.sign(self.kms_statement.to_bytes()), uploads=self._signed_uploads())

    def _signed_uploads(self) -> list[pb.SignedUpload]:
        return [
            pb.SignedUpload(cose=sealed.cose, blob=number)
            for sealed, number in zip(self.sealed, self.numbers, strict=True)
        ]

    def consent(self, offer: VerifiedOffer, roster: Roster, former: Sequence[pb.FormerRoster] = ()) -> pb.Countersign:
        """The countersignature of a roster; `former` are those that the party signed before under this head."""
        assert self._one_time is not None
        digests = tuple(Roster.from_bytes(payload(item.cose)).digest for item in former)
        consent = RosterConsent(roster.digest, self.name, digests)
        signature = self._one_time.sign(consent.to_bytes())
        statement = Countersignature(roster.digest, self.name, digests, signature)
        cose = self.identity.sign(statement.to_bytes())
        return pb.Countersign(session=offer.offer.session, cose=cose, former=former)

    def refusal(self, offer: VerifiedOffer, roster: Roster) -> pb.Refuse:
        """The refusal of a roster."""
        cose = self.identity.sign(Refusal(roster.digest, self.name).to_bytes())
        return pb.Refuse(session=offer.offer.session, cose=cose)


def payload(cose: bytes) -> bytes:
    """The payload of a COSE_Sign1, unverified."""
    from parley_protocol.cose import payload_unverified

    return payload_unverified(cose)


# A run


class Run:
    """One agreement with its members on one simulation: the steps of a session, one method each."""

    def __init__(
        self,
        simulation: Simulation,
        agreement: Agreement,
        members: Mapping[str, PrivateIdentity],
        rows: Mapping[str, dict[str, Rows]],
    ) -> None:
        self.simulation = simulation
        self.agreement = agreement
        self.members = members
        self.rows = rows
        self.parties = {name: Party(agreement, name, members[name], rows[name]) for name in agreement.parties}
        self.host = Host(simulation.path)
        for party in self.parties.values():
            self.host.blobs |= party.blobs
        self.chain: list[pb.SignedRecord] = []

    def load(self) -> None:
        """Loads the agreement."""
        self.host.load(signed(self.agreement, self.members))

    def again(self) -> Run:
        """The same members, tables and chain with a new host, on whatever enclave the simulation runs now."""
        other = Run(self.simulation, self.agreement, self.members, self.rows)
        other.parties = self.parties
        other.host.blobs = self.host.blobs
        other.chain = self.chain
        return other

    def offer(self, head: bytes = GENESIS, request: bytes | None = None) -> VerifiedOffer:
        """Begins a session, or the one of `request` again, and verifies the offer as a client does."""
        offered = self.host.want("offered", begin=pb.Begin(request=request or os.urandom(16), chain=self.chain))
        return self.attest(offered.offer, head)

    def attest(self, offer: bytes, head: bytes = GENESIS) -> VerifiedOffer:
        """The offer, verified with a fresh document; `document` holds that document afterwards."""
        from parley_protocol.transcript import Offer

        nonce = os.urandom(32)
        session = Offer.from_bytes(offer).session
        self.document: bytes = self.host.want("attested", attest=pb.Attest(session=session, nonce=nonce)).document
        return verify_offer(
            self.agreement, offer, self.document, nonce=nonce, head=head, now_ms=self.simulation.now_ms()
        )

    def join(self, offer: VerifiedOffer, *names: str) -> None:
        """Joins the named parties, all when none is named."""
        for name in names or self.agreement.parties:
            self.host.want("joined", join=self.parties[name].joining(offer))

    def recipient(self, offer: VerifiedOffer, join: pb.KmsJoin) -> bytes:
        """The document with which KMS is asked for the keys of a KMS join."""
        asked = pb.Recipient(session=offer.offer.session, cose=join.cose, uploads=join.uploads)
        document: bytes = self.host.want("recipient", recipient=asked).document
        return document

    def answering(self, offer: VerifiedOffer, join: pb.KmsJoin, answer: bytes) -> pb.KmsJoin:
        """The KMS join with an answer of KMS."""
        return pb.KmsJoin(session=offer.offer.session, cose=join.cose, uploads=join.uploads, answer=answer)

    def kms(self, offer: VerifiedOffer, kms: PaperKms, join: pb.KmsJoin) -> pb.KmsJoin:
        """The KMS join with what KMS answers to a fresh document."""
        statement = KmsJoin.from_bytes(payload(join.cose))
        context = kms_context(statement.agreement, statement.party, statement.uploads)
        return self.answering(offer, join, kms.decrypt(statement.ciphertext, context, self.recipient(offer, join)))

    def starting(self, offer: VerifiedOffer, name: str | None = None) -> pb.Start:
        """The signed request to start."""
        member = name or self.agreement.session.start[0]
        cose = self.members[member].sign(Start(offer.digest, member).to_bytes())
        return pb.Start(session=offer.offer.session, cose=cose)

    def start(self, offer: VerifiedOffer) -> tuple[Roster, bytes]:
        """The roster and its envelope."""
        cose = self.host.want("rostered", start=self.starting(offer)).cose
        return Roster.from_bytes(payload(cose)), cose

    def countersign(
        self, offer: VerifiedOffer, roster: Roster, former: Mapping[str, Sequence[pb.FormerRoster]] | None = None
    ) -> pb.Answer:
        """Countersigns for all included parties; the answer to the last one."""
        answer = pb.Answer()
        for entry in roster.included:
            consent = self.parties[entry.party].consent(offer, roster, (former or {}).get(entry.party, ()))
            answer = self.host.ask(countersign=consent)
        return answer

    def stored(self, offer: VerifiedOffer, released: pb.Released) -> None:
        """Tells the enclave that the release is stored, and appends its record to the chain."""
        record = payload(released.cose)
        self.host.want("state", stored=pb.Stored(session=offer.offer.session, record=Record.from_bytes(record).digest))
        self.chain.append(pb.SignedRecord(cose=released.cose, document=released.document))

    def open(self, released: pb.Released, recipient: str) -> dict[str, OutputTable]:
        """The outputs of a recipient, each checked against its commitment in the record."""
        record = Record.from_bytes(payload(released.cose))
        committed = {item.output: item.commitment for item in record.body.outputs}
        found = {}
        for item in released.outputs:
            if item.recipient == recipient:
                plain = self.members[recipient].open(item.sealed, output_info(record.head, item.output, recipient))
                sealed = SealedOutput.from_bytes(plain)
                assert output_commitment(sealed.salt, sealed.plaintext) == committed[item.output]
                found[item.output] = OutputTable.from_bytes(sealed.plaintext)
        return found

    def close(self) -> None:
        """Ends the host."""
        self.host.close()


def released(answer: pb.Answer) -> pb.Released:
    """The release in an answer; fails when it is another."""
    assert answer.WhichOneof("op") == "released", answer
    return answer.released
