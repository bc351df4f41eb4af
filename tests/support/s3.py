"""A server that speaks S3 over HTTP, and a bucket in it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from parley_coordinator.config import S3
from parley_coordinator.s3 import client
from support.coordinator import free_port
from support.enclave import until

_NUMBERS = count(1)
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@contextmanager
def server() -> Iterator[str]:
    """The URL of a server for as long as the block lasts; credentials for it are in the environment."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in CREDENTIALS.items():
            patched.setenv(name, value)
        made = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        made.start()
        host, port = made.get_host_and_port()
        try:
            yield f"http://{host}:{port}"
        finally:
            made.stop()


@contextmanager
def server_process(folder: Path) -> Iterator[str]:
    """The URL of a server in a process of its own, which keeps what it is given on the disk; credentials as above."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patched, (folder / "s3.log").open("wb") as log:
        for name, value in {**CREDENTIALS, "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": "65536", "TMPDIR": str(folder)}.items():
            patched.setenv(name, value)
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            until(lambda: _answers(port) or process.poll() is not None)
            assert process.poll() is None, (folder / "s3.log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def toml(made: S3) -> str:
    """What a coordinator's configuration says of a bucket, besides its name."""
    return f'[store.s3]\nregion = "{made.region}"\nendpoint_url = "{made.endpoint_url}"\naddressing = "path"\n'


def bucket(url: str) -> S3:
    """A new bucket. Blocks are few, so that what is not fetched anew when it should be shows."""
    made = S3(
        f"parley-{next(_NUMBERS)}", "blobs/", "us-east-1", endpoint_url=url, addressing="path", cache_bytes=16 << 20
    )
    opened = client(made)
    opened.create_bucket(Bucket=made.bucket)
    opened.close()
    return made
