"""The operations on the wire: one Ask of the host, then one Answer (SPEC, "Enclave channel").

A refusal travels as its code alone. What is not a refusal but a fault of the program is "internal".
"""

from __future__ import annotations

from collections.abc import Callable

from parley_enclave.channel import Connection
from parley_enclave.enclave import Enclave, Progress
from parley_enclave.pool import Pool
from parley_enclave.roster import Former
from parley_protocol.errors import MalformedError, ParleyError
from parley_protocol.v1 import enclave_pb2 as pb


class Service:
    """Answers the host's connections, each in its own thread."""

    def __init__(self, enclave: Enclave, pool: Pool, *, log: Callable[[str], None]) -> None:
        self._enclave = enclave
        self._pool = pool
        self._log = log

    def handle(self, connection: Connection) -> None:
        """One connection: its Ask, its Answer. A Serve connection goes to the workers."""
        try:
            ask = connection.receive()
            if ask.WhichOneof("op") == "serve":
                self._pool.offer(connection.detach())
                return

            def progress(percent: int) -> None:
                connection.send(pb.Answer(progress=pb.Progress(percent=percent)))

            connection.send(self._answer(ask, progress))
        except MalformedError:
            self._fail(connection, "malformed")
        except (OSError, EOFError):
            # The host is gone. What was begun goes on, and is answered when the host asks again.
            return

    def _answer(self, ask: pb.Ask, progress: Progress) -> pb.Answer:
        try:
            return self._dispatch(ask, progress)
        except ParleyError as error:
            return pb.Answer(failed=pb.Failed(code=error.code))
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, it must not end the thread
            self._log(f"{ask.WhichOneof('op')} failed: {type(error).__name__}")
            return pb.Answer(failed=pb.Failed(code="internal"))

    def _dispatch(self, ask: pb.Ask, progress: Progress) -> pb.Answer:
        enclave = self._enclave
        match ask.WhichOneof("op"):
            case "load":
                signed = [(item.canonical, dict(item.signatures)) for item in ask.load.agreements]
                return pb.Answer(ready=pb.Ready(serves=enclave.load(signed)))
            case "begin":
                records = [(item.cose, item.document) for item in ask.begin.chain]
                return pb.Answer(offered=pb.Offered(offer=enclave.begin(ask.begin.request, records)))
            case "attest":
                document = enclave.attest(ask.attest.session, ask.attest.nonce)
                return pb.Answer(attested=pb.Attested(document=document))
            case "join":
                uploads = [(item.cose, item.blob) for item in ask.join.uploads]
                receipt = enclave.join(ask.join.session, ask.join.cose, uploads, progress)
                return pb.Answer(joined=pb.Joined(receipt=receipt))
            case "recipient":
                uploads = [(item.cose, item.blob) for item in ask.recipient.uploads]
                asked = enclave.recipient(ask.recipient.session, ask.recipient.cose, uploads)
                if asked.receipt:
                    return pb.Answer(joined=pb.Joined(receipt=asked.receipt))
                return pb.Answer(recipient=pb.RecipientDocument(document=asked.document))
            case "kms_join":
                join = ask.kms_join
                uploads = [(item.cose, item.blob) for item in join.uploads]
                receipt = enclave.kms_join(join.session, join.cose, uploads, join.answer, progress)
                return pb.Answer(joined=pb.Joined(receipt=receipt))
            case "start":
                cose = enclave.start(ask.start.session, ask.start.cose)
                if cose is None:
                    return self._released(ask.start.session, progress)
                return pb.Answer(rostered=pb.Rostered(cose=cose))
            case "countersign":
                former = [Former(item.offer, item.document, item.cose) for item in ask.countersign.former]
                missing = enclave.countersign(ask.countersign.session, ask.countersign.cose, former)
                if missing is None:
                    return self._released(ask.countersign.session, progress)
                return pb.Answer(awaiting=pb.Awaiting(members=missing))
            case "refuse":
                again = enclave.refuse(ask.refuse.session, ask.refuse.cose)
                return pb.Answer(awaiting=pb.Awaiting(members=again))
            case "stored":
                enclave.stored(ask.stored.session, ask.stored.record)
                return self._state()
            case "status":
                return self._state()
        raise MalformedError("Ask: no operation of the host")

    def _released(self, session: bytes, progress: Progress) -> pb.Answer:
        made = self._enclave.released(session, progress)
        outputs = [
            pb.SealedOutput(output=item.output, recipient=item.recipient, sealed=item.data) for item in made.outputs
        ]
        return pb.Answer(released=pb.Released(cose=made.cose, document=made.document, outputs=outputs))

    def _state(self) -> pb.Answer:
        status = self._enclave.status()
        return pb.Answer(
            state=pb.State(
                phase=status.phase.value,
                agreement=status.agreement,
                session=status.session,
                offer=status.offer,
                roster=status.roster,
                joined=status.joined,
                missing=status.missing,
                code=status.code,
            )
        )

    @staticmethod
    def _fail(connection: Connection, code: str) -> None:
        try:
            connection.send(pb.Answer(failed=pb.Failed(code=code)))
        except OSError:
            # Nobody is there to be told.
            return
