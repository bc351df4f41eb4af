"""A server that speaks S3 over HTTP, and a bucket in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import pytest
from moto.server import ThreadedMotoServer

from parley_coordinator.config import S3
from parley_coordinator.s3 import client

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


def bucket(url: str) -> S3:
    """A new bucket. Blocks are few, so that what is not fetched anew when it should be shows."""
    made = S3(
        f"parley-{next(_NUMBERS)}", "blobs/", "us-east-1", endpoint_url=url, addressing="path", cache_bytes=16 << 20
    )
    opened = client(made)
    opened.create_bucket(Bucket=made.bucket)
    opened.close()
    return made
