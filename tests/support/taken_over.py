"""A worker that a table has taken over: tries all that would reach another process or outlast its end.

`taken_over.py SECRET PARENT SIBLING [free]` prints as JSON what became of each attempt: "done" or the error's number. With
`free` it keeps what a worker gives up, and leaves nothing behind either. `taken_over.py sibling` is its neighbour. In an image
of the tests it stands in place of the enclave's own program and starts both under the workers' uid: see `_serve`.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from parley_enclave.confine import confine_worker

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
LIBC.shmdt.argtypes = [ctypes.c_long]
COLUMN = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
NUMBERS = {
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "prlimit64": (302, 261),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "inotify_init1": (294, 26),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "unshare": (272, 97),
    "prctl": (157, 167),
    "seccomp": (317, 277),
}
RMID, CREAT, USER_KEYRING = 0, 0o1000, -4
LEFT = "left-by-a-worker"


def call(name: str, *arguments: int | bytes) -> int:
    """A system call as it is, past the library; OSError."""
    words = [ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word) for word in arguments]
    return _checked(LIBC.syscall(ctypes.c_long(NUMBERS[name][COLUMN]), *words))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _opened(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY))


def _segment() -> None:
    made = call("shmget", 0x5041524C, 4096, CREAT | 0o600)
    try:
        LIBC.shmdt(call("shmat", made, 0, 0))
    finally:
        call("shmctl", made, RMID, 0)


def _key() -> None:
    made = call("add_key", b"user", b"parley:left", b"secret", 6, USER_KEYRING)
    call("keyctl", 9, made, USER_KEYRING)


def _queue() -> None:
    os.close(call("mq_open", LEFT.encode(), os.O_CREAT | os.O_RDWR, 0o600, 0))
    call("mq_unlink", LEFT.encode())


def _made(make: Callable[[str], object]) -> None:
    path = f"/tmp/{LEFT}"
    make(path)
    (os.rmdir if stat.S_ISDIR(os.lstat(path).st_mode) else os.unlink)(path)


def _file(flags: int) -> Callable[[str], None]:
    def make(path: str) -> None:
        os.close(os.open(path, flags | os.O_CREAT, 0o600))

    return make


def _unnamed() -> None:
    os.close(os.open("/tmp", os.O_TMPFILE | os.O_RDWR, 0o600))


def _owner(sibling: int) -> None:
    with open("/dev/null", "rb") as file:
        _checked(LIBC.fcntl(file.fileno(), 8, ctypes.c_long(sibling)))


def _owner_extended(sibling: int) -> None:
    with open("/dev/null", "rb") as file:
        _checked(LIBC.fcntl(file.fileno(), 15, ctypes.c_char_p(struct.pack("=ii", 1, sibling))))


def _signal_of_owner() -> None:
    with open("/dev/null", "rb") as file:
        _checked(LIBC.fcntl(file.fileno(), 10, ctypes.c_long(9)))


def _owner_of_socket(sibling: int) -> None:
    # Standard input is a socket, as the control of a worker is.
    _checked(LIBC.ioctl(0, ctypes.c_ulong(0x8901), ctypes.c_char_p(struct.pack("=i", sibling))))


def _bounds_of(sibling: int) -> None:
    call("prlimit64", sibling, resource.RLIMIT_CPU, 0, bytes(16))


def _bounded(sibling: int) -> None:
    infinite = struct.pack("=QQ", 2**64 - 1, 2**64 - 1)
    call("prlimit64", sibling, resource.RLIMIT_CPU, infinite, 0)


def _file_handed_over() -> None:
    with socket.socket(fileno=os.dup(0)) as control:
        socket.send_fds(control, [b"x"], [0])


def _forked() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _memory(name: str, pid: int) -> None:
    local = ctypes.create_string_buffer(8)
    vector = struct.pack("=QQ", ctypes.addressof(local), 8)
    call(name, pid, vector, 1, vector, 1, 0)


def _executed(free: bool) -> None:
    if not free:
        os.execv("/bin/true", ["true"])


def _settle(sibling: int) -> None:
    os.sched_setaffinity(sibling, os.sched_getaffinity(sibling))


def attempts(secret: str, parent: int, sibling: int, free: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each attempt and its name."""
    yield "secret", lambda: _opened(secret)
    yield "memory of the parent", lambda: _opened(f"/proc/{parent}/mem")
    yield "memory of a sibling", lambda: _opened(f"/proc/{sibling}/mem")
    yield "read of a sibling", lambda: _memory("process_vm_readv", sibling)
    yield "write into a sibling", lambda: _memory("process_vm_writev", sibling)
    yield "ptrace", lambda: _checked(LIBC.ptrace(16, sibling, 0, 0))
    yield "pidfd", lambda: os.close(call("pidfd_open", sibling, 0))
    yield "signal to the parent", lambda: os.kill(parent, 0)
    yield "signal to a sibling", lambda: os.kill(sibling, 0)
    yield "signal to a thread of a sibling", lambda: _checked(LIBC.tgkill(sibling, sibling, 0))
    yield "signal to itself", lambda: _checked(LIBC.tgkill(os.getpid(), os.getpid(), 0))
    yield "owner", lambda: _owner(sibling)
    yield "owner, extended", lambda: _owner_extended(sibling)
    yield "owner of a socket", lambda: _owner_of_socket(sibling)
    yield "signal of an owner", _signal_of_owner
    yield "bounds of a sibling", lambda: _bounds_of(sibling)
    yield "bounds for a sibling", lambda: _bounded(sibling)
    yield "processors of a sibling", lambda: _settle(sibling)
    yield "priority of a sibling", lambda: call("setpriority", 0, sibling, 10)
    yield "priority of a sibling's input", lambda: call("ioprio_set", 1, sibling, 2 << 13 | 7)
    yield "segment", _segment
    yield "semaphores", lambda: call("semctl", call("semget", 0x5041524C, 1, CREAT | 0o600), 0, RMID, 0)
    yield "messages", lambda: call("msgctl", call("msgget", 0x5041524C, CREAT | 0o600), RMID, 0)
    yield "queue", _queue
    yield "key", _key
    yield "key of others", lambda: call("request_key", b"user", b"parley:none", 0, 0)
    yield "keyring", lambda: call("keyctl", 0, USER_KEYRING, 1)
    yield "file", lambda: _made(_file(os.O_WRONLY | os.O_EXCL))
    yield "empty file", lambda: _made(_file(os.O_RDONLY))
    yield "unnamed file", _unnamed
    yield "file emptied", lambda: os.close(os.open("/dev/null", os.O_RDONLY | os.O_TRUNC))
    yield "device written", lambda: os.close(os.open("/dev/null", os.O_WRONLY))
    yield "own file written", lambda: os.close(os.open("/proc/self/comm", os.O_RDWR))
    yield "symbolic link", lambda: _made(lambda path: os.symlink("s" * 3000, path))
    yield "link", lambda: _made(lambda path: os.link("/proc/self/fd/0", path, follow_symlinks=False))
    yield "folder", lambda: _made(os.mkdir)
    yield "pipe with a name", lambda: _made(os.mkfifo)
    yield "name changed", lambda: os.rename("/tmp/none", f"/tmp/{LEFT}")
    yield "name removed", lambda: os.unlink("/tmp/none")
    yield "times changed", lambda: os.utime("/tmp/none", (1, 1))
    yield "mode changed", lambda: os.chmod("/tmp/none", 0o600)
    yield "attribute", lambda: os.setxattr("/tmp/none", "user.left", b"x")
    yield "file in memory", lambda: os.close(call("memfd_create", LEFT.encode(), 0))
    yield "watch", lambda: os.close(call("inotify_init1", 0))
    yield "io_uring", lambda: call("io_uring_setup", 0, 0)
    yield "userfaultfd", lambda: call("userfaultfd", 1 << 31)
    yield "perf", lambda: call("perf_event_open", 0, 0, -1, -1, 0)
    yield "bpf", lambda: call("bpf", 0, 0, 0)
    yield "namespace", lambda: call("unshare", 0x10000000)
    yield "dumpable again", lambda: call("prctl", 4, 1, 0, 0, 0)
    yield "another filter", lambda: call("seccomp", 2, 0, 0)
    yield "fork", _forked
    yield "spawn", lambda: subprocess.run(["/bin/true"], check=True)
    yield "exec", lambda: _executed(free)
    yield "unix", lambda: socket.socket(socket.AF_UNIX).close()
    yield "vsock", lambda: socket.socket(socket.AF_VSOCK).close()
    yield "pair", socket.socketpair
    yield "file handed over", _file_handed_over
    yield "allocate", lambda: None if free else bytearray(1 << 33)


def outcomes(secret: str, parent: int, sibling: int, free: bool) -> dict[str, object]:
    """What became of each attempt, and what is left of the process."""
    found: dict[str, object] = {}
    for name, attempt in attempts(secret, parent, sibling, free):
        try:
            attempt()
            found[name] = "done"
        except OSError as error:
            found[name] = error.errno
        except MemoryError:
            found[name] = "memory"
    ran: list[int] = []
    thread = threading.Thread(target=ran.append, args=(1,))
    thread.start()
    thread.join()
    found["thread"] = "done" if ran else "none"
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    found["umask"] = int(status["Umask"], 8)
    found["core"] = list(resource.getrlimit(resource.RLIMIT_CORE))
    found["seen"] = sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) == [os.getpid()]
    return found


def writable() -> list[str]:
    """All files and folders that this process may write, but for those of the kernel's /proc and /sys."""
    found: list[str] = []
    for folder, folders, files in os.walk("/"):
        if folder == "/":
            folders[:] = [name for name in folders if name not in ("proc", "sys")]
        found += [path for path in (folder, *(f"{folder}/{name}" for name in files)) if os.access(path, os.W_OK)]
    return sorted(path.replace("//", "/") for path in found)


def _serve(place: str, uid: int) -> None:
    """An image's one process. The first byte of a connection is answered with what a process under the workers' uid says:
    `c` one that is confined, `f` one that is not, `w` what that could write, and `m` the kernel's settings."""
    me = [sys.executable, "-P", "-s", "-B", __file__]
    as_worker: dict[str, Any] = {"user": uid, "group": uid, "extra_groups": [], "cwd": "/"}
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((socket.VMADDR_CID_ANY, int(place.removeprefix("vsock:"))))
        listener.listen(8)
        neighbour = subprocess.Popen([*me, "sibling"], stdout=subprocess.PIPE, **as_worker)
        assert neighbour.stdout is not None
        neighbour.stdout.read(1)
        attempted = ["/dev/nsm", str(os.getpid()), str(neighbour.pid)]
        commands = {b"c": attempted, b"f": [*attempted, "free"], b"w": ["writable"]}
        while True:
            connection, _ = listener.accept()
            ours, theirs = socket.socketpair()
            with connection, ours, theirs:
                asked = connection.recv(1)
                if asked in commands:
                    done = subprocess.run(
                        [*me, *commands[asked]], stdin=theirs.fileno(), capture_output=True, check=False, **as_worker
                    )
                    connection.sendall(done.stdout or done.stderr)
                elif asked == b"m":
                    knobs = ("kernel/modules_disabled", "kernel/yama/ptrace_scope")
                    said = {name: Path("/proc/sys", name).read_text("ascii").strip() for name in knobs}
                    connection.sendall(json.dumps(said | {"sibling": neighbour.poll()}).encode())


def main() -> None:
    """What the arguments say."""
    words = sys.argv[1:]
    if "--listen" in words:
        _serve(words[words.index("--listen") + 1], int(words[words.index("--worker-uid") + 1]))
    elif words == ["sibling"]:
        confine_worker()
        os.write(1, b"x")
        time.sleep(600)
    elif words == ["writable"]:
        print(json.dumps(writable()))
    else:
        free = "free" in words
        if not free:
            confine_worker()
        print(json.dumps(outcomes(words[0], int(words[1]), int(words[2]), free)))


if __name__ == "__main__":
    main()
