"""nitro-cli: its commands, its JSON and its errors, as of aws/aws-nitro-enclaves-cli 1.5.

`run-enclave` forks a process that owns the enclave and lives on. That process allocates memory and CPUs, boots the image and
waits for its heartbeat (0xB7 on vsock 3:9000, `enclave_ready` in eif_loader/src/lib.rs; 90 s for each 6 GiB of image and
90 s for each 100 GiB of memory); only then does nitro-cli print the enclave's JSON on standard output. Where any of this
fails, the process tells its reason on nitro-cli's standard error, as `[ E36 ] Enclave boot failure. ...`; nitro-cli, which
then lacks the JSON, adds `Failed connections: 1` and `[ E39 ] ...`, and ends with 39. So the first code is the reason, and
the exit code is not. The port of the heartbeat is one for all enclaves: two launches at a time disturb each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

OUTPUT_BYTES: Final = 1 << 20
"""More than nitro-cli ever says: four descriptions with metadata are some kilobytes."""
SAID_BYTES: Final = 3000
_POLL_S: Final = 0.1
_DRAIN_S: Final = 1.0
_CODE: Final = re.compile(r"\[ (E[0-9]{2}) \]")
_ID: Final = re.compile(r"[A-Za-z0-9-]{1,64}-enc[0-9a-f]{1,16}")
_FIRST_CID, _LAST_CID = 4, 0xFFFFFFFE


class Action(Enum):
    """What follows from a failed launch."""

    RETRY = "tried again"
    BUSY = "no-capacity where other enclaves run here; otherwise the operator must act"
    FINAL = "the operator must act"


@dataclass(frozen=True, slots=True)
class Row:
    """What a code of nitro-cli means for a launch, and what the operator does when it stays."""

    action: Action
    do: str


_AGAIN: Final = Row(Action.RETRY, "read nitro-cli's log in /var/log/nitro_enclaves; restart the parent if it stays")
_ALLOCATOR: Final = "and restart nitro-enclaves-allocator.service while no enclave runs"
_VERSION: Final = Row(Action.FINAL, "install nitro-cli 1.2 or newer: it does not know these arguments")
_RIGHTS: Final = Row(
    Action.FINAL,
    "let the coordinator's user read the image and, as a member of group ne, use /dev/nitro_enclaves, /run/nitro_enclaves"
    " and /var/log/nitro_enclaves; start nitro-enclaves-allocator.service",
)
_IMAGE: Final = Row(
    Action.FINAL, "check the image with `parley-coordinator doctor`; its signing certificate may be over"
)
NO_CPUS: Final = "no CPUs are available in the pool"
"""How the driver's NE_ERR_NO_CPUS_AVAIL_IN_POOL stands in the backtrace of an E29."""

ACTIONS: Final[dict[str, Row]] = {
    **dict.fromkeys(
        ("E00", "E04", "E05", "E06", "E08", "E09", "E10", "E11", "E12", "E13", "E15", "E16", "E17"), _AGAIN
    ),
    **dict.fromkeys(("E37", "E38", "E39", "E41", "E54", "E55"), _AGAIN),
    **dict.fromkeys(("E28", "E29", "E30", "E31", "E32", "E33"), _AGAIN),
    **dict.fromkeys(("E01", "E02", "E03", "E14"), _VERSION),
    **dict.fromkeys(("E07", "E18", "E19", "E56"), _RIGHTS),
    **dict.fromkeys(("E34", "E57", "E59"), _IMAGE),
    "E22": Row(Action.FINAL, f"raise cpu_count in allocator.yaml {_ALLOCATOR}, or lower launcher.nitro.cpus"),
    "E23": Row(Action.FINAL, "look at /sys/module/nitro_enclaves/parameters/ne_cpus: the pool of CPUs cannot be read"),
    "E24": Row(Action.FINAL, "look at /sys/module/nitro_enclaves/parameters/ne_cpus: the pool of CPUs cannot be read"),
    "E26": Row(Action.FINAL, "raise launcher.nitro.memory_mib to at least 4 times the size of the image"),
    "E27": Row(Action.BUSY, f"raise memory_mib in allocator.yaml {_ALLOCATOR}"),
    "E35": Row(Action.FINAL, "check the image, and the huge pages, with `parley-coordinator doctor`"),
    "E36": Row(
        Action.RETRY,
        "boot the image for a simulated agreement with launcher.nitro.debug and read `nitro-cli console`: it sent no"
        " heartbeat, or its signing certificate is over, or another program ran run-enclave at the same time",
    ),
}
"""From nitro-cli's code to what the launcher does. Codes that a launch cannot have are not here."""
UNKNOWN: Final = Row(Action.FINAL, "read what nitro-cli said: this version of Parley does not know it")
BUSY_CPUS: Final = Row(Action.BUSY, f"raise cpu_count in allocator.yaml {_ALLOCATOR}")
KILLED: Final = Row(Action.RETRY, "find out what ended nitro-cli: it was killed by a signal")
SLOW: Final = Row(
    Action.FINAL, "raise launcher.nitro.start_s or call_s, or read nitro-cli's log: it did not answer in time"
)
GARBAGE: Final = Row(Action.FINAL, "look at launcher.nitro.command: what it printed is not nitro-cli's JSON")
MISSING: Final = Row(Action.FINAL, "install nitro-cli, or name it in launcher.nitro.command")
GONE: Final = Row(Action.RETRY, "read the log of nitro-cli: the enclave ended as soon as it had booted")
DEAF: Final = Row(Action.FINAL, "look at the image: it booted, and nothing listens at launcher.nitro.port")


class NitroError(Exception):
    """A call of nitro-cli that failed: `code` (empty where it named none), the row of the table, and what it said."""

    def __init__(self, code: str, row: Row, said: str) -> None:
        super().__init__(f"{code or 'nitro-cli'}: {row.do}")
        self.code = code
        self.row = row
        # The reason comes first, and nitro-cli's own complaints follow it.
        self.said = said[:SAID_BYTES]


class ClosedError(Exception):
    """The launcher is closing: nitro-cli was ended."""


@dataclass(frozen=True, slots=True)
class Described:
    """An enclave as nitro-cli describes it. `state` is RUNNING, TERMINATING or EMPTY; `name` is None before version 1.2."""

    id: str
    name: str | None
    cid: int
    state: str
    flags: str


@dataclass(frozen=True, slots=True)
class Description:
    """The enclaves that nitro-cli listed; not `complete` where the process of one took the connection and did not answer.

    `complete` does not say that all are there. nitro-cli leaves out, without a word, an enclave whose socket in
    /run/nitro_enclaves this user may not open; and where a connection fails for another reason, it takes the socket for a
    stale one and deletes it. So it is to run as the user whose enclaves they are, which the doctor checks.
    """

    enclaves: tuple[Described, ...]
    complete: bool


class NitroCli:
    """Calls of one nitro-cli. `closing` ends the one that is under way."""

    def __init__(self, command: Sequence[str], call_s: float, closing: threading.Event) -> None:
        self._command = tuple(command)
        self._call_s = call_s
        self._closing = closing

    def run_enclave(
        self, *, image: Path, memory_mib: int, cpus: int, name: str, debug: bool, timeout_s: float
    ) -> tuple[str, int]:
        """(id, CID) of a new enclave that has sent its heartbeat; NitroError, ClosedError."""
        arguments = ["--eif-path", str(image), "--memory", str(memory_mib), "--cpu-count", str(cpus)]
        arguments += ["--enclave-name", name, *(["--debug-mode"] if debug else [])]
        found = _object(self._call("run-enclave", arguments, timeout_s, self._closing))
        return _id(found), _cid(found, _FIRST_CID)

    def describe(self) -> Description:
        """The enclaves that answer this user; NitroError."""
        # The list is printed, and then followed by E39, where a process did not answer.
        code, output, errors = self._raw("describe-enclaves", [], self._call_s)
        codes = _CODE.findall(errors)
        if code and codes[:1] != ["E39"]:
            raise _failure(code, errors)
        listed = _json(output)
        if not isinstance(listed, list):
            raise _garbage("describe-enclaves did not print a list")
        return Description(tuple(_described(item) for item in listed), complete=code == 0)

    def terminate(self, identifier: str) -> None:
        """Ends an enclave; NitroError with E11 where there is none with this id."""
        found = _object(self._call("terminate-enclave", ["--enclave-id", identifier], self._call_s))
        if found.get("Terminated") is not True or found.get("EnclaveID") != identifier:
            raise _garbage("terminate-enclave did not say that the enclave is terminated")

    def version(self) -> str:
        """What `--version` prints; NitroError."""
        return self._call("--version", [], self._call_s).strip()

    def _call(
        self, command: str, arguments: Sequence[str], timeout_s: float, closing: threading.Event | None = None
    ) -> str:
        code, output, errors = self._raw(command, arguments, timeout_s, closing)
        if code:
            raise _failure(code, errors)
        return output

    def _raw(
        self, command: str, arguments: Sequence[str], timeout_s: float, closing: threading.Event | None = None
    ) -> tuple[int, str, str]:
        # With BACKTRACE the message says what the driver refused, which a bare E29 does not.
        environment = {**os.environ, "BACKTRACE": "1", "LC_ALL": "C"}
        try:
            # A session of its own: a signal to the coordinator's terminal is none to nitro-cli.
            process = subprocess.Popen(
                [*self._command, command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise NitroError("", MISSING, f"{self._command[0]}: {error.strerror}") from error
        with process:
            try:
                output, errors = _read(process, time.monotonic() + timeout_s, closing)
            except BaseException:
                # The whole group, so that nothing of it keeps the pipes; the process of an enclave has left it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        return process.returncode, output.decode("utf-8", errors="replace"), errors.decode("utf-8", errors="replace")


def _read(process: subprocess.Popen[bytes], end: float, closing: threading.Event | None) -> tuple[bytes, bytes]:
    """Both outputs until the process has ended, within the time and the bounds; it may leave children at the pipes."""
    assert process.stdout is not None and process.stderr is not None
    data = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    drained: float | None = None
    with selectors.DefaultSelector() as selector:
        for number in data:
            selector.register(number, selectors.EVENT_READ)
        while selector.get_map() or process.poll() is None:
            for key, _ in selector.select(_POLL_S):
                part = os.read(key.fd, 1 << 16)
                data[key.fd] += part
                if not part:
                    selector.unregister(key.fd)
                if len(data[key.fd]) > OUTPUT_BYTES:
                    raise _garbage(f"more than {OUTPUT_BYTES} bytes")
            if not selector.get_map() and process.poll() is None:
                time.sleep(_POLL_S / 10)
            if process.poll() is not None:
                drained = drained or time.monotonic() + _DRAIN_S
                if time.monotonic() > drained:
                    break
            elif closing is not None and closing.is_set():
                raise ClosedError
            elif time.monotonic() > end:
                said = bytes(data[process.stderr.fileno()]).decode("utf-8", errors="replace")
                raise NitroError("", SLOW, said)
    return bytes(data[process.stdout.fileno()]), bytes(data[process.stderr.fileno()])


def _failure(code: int, errors: str) -> NitroError:
    if code < 0:
        return NitroError("", KILLED, f"killed by signal {-code}; {errors}")
    codes = _CODE.findall(errors)
    if not codes:
        # The parser of its command line, which knows no codes, ends with 2.
        return NitroError("", _VERSION if code == 2 else UNKNOWN, f"exit code {code}; {errors}")
    if codes[0] == "E29" and NO_CPUS in errors:
        return NitroError("E29", BUSY_CPUS, errors)
    return NitroError(codes[0], ACTIONS.get(codes[0], UNKNOWN), errors)


def _garbage(what: str) -> NitroError:
    return NitroError("", GARBAGE, what)


def _json(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise _garbage(f"no JSON: {text[:200]!r}") from error


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name twice")
    return made


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _object(text: str) -> dict[str, Any]:
    value = _json(text)
    if not isinstance(value, dict):
        raise _garbage("not an object")
    return value


def _id(found: dict[str, Any]) -> str:
    value = found.get("EnclaveID")
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise _garbage("EnclaveID is no id of an enclave")
    return value


def _cid(found: dict[str, Any], least: int) -> int:
    value = found.get("EnclaveCID")
    if type(value) is not int or not least <= value <= _LAST_CID:
        raise _garbage("EnclaveCID is no CID of an enclave")
    return value


def _described(item: object) -> Described:
    if not isinstance(item, dict):
        raise _garbage("describe-enclaves listed what is no enclave")
    name, state, flags = item.get("EnclaveName"), item.get("State"), item.get("Flags")
    if not (name is None or isinstance(name, str)) or not isinstance(state, str) or not isinstance(flags, str):
        raise _garbage("describe-enclaves listed an enclave without EnclaveName, State or Flags")
    # One that is being terminated has CID 0.
    return Described(_id(item), name, _cid(item, 0), state, flags)
