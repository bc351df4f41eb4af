"""A coordinator as its own process in a folder, and callers that speak to it without the client library."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from parley_coordinator import tls
from parley_coordinator.__main__ import main
from parley_protocol.agreement.model import Agreement
from parley_protocol.agreement.signed import sign
from parley_protocol.claims import VerifiedOffer, verify_offer, verify_roster
from parley_protocol.identity import PrivateIdentity, dump_public
from parley_protocol.transcript import GENESIS, Caller, Roster, Start
from parley_protocol.v1 import coordinator_pb2 as pb
from parley_protocol.v1.coordinator_pb2_grpc import CoordinatorStub
from support.enclave import Party, Sealed, until

CHUNK = 1 << 20


def now_ms() -> int:
    """The wall clock."""
    return time.time_ns() // 1_000_000


def code_of(error: grpc.RpcError) -> str:
    """The stable code in an error: ErrorInfo.reason."""
    return error_info(error).reason


def error_info(error: grpc.RpcError) -> ErrorInfo:
    """The ErrorInfo of an error; fails where it has none."""
    assert isinstance(error, grpc.Call)
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            info = ErrorInfo()
            for detail in Status.FromString(value if isinstance(value, bytes) else value.encode()).details:
                if detail.Unpack(info):
                    return info
    raise AssertionError(f"no ErrorInfo in {error}")


@contextmanager
def refused(code: str) -> Iterator[None]:
    """Expects a gRPC error with a code."""
    try:
        yield
    except grpc.RpcError as error:
        assert code_of(error) == code, error
    else:
        raise AssertionError(f"not refused with {code}")


class Client:
    """One member's calls. `server` is the digest that its caller statements name."""

    def __init__(self, address: str, certificate: bytes, identity: PrivateIdentity) -> None:
        self.identity = identity
        self.server = tls.server_digest(certificate)
        self.channel = grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(certificate),
            options=(("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)),
        )
        self.stub = CoordinatorStub(self.channel)

    def metadata(self, **wrong: Any) -> tuple[tuple[str, bytes], ...]:
        """The metadata of a call; `wrong` replaces fields of the statement."""
        fields = {"member_key": self.identity.public.signing, "server": self.server, "expires_at": now_ms() + 60_000}
        statement = Caller(**{**fields, **wrong})
        return (("parley-caller-bin", self.identity.sign(statement.to_bytes())),)

    def call(self, method: str, request: Any, timeout: float = 120.0) -> Any:
        """The answer to one call."""
        return getattr(self.stub, method)(request, metadata=self.metadata(), timeout=timeout)

    def upload(self, sealed: Sealed, start: int = 0, end: int | None = None) -> pb.UploadState:
        """Sends bytes `start` to `end` of a blob."""
        stop = len(sealed.blob) if end is None else end
        return self.send(
            pb.UploadRequest(begin=pb.UploadBegin(cose=sealed.cose)),
            *(
                pb.UploadRequest(chunk=pb.Chunk(offset=at, data=sealed.blob[at : min(at + CHUNK, stop)]))
                for at in range(start, stop, CHUNK)
            ),
        )

    def send(self, *requests: pb.UploadRequest) -> pb.UploadState:
        """An upload stream of these messages."""
        answer: pb.UploadState = self.stub.Upload(iter(requests), metadata=self.metadata(), timeout=120.0)
        return answer

    def bundle(self, session: bytes, offset: int = 0) -> bytes:
        """The bundle from an offset on."""
        chunks = self.stub.GetBundle(
            pb.GetBundleRequest(session=session, offset=offset), metadata=self.metadata(), timeout=60.0
        )
        return b"".join(chunk.data for chunk in chunks)

    def inbox(self) -> list[pb.InboxItem]:
        """What waits."""
        return list(self.call("Inbox", pb.InboxRequest()).items)

    def waiting(self) -> list[str]:
        """Kinds of what waits, without the prefix."""
        return [pb.InboxItem.Kind.Name(item.kind).removeprefix("KIND_") for item in self.inbox()]

    def events(self, seconds: float = 1.0, session: bytes = b"", after: int = 0) -> list[pb.Event]:
        """The events that arrive within a time."""
        stream = self.stub.Watch(
            pb.WatchRequest(after=after, session=session), metadata=self.metadata(), timeout=seconds
        )
        found = []
        try:
            for event in stream:
                found.append(event)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, error
        return found

    def close(self) -> None:
        """Ends the connection."""
        self.channel.close()


class Coordinator:
    """A folder with a coordinator; `start`, `stop` and `kill` its process as often as wanted.

    `command` is the launcher's, to which `--dir` and `--agreement-hint` are added; `toml` is added to the configuration,
    `database` and `blobs` stand in it, `enclaves` is the launcher's folder.
    """

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        toml: str = "",
        *,
        database: str | None = None,
        blobs: str = "blobs",
        enclaves: Path | None = None,
    ) -> None:
        self.folder = folder
        self.database = database or f"sqlite:///{folder / 'coordinator.db'}"
        self.enclaves_folder = enclaves or folder / "e"
        self.process: subprocess.Popen[bytes] | None = None
        self.address = ""
        self.tree: Path | None = None
        """The image tree that its enclaves run, where it is not what is installed."""
        self.clients: list[Client] = []
        self.run_command("init", "--dir", str(folder), "--listen", "127.0.0.1:0")
        listed = ", ".join(f'"{part}"' for part in command)
        (folder / "coordinator.toml").write_text(
            f'listen = "127.0.0.1:0"\ngrace_s = 2.0\n{toml}\n'
            f'[launcher.local]\ncommand = [{listed}]\nfolder = "{self.enclaves_folder}"\n'
            "[deadline]\nstatus_s = 0.2\n"
            f'[store]\ndatabase = "{self.database}"\nblobs = "{blobs}"\n'
        )

    @property
    def certificate(self) -> bytes:
        """The server's certificate, PEM."""
        return (self.folder / "tls.crt").read_bytes()

    @property
    def log(self) -> str:
        """What it wrote to standard error, over all starts."""
        return (self.folder / "log").read_text()

    def run_command(self, *arguments: str) -> str:
        """The output of one command of parley-coordinator."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            assert main(arguments) == 0
        return output.getvalue()

    def operators(self, *identities: PrivateIdentity) -> None:
        """Lists keys as those that may put agreements and open sessions."""
        for number, identity in enumerate(identities):
            path = self.folder / f"operator{number}.pub"
            path.write_bytes(dump_public(identity.public))
            self.run_command("operators", "add", str(path), "--dir", str(self.folder))

    def start(self) -> Self:
        """Starts it and waits until it listens."""
        (self.folder / "address").unlink(missing_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "parley_coordinator", "run", "--dir", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        process = self.process
        until(lambda: (self.folder / "address").exists() or process.poll() is not None)
        assert process.poll() is None, self.log
        self.address = (self.folder / "address").read_text().strip()
        return self

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        self._drop_clients()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        self.process = None
        self._drop_clients()
        return code

    def client(self, identity: PrivateIdentity) -> Client:
        """A caller with this key."""
        client = Client(self.address, self.certificate, identity)
        self.clients.append(client)
        return client

    def enclaves(self) -> list[Path]:
        """Folders of its enclaves."""
        folder = self.enclaves_folder
        return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.exists() else []

    def enclave_pid(self) -> int:
        """The process of its one enclave."""
        (folder,) = self.enclaves()
        return int((folder / "enclave.pid").read_text())

    def end_enclaves(self) -> None:
        """Ends what the launcher left alive."""
        for folder in self.enclaves():
            for name in ("nsm.pid", "enclave.pid"):
                try:
                    os.kill(int((folder / name).read_text()), signal.SIGKILL)
                except (OSError, ValueError):
                    continue

    def _drop_clients(self) -> None:
        for client in self.clients:
            client.close()
        self.clients.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.end_enclaves()


class Play:
    """The members of one agreement, who play a session through a coordinator. The first member starts and opens."""

    def __init__(
        self,
        coordinator: Coordinator,
        agreement: Agreement,
        members: Mapping[str, PrivateIdentity],
        parties: Mapping[str, Party],
    ) -> None:
        self.coordinator = coordinator
        self.agreement = agreement
        self.members = members
        self.parties = parties
        self.starter = agreement.session.start[0]
        self.session = b""

    def client(self, name: str) -> Client:
        """A member's calls to the coordinator as it runs now."""
        return self.coordinator.client(self.members[name])

    def sign(self) -> None:
        """Puts the agreement and all signatures."""
        self.client(self.starter).call("PutAgreement", pb.PutAgreementRequest(canonical=self.agreement.canonical))
        for name in self.agreement.members:
            cose = sign(self.agreement, name, self.members[name])
            request = pb.PutSignatureRequest(agreement=self.agreement.digest, member=name, cose=cose)
            self.client(name).call("PutSignature", request)

    def upload(self) -> None:
        """Uploads all tables of all parties."""
        for name, party in self.parties.items():
            for sealed in party.sealed:
                assert self.client(name).upload(sealed).complete

    def open(self, request_id: bytes | None = None) -> pb.SessionState:
        """Opens a session, or the one of this request again."""
        request = pb.OpenSessionRequest(request_id=request_id or os.urandom(16), agreement=self.agreement.digest)
        state: pb.SessionState = self.client(self.starter).call("OpenSession", request)
        self.session = state.session
        return state

    def offer(self, name: str | None = None, head: bytes = GENESIS) -> VerifiedOffer:
        """The offer, verified as a client does."""
        nonce = os.urandom(32)
        reply = self.client(name or self.starter).call("Attest", pb.AttestRequest(session=self.session, nonce=nonce))
        return verify_offer(self.agreement, reply.offer, reply.document, nonce=nonce, head=head, now_ms=now_ms())

    def join(self, offer: VerifiedOffer, *names: str) -> None:
        """Joins the named parties, all when none is named; each must get a receipt."""
        for name in names or self.parties:
            cose = self.parties[name].joining(offer).cose
            reply = self.client(name).call("PutJoin", pb.PutJoinRequest(session=self.session, cose=cose))
            assert reply.receipt, reply.code

    def start(self, offer: VerifiedOffer) -> Roster:
        """Closes the inputs; the verified roster."""
        cose = self.members[self.starter].sign(Start(offer.digest, self.starter).to_bytes())
        reply = self.client(self.starter).call("Start", pb.StartRequest(session=self.session, cose=cose))
        return verify_roster(reply.cose, offer.offer, self.agreement)

    def countersign(self, offer: VerifiedOffer, roster: Roster, names: Iterable[str] | None = None) -> pb.SessionState:
        """Countersigns for the named parties, all when none is named; the last answer."""
        state = pb.SessionState()
        for name in self.parties if names is None else names:
            cose = self.parties[name].consent(offer, roster).cose
            request = pb.PutCountersignatureRequest(session=self.session, cose=cose)
            state = self.client(name).call("PutCountersignature", request)
        return state

    def state(self) -> pb.SessionState:
        """The session as the starter sees it."""
        state: pb.SessionState = self.client(self.starter).call("GetSession", pb.SessionRef(session=self.session))
        return state

    def wait(self, *phases: str, seconds: float = 60.0) -> pb.SessionState:
        """Waits for a phase."""
        holds: Callable[[], bool] = lambda: self.state().phase in phases  # noqa: E731
        until(holds, seconds)
        return self.state()
