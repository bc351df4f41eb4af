"""The directory of blobs: what was synced survives, a whole blob is there as a whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from parley_coordinator.blobs import Directory, bundle_name, upload_name
from parley_protocol.errors import UnavailableError


def test_a_blob_grows_and_is_read(tmp_path: Path) -> None:
    blobs = Directory(tmp_path)
    writer = blobs.writer("upload-1", 0)
    writer.write(b"abc")
    writer.write(b"def")
    assert (writer.position, writer.sync()) == (6, 6)
    writer.close()
    reader = blobs.reader("upload-1")
    assert (reader.size, reader.read(2, 3), reader.read(5, 9)) == (6, b"cde", b"f")
    reader.close()


def test_writing_goes_on_after_what_was_stored(tmp_path: Path) -> None:
    blobs = Directory(tmp_path)
    writer = blobs.writer("upload-1", 0)
    writer.write(b"abcdef")
    writer.close()
    writer = blobs.writer("upload-1", 2)
    writer.write(b"XY")
    writer.sync()
    writer.close()
    assert blobs.reader("upload-1").read(0, 99) == b"abXY"


def test_bytes_that_were_stored_and_are_gone_are_an_error(tmp_path: Path) -> None:
    blobs = Directory(tmp_path)
    blobs.writer("upload-1", 0).close()
    with pytest.raises(OSError, match="0 bytes where 5"):
        blobs.writer("upload-1", 5)


@pytest.mark.parametrize("name", ["", "../x-1", "upload-", "upload-XY", "upload-1/2", "a-" + "0" * 65])
def test_names_leave_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Directory(tmp_path).delete(name)


def test_names_of_uploads_and_bundles_are_apart(tmp_path: Path) -> None:
    blobs = Directory(tmp_path)
    blobs.put(bundle_name(bytes(16)), [b"bundle"])
    blobs.put(upload_name(0), [b"upload"])
    assert blobs.reader(bundle_name(bytes(16))).read(0, 9) == b"bundle"
    blobs.delete(bundle_name(bytes(16)))
    with pytest.raises(FileNotFoundError):
        blobs.reader(bundle_name(bytes(16)))


def test_a_full_store_is_unavailable(tmp_path: Path) -> None:
    writer = Directory(tmp_path).writer("upload-1", 0)
    writer.close()
    with pytest.raises(UnavailableError):
        writer.write(b"x")


def test_a_range_goes_to_a_socket(tmp_path: Path) -> None:
    blobs = Directory(tmp_path)
    data = os.urandom(300_000)
    blobs.put("upload-1", [data])
    here, there = socket.socketpair()
    with here, there:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        reader = blobs.reader("upload-1")
        reader.send(here, 1000, 20_000)
        got = b""
        while len(got) < 20_000:
            got += there.recv(1 << 20)
        assert got == data[1000:21_000]
        with pytest.raises(OSError, match="ended"):
            reader.send(here, len(data), 1)


PUT = """
import sys
from parley_coordinator.blobs import Directory
def pieces():
    yield b"new " * 1000
    print("half", flush=True)
    sys.stdin.read()
Directory(__import__("pathlib").Path(sys.argv[1])).put("bundle-0", pieces())
"""


def test_a_kill_in_the_middle_of_a_put_leaves_the_old_blob(tmp_path: Path) -> None:
    blobs = Directory(tmp_path)
    blobs.put("bundle-0", [b"old"])
    with subprocess.Popen(
        [sys.executable, "-c", PUT, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert blobs.reader("bundle-0").read(0, 99) == b"old"
    assert blobs.put("bundle-0", [b"newer"]) == 5
    assert blobs.reader("bundle-0").read(0, 99) == b"newer"


WRITE = """
import sys
from parley_coordinator.blobs import Directory
writer = Directory(__import__("pathlib").Path(sys.argv[1])).writer("upload-1", 0)
writer.write(b"s" * 1000)
stored = writer.sync()
writer.write(b"t" * 500)
print(stored, flush=True)
sys.stdin.read()
"""


def test_a_kill_in_the_middle_of_writing_keeps_what_was_synced(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        stored = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.wait()
    writer = Directory(tmp_path).writer("upload-1", stored)
    writer.write(b"u")
    writer.sync()
    writer.close()
    assert Directory(tmp_path).reader("upload-1").read(0, 2000) == b"s" * 1000 + b"u"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_range_is_sent_without_the_kernels_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    blobs = Directory(tmp_path)
    data = os.urandom(3 << 20)
    blobs.put("bundle-1", [data])

    def none(*arguments: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "sendfile", none)
    here, there = socket.socketpair()
    reader = blobs.reader("bundle-1")
    with here, there:
        thread = threading.Thread(target=reader.send, args=(here, 7, len(data) - 9))
        thread.start()
        received = b""
        while len(received) < len(data) - 9:
            received += there.recv(1 << 20)
        thread.join()
        assert received == data[7:-2]
        with pytest.raises(OSError, match="ended while it was sent"):
            reader.send(here, len(data), 1)
    reader.close()


def test_a_connection_that_breaks_is_an_error(tmp_path: Path) -> None:
    blobs = Directory(tmp_path)
    blobs.put("bundle-1", [b"abc"])
    here, there = socket.socketpair()
    there.close()
    reader = blobs.reader("bundle-1")
    with here, pytest.raises(BrokenPipeError):
        reader.send(here, 0, 3)
    reader.close()
