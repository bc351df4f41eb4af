"""An upload by the client to a coordinator, against a bare gRPC stream with the same TLS whose receiver writes and syncs.

The bare receiver is its own process too, takes messages of the same size, writes each, and calls fdatasync once at the end.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
from figures import Figure, paired

from parley.transport import Transport
from parley_protocol import limits
from parley_protocol.agreement.signed import sign
from parley_protocol.table import Layout, bucket
from parley_protocol.transcript import Upload, UploadHeader
from support.coordinator import Coordinator
from support.enclave import until
from support.world import World, world

METHOD = "/bench.Bare/Take"


def serve(certificate: Path, key: Path, folder: Path) -> None:
    """The bare receiver; runs until it is killed."""

    def take(stream: Iterator[bytes], _: grpc.ServicerContext) -> bytes:
        with (folder / secrets.token_hex(4)).open("wb") as file:
            for data in stream:
                file.write(data)
            file.flush()
            os.fdatasync(file.fileno())
        return b"done"

    handlers: dict[str, Any] = {"Take": grpc.stream_unary_rpc_method_handler(take)}
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", limits.RPC_BYTES)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bare", handlers),))
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    (folder / "port").write_text(str(port))
    server.wait_for_termination()


def send(channel: grpc.Channel, blob: Path) -> None:
    """Streams a file in messages of the size that an upload has."""

    def pieces() -> Iterator[bytes]:
        with blob.open("rb") as file:
            while data := file.read(limits.CHUNK_BYTES):
                yield data

    call: Any = channel.stream_unary(METHOD)
    call(pieces(), timeout=600)


def upload_of(made: World, blob: Path, rows: int) -> Upload:
    """A fresh upload statement for a blob of the size that `rows` rows have; its content is noise, as sealed frames are."""
    table = made.agreement.tables["visits"]
    groups, group_rows = bucket(rows)
    header = UploadHeader(
        made.agreement.digest, "ada", "visits", table.schema_digest, groups, group_rows, os.urandom(16), bytes(48)
    )
    size = Layout.of(header, table.widths).size
    if not blob.exists() or blob.stat().st_size != size:
        with blob.open("wb") as file:
            for at in range(0, size, 1 << 24):
                file.write(os.urandom(min(1 << 24, size - at)))
    return Upload(header.to_bytes(), os.urandom(48))


def figures(rows: list[int]) -> list[Figure]:
    """Throughput in MB/s for each size."""
    made = world()
    found = []
    with tempfile.TemporaryDirectory() as name, Coordinator(Path(name) / "c", ["false"]) as coordinator:
        folder = Path(name)
        coordinator.operators(made.members["ada"])
        coordinator.start()
        identity = made.members["ada"]
        pin = coordinator.certificate.decode()
        bare = subprocess.Popen(
            [sys.executable, __file__, str(coordinator.folder / "tls.crt"), str(coordinator.folder / "tls.key"), name],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        )
        try:
            until(lambda: (folder / "port").exists() and (folder / "port").read_text())
            port = (folder / "port").read_text()
            with (
                closing(Transport(coordinator.address, identity, pin)) as transport,
                grpc.secure_channel(
                    f"127.0.0.1:{port}",
                    grpc.ssl_channel_credentials(coordinator.certificate),
                    options=[("grpc.ssl_target_name_override", "localhost")],
                ) as channel,
            ):
                transport.put_agreement(made.agreement.canonical)
                for member in made.members:
                    with closing(Transport(coordinator.address, made.members[member], pin)) as other:
                        cose = sign(made.agreement, member, made.members[member])
                        other.put_signature(made.agreement.digest, member, cose)
                for count in rows:
                    blob = folder / f"{count}.blob"
                    upload_of(made, blob, count)

                    def ours(blob: Path = blob, count: int = count) -> None:
                        upload = upload_of(made, blob, count)
                        transport.upload(upload.digest, identity.sign(upload.to_bytes()), blob)

                    mine, theirs = paired(ours, lambda blob=blob: send(channel, blob), runs=3)  # type: ignore[misc]
                    size = blob.stat().st_size / 1e6
                    what = f"upload {size:,.0f} MB ({count:,} rows)"
                    found.append(
                        Figure(what, size / mine, size / theirs, "MB/s", "bare gRPC stream, fdatasync", ">= 0.8")
                    )
                    blob.unlink()
        finally:
            bare.kill()
            bare.wait()
    return found


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
