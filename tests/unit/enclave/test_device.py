"""The kernel's device: a test in the kernel's place, and the kernel itself on files that are no NSM."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from parley_deploy.nsm import LocalRoot, SimulatedNsm, serve
from parley_deploy.pki import system_now_ms
from parley_enclave import device as module
from parley_enclave.device import Device, KernelDevice, SocketDevice, open_device, require_private
from parley_enclave.nsm import Nsm, NsmError
from parley_protocol import limits
from parley_protocol.encoding import decode, encode
from parley_protocol.errors import UnavailableError

RAW = struct.Struct("=QQQQ")


class Driver:
    """The kernel's driver: reads the request and writes the response through the addresses, then the true length."""

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self._answer = answer
        self.buffers: set[tuple[int, int]] = set()
        self.descriptors: set[int] = set()

    def __call__(self, descriptor: int, request: int, raw: bytearray) -> int:
        assert request == 0xC0200A00
        assert len(raw) == 32
        self.descriptors.add(descriptor)
        from_, size, to, room = RAW.unpack(raw)
        assert room == 0x3000, "what is longer is cut without a word"
        self.buffers |= {(from_, 0x1000), (to, room)}
        answer = self._answer(ctypes.string_at(from_, size))
        ctypes.memmove(to, answer, min(room, len(answer)))
        raw[:] = RAW.pack(from_, size, to, len(answer))
        return 0

    def left(self) -> bytes:
        """What stands in the buffers now."""
        return b"".join(ctypes.string_at(*buffer) for buffer in self.buffers)


def failing(number: int) -> Callable[[int, int, bytearray], int]:
    def ioctl(_descriptor: int, _request: int, _raw: bytearray) -> int:
        raise OSError(number, os.strerror(number))

    return ioctl


def test_a_request_goes_in_and_a_response_comes_out_by_address() -> None:
    driver = Driver(lambda request: request[::-1] * 2)
    device = KernelDevice("/dev/null", driver)
    assert device.request(b"abc") == b"cbacba"
    assert device.request(bytes(limits.NSM_REQUEST_BYTES)) == bytes(2 * limits.NSM_REQUEST_BYTES)
    assert device.request(b"again") == b"niaganiaga"
    device.close()


def test_nothing_of_a_request_stays_in_memory() -> None:
    driver = Driver(lambda request: b"random bytes" * 1000)
    device = KernelDevice("/dev/null", driver)
    device.request(b"secret" * 100)
    assert driver.left() == bytes(0x4000)
    device.close()

    def fails(request: bytes) -> bytes:
        raise OSError(errno.EIO, "after the request was written")

    driver = Driver(fails)
    device = KernelDevice("/dev/null", driver)
    with pytest.raises(UnavailableError):
        device.request(b"secret" * 100)
    assert driver.left() == bytes(0x4000)
    device.close()


def test_a_response_that_was_cut_or_is_none_is_refused() -> None:
    for length, taken in ((0, False), (1, True), (0x3000, True), (0x3001, False), (1 << 40, False)):

        def ioctl(_descriptor: int, _request: int, raw: bytearray, length: int = length) -> int:
            raw[24:] = struct.pack("=Q", length)
            return 0

        device = KernelDevice("/dev/null", ioctl)
        if taken:
            assert device.request(b"x") == bytes(length)
        else:
            with pytest.raises(UnavailableError, match=f"{length} bytes"):
                device.request(b"x")
        device.close()


def test_a_request_that_is_too_long_never_reaches_the_kernel() -> None:
    device = KernelDevice("/dev/null", lambda *_: pytest.fail("reached"))
    with pytest.raises(ValueError, match="NSM request"):
        device.request(bytes(limits.NSM_REQUEST_BYTES + 1))
    device.close()


@pytest.mark.parametrize("name", ["EMSGSIZE", "ETIMEDOUT", "EIO", "ENODATA", "EFAULT", "EINVAL"])
def test_the_kernels_errors_are_named(name: str) -> None:
    device = KernelDevice("/dev/null", failing(getattr(errno, name)))
    with pytest.raises(UnavailableError, match=f"^the NSM does not answer: {name}$"):
        device.request(b"x")
    device.close()


def test_the_kernel_itself_says_that_a_file_is_no_nsm(tmp_path: Path) -> None:
    for path in ("/dev/null", tmp_path / "file"):
        Path(path).touch()
        device = open_device(f"dev:{path}")
        assert isinstance(device, KernelDevice)
        with pytest.raises(UnavailableError, match="ENOTTY"):
            device.request(b"x")
        device.close()
        with pytest.raises(UnavailableError, match="EBADF"):
            device.request(b"x")
    with pytest.raises(UnavailableError, match="does not open: ENOENT"):
        open_device(f"dev:{tmp_path}/none")


def test_the_descriptor_is_not_inherited() -> None:
    driver = Driver(lambda request: b"x")
    device = KernelDevice("/dev/null", driver)
    device.request(b"x")
    (descriptor,) = driver.descriptors
    assert not os.get_inheritable(descriptor)
    device.close()


def test_requests_are_serialised() -> None:
    inside = threading.Lock()
    answered: list[bytes] = []

    def answer(request: bytes) -> bytes:
        assert inside.acquire(blocking=False), "two requests at a time"
        threading.Event().wait(0.002)
        inside.release()
        return request

    device = KernelDevice("/dev/null", Driver(answer))
    threads = [threading.Thread(target=lambda n=n: answered.append(device.request(b"%d" % n))) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answered) == sorted(b"%d" % n for n in range(16))
    device.close()


def test_random_bytes_come_through_the_device_however_few_at_a_time() -> None:
    asked: list[object] = []

    def answer(request: bytes) -> bytes:
        asked.append(decode(request))
        return encode({"GetRandom": {"random": bytes([len(asked)])}})

    device: Device = KernelDevice("/dev/null", Driver(answer))
    assert Nsm(device).random(40) == bytes(range(1, 41))
    assert asked == ["GetRandom"] * 40


def test_a_module_that_gives_no_more_random_bytes_ends_the_loop() -> None:
    answers = iter([bytes(8), b""])
    device = KernelDevice("/dev/null", Driver(lambda _: encode({"GetRandom": {"random": next(answers)}})))
    with pytest.raises(NsmError, match="random"):
        Nsm(device).random(40)
    device.close()


def test_addresses() -> None:
    assert isinstance(open_device("unix:nsm.sock"), SocketDevice)
    for address in ("/dev/nsm", "dev:", "unix:", "tcp:1", ""):
        with pytest.raises(ValueError, match="address of an NSM"):
            open_device(address)
        with pytest.raises(ValueError, match="address of an NSM"):
            require_private(address)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: only root makes device nodes")


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A device node that is /dev/null's."""
    path = tmp_path / "nsm"
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("NOT TESTED: device nodes cannot be made here")
    path.chmod(0o600)
    return path


@needs_root
def test_a_device_is_for_this_process_alone(node: Path) -> None:
    require_private(f"dev:{node}")
    for mode in (0o666, 0o640, 0o602, 0o601):
        node.chmod(mode)
        with pytest.raises(ValueError, match=f"open to others: mode {mode:04o}"):
            require_private(f"dev:{node}")
    node.chmod(0o600)
    os.chown(node, 1000, 0)
    with pytest.raises(ValueError, match="belongs to uid 1000"):
        require_private(f"dev:{node}")


def test_what_is_no_device_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch(0o600)
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    for path in (file, link):
        with pytest.raises(ValueError, match="is no device"):
            require_private(f"dev:{path}")
        with pytest.raises(ValueError, match="is no socket"):
            require_private(f"unix:{path}")
    with pytest.raises(ValueError, match="ENOENT"):
        require_private(f"dev:{tmp_path}/none")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        (tmp_path / "socket").chmod(0o600)
        require_private(f"unix:{tmp_path}/socket")


@needs_root
def test_the_process_does_not_start_over_a_device_that_its_workers_could_open(node: Path) -> None:
    node.chmod(0o666)
    arguments = ["--listen", "vsock:5005", "--nsm", f"dev:{node}", "--worker-uid", "61234"]
    command = [sys.executable, "-P", "-m", "parley_enclave", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.endswith(f"error: {node} is open to others: mode 0666\n")
    node.chmod(0o600)
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    # Now it goes as far as asking, and /dev/null is no module.
    assert (ended.returncode, ended.stderr) == (1, "parley-enclave: the NSM does not answer: ENOTTY\n")


def test_without_a_device_the_process_says_so_and_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "parley_enclave", "--listen", "vsock:5005", "--nsm", f"dev:{tmp_path}/nsm"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, f"parley-enclave: {tmp_path}/nsm does not open: ENOENT\n")


@pytest.mark.parametrize(
    ("listen", "code", "said"),
    [("vsock:x", 2, "not an address to listen at: vsock:x"), ("unix:/none/x", 1, "cannot listen at unix:/none/x")],
)
def test_an_address_at_which_nobody_listens_is_named(tmp_path: Path, listen: str, code: int, said: str) -> None:
    root = LocalRoot.create(system_now_ms())
    nsm = SimulatedNsm(root, {index: bytes(48) for index in range(3)}, now_ms=system_now_ms, random=os.urandom)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "nsm"))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            serve(nsm, connection)

        threading.Thread(target=answer, daemon=True).start()
        command = [sys.executable, "-P", "-m", "parley_enclave", "--listen", listen, "--nsm", f"unix:{tmp_path}/nsm"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == code
    assert said in ended.stderr.splitlines()[-1] and "Traceback" not in ended.stderr


def test_the_request_number_is_that_of_the_kernels_header() -> None:
    """_IOWR(0x0A, 0, struct nsm_raw)."""
    assert 3 << 30 | RAW.size << 16 | 0x0A << 8 | 0 == module.NSM_IOCTL_RAW
