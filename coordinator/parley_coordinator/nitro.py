"""The launcher `nitro`: enclaves on this parent instance, by nitro-cli.

A launch has three gates, each of which says what is wrong: the image is one that the agreement accepts; nitro-cli reports the
enclave, which it does after its heartbeat; its vsock port takes a connection. Each enclave has a file in the launcher's folder
from before nitro-cli is called until it has ended, and a name that no other has. So a coordinator that was killed at any
point finds its enclaves again, and none is ever ended that was not started from this folder.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from parley_coordinator import log, relay
from parley_coordinator.clock import Clock
from parley_coordinator.config import Nitro
from parley_coordinator.images import Images, Wanted
from parley_coordinator.launcher import LOCK_S, RETRY_MS, EnclaveHandle, no_capacity, writing
from parley_coordinator.nitro_cli import (
    DEAF,
    GONE,
    Action,
    ClosedError,
    Described,
    Description,
    NitroCli,
    NitroError,
)
from parley_coordinator.node import exclusive
from parley_protocol.errors import RefusedError, UnavailableError

Address = Callable[[int, int], str]
"""From an enclave's CID and port to the address at which `relay.connect` finds it."""

RUNNING: Final = "RUNNING"
PROBE_S: Final = 2.0
"""How long one attempt to connect to a new enclave may take."""
PROBE_PAUSE_S: Final = 0.2
ALIVE_S: Final = 2.0
"""How often nitro-cli is asked whether an enclave is still there whose port is awaited."""
UNSURE: Final = ("", "E38", "E39", "E41")
"""Codes after which an enclave may run: nitro-cli was ended, or did not understand what the enclave's process said."""
LOST_MS: Final = 15 * 60_000
"""How long a launch that was given up may still bring an enclave: longer than nitro-cli waits for a heartbeat."""
LOOK_FILE: Final = "look"
"""In the folder, locked while a coordinator compares entries with what nitro-cli lists: unlike `lock` never for a boot."""
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,31}-[0-9a-f]{8}-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept of an enclave: its agreement, when it was begun, and what nitro-cli said of it, once it did.

    An entry that is `doomed` belongs to a launch that failed: if its enclave is found, it is ended.
    """

    agreement: str
    begun_ms: int
    id: str = ""
    cid: int = 0
    doomed: bool = False


class NitroLauncher:
    """Enclaves of one image; `most` may run at a time."""

    def __init__(
        self, config: Nitro, most: int, clock: Clock, address: Address = lambda cid, port: f"vsock:{cid}:{port}"
    ) -> None:
        self._config = config
        self._most = most
        self._clock = clock
        self._address = address
        self._closing = threading.Event()
        self._cli = NitroCli(config.command, config.call_s, self._closing)
        self._images = Images(clock)
        self._entries = _Entries(config.folder)
        # Held while entries and what nitro-cli lists are compared; never while an enclave boots.
        self._lock = threading.RLock()
        # Held while an enclave boots, as is the folder's lock: the port of the heartbeat is one for all.
        self._boot = threading.Lock()
        self._booting = ""

    def launch(self, wanted: Wanted) -> EnclaveHandle:
        if self._config.debug and not wanted.simulated:
            log.warning("debug-refused", agreement=log.short(wanted.digest))
            raise RefusedError(
                "attestation", "this coordinator starts its enclaves in debug mode, which proves nothing to members"
            )
        self._images.check(self._config.image, "launcher.nitro.image", wanted)
        with self._boot, exclusive(self._config.folder, self._config.attempts * self._config.start_s):
            if not self.room():
                raise no_capacity(self._most)
            for left in reversed(range(self._config.attempts)):
                if self._closing.is_set():
                    break
                name = f"{self._config.name}-{wanted.digest.hex()[:8]}-{secrets.token_hex(8)}"
                try:
                    return self._attempt(name, wanted)
                except NitroError as error:
                    log.warning(
                        "launch-failed", enclave=name, code=error.code, said=error.said, then=error.row.action.name
                    )
                    self._judge(error, left)
                except ClosedError:
                    break
                self._closing.wait(self._config.pause_s)
        raise UnavailableError("the coordinator is stopping")

    def find(self) -> list[EnclaveHandle]:
        with self._looking():
            entries = self._entries.all()
            if not entries:
                return []
            try:
                description = self._cli.describe()
            except NitroError as error:
                self._needs_operator("describe-failed", error)
                raise UnavailableError("nitro-cli does not tell which enclaves run", retry_after_ms=RETRY_MS) from error
            found = [self._found(name, entry, description) for name, entry in entries.items()]
            return [handle for handle in found if handle is not None]

    def room(self) -> bool:
        return len(self._taken()) < self._most

    def alive(self, handle: EnclaveHandle) -> bool:
        entry = self._entries.get(handle.id)
        if entry is None:
            return False
        try:
            description = self._cli.describe()
        except NitroError as error:
            log.warning("describe-failed", code=error.code, said=error.said)
            return True
        there = _of(handle.id, entry, description)
        return there.state == RUNNING if there is not None else not description.complete

    def stop(self, handle: EnclaveHandle, unless: Callable[[], bool] = lambda: False) -> None:
        with self._looking():
            entry = self._entries.get(handle.id)
            if entry is not None and not unless():
                self._end(handle.id, entry)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """In this process and among coordinators that share the folder."""
        with self._lock, exclusive(self._config.folder, LOCK_S, LOOK_FILE):
            yield

    def close(self) -> None:
        """Gives up the launch that is under way; its enclave, if it still comes, is ended by the next coordinator."""
        self._closing.set()

    def _attempt(self, name: str, wanted: Wanted) -> EnclaveHandle:
        end = time.monotonic() + self._config.start_s
        entry = Entry(wanted.digest.hex(), self._clock())
        with self._lock:
            self._entries.put(name, entry)
            self._booting = name
        try:
            identifier, cid = self._cli.run_enclave(
                image=self._config.image,
                memory_mib=self._config.memory_mib,
                cpus=self._config.cpus,
                name=name,
                debug=self._config.debug,
                timeout_s=self._config.start_s,
            )
            entry = replace(entry, id=identifier, cid=cid)
            with self._lock:
                self._entries.put(name, entry)
            handle = self._handle(name, entry)
            self._await_port(handle, end)
        except NitroError as error:
            with self._lock:
                if error.code not in UNSURE:
                    self._entries.drop(name)
                else:
                    self._end(name, replace(entry, doomed=True))
            raise
        except BaseException:
            with self._lock:
                self._doom(name, entry)
                self._end(name, replace(entry, doomed=True))
            raise
        finally:
            with self._lock:
                self._booting = ""
        log.info("launched", enclave=name, cid=cid)
        return handle

    def _await_port(self, handle: EnclaveHandle, end: float) -> None:
        """Waits until the enclave takes a connection; NitroError where it ends before, or time does."""
        look = time.monotonic()
        while True:
            try:
                relay.connect(handle.address, PROBE_S).close()
            except UnavailableError as error:
                if time.monotonic() >= look:
                    if not self.alive(handle):
                        raise NitroError("", GONE, "the enclave ended after its heartbeat") from error
                    look = time.monotonic() + ALIVE_S
                if time.monotonic() > end:
                    raise NitroError("", DEAF, error.message) from error
            else:
                return
            if self._closing.wait(PROBE_PAUSE_S):
                raise ClosedError

    def _judge(self, error: NitroError, left: int) -> None:
        """Returns where the launch is to be tried again; else raises what the caller is told."""
        action = error.row.action
        if action is Action.BUSY and self._others_run():
            raise UnavailableError(
                "the memory or the CPUs for enclaves on this machine are in use",
                code="no-capacity",
                retry_after_ms=RETRY_MS,
            ) from error
        if action is Action.RETRY and left:
            return
        self._needs_operator("launch-given-up", error)
        code = f" (nitro-cli {error.code})" if error.code else ""
        raise UnavailableError(f"the enclave did not start{code}", retry_after_ms=RETRY_MS) from error

    def _needs_operator(self, event: str, error: NitroError) -> None:
        log.warning(event, code=error.code, do=error.row.do, said=error.said)

    def _others_run(self) -> bool:
        try:
            return bool(self._cli.describe().enclaves)
        except NitroError as error:
            log.warning("describe-failed", code=error.code, said=error.said)
            return False

    def _taken(self) -> list[str]:
        """Names of the enclaves that run or may run, those that could not be ended included."""
        self.find()
        return [name for name, entry in self._entries.all().items() if entry.id]

    def _found(self, name: str, entry: Entry, description: Description) -> EnclaveHandle | None:
        """The enclave of an entry, where it lives; what has ended is forgotten, what should have is ended."""
        if name == self._booting:
            return None
        there = _of(name, entry, description)
        if there is None:
            if entry.id and not description.complete:
                # Its process may be the one that did not answer.
                return None if entry.doomed else self._handle(name, entry)
            if entry.id or self._clock() - entry.begun_ms > LOST_MS:
                log.info("enclave-ended", enclave=name)
                self._entries.drop(name)
            return None
        if entry.doomed:
            self._end(name, entry, description)
            return None
        if there.state != RUNNING:
            return None
        if not entry.id:
            # The coordinator was killed between nitro-cli's answer and the note of it.
            log.info("enclave-adopted", enclave=name)
            entry = replace(entry, id=there.id, cid=there.cid)
            self._entries.put(name, entry)
        return self._handle(name, entry)

    def _end(self, name: str, entry: Entry, description: Description | None = None) -> None:
        """Terminates the enclave of an entry. The entry goes when the enclave has; else it is doomed and tried again."""
        try:
            description = description or self._cli.describe()
            there = _of(name, entry, description)
            if there is not None:
                entry = replace(entry, id=there.id, cid=entry.cid or there.cid)
                self._cli.terminate(there.id)
            elif not description.complete or not entry.id:
                # It may be there and not listed now, or come yet.
                self._doom(name, entry)
                return
        except NitroError as error:
            log.warning("terminate-failed", enclave=name, code=error.code, said=error.said)
            self._doom(name, entry)
            return
        self._entries.drop(name)

    def _doom(self, name: str, entry: Entry) -> None:
        try:
            self._entries.put(name, replace(entry, doomed=True))
        except UnavailableError as error:
            # Without the note it is an enclave of no session, and ended as such.
            log.warning("doom-not-noted", enclave=name, code=error.code)

    def _handle(self, name: str, entry: Entry) -> EnclaveHandle:
        return EnclaveHandle(name, bytes.fromhex(entry.agreement), self._address(entry.cid, self._config.port))


def _of(name: str, entry: Entry, description: Description) -> Described | None:
    """The enclave of an entry in a list: by the id that nitro-cli told, or by its name as long as it has told none."""
    listed = description.enclaves
    if entry.id:
        return next((enclave for enclave in listed if enclave.id == entry.id), None)
    return next((enclave for enclave in listed if enclave.name == name), None)


class _Entries:
    """The folder: `NAME.json` for each enclave. Written as a whole or not at all; what is no entry is left alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, name: str, entry: Entry) -> None:
        """UnavailableError where the disk does not take it."""
        part = self._folder / f"{name}.part"
        with writing():
            with part.open("w", encoding="utf-8") as file:
                json.dump(asdict(entry), file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self._folder / f"{name}.json")

    def drop(self, name: str) -> None:
        (self._folder / f"{name}.json").unlink(missing_ok=True)

    def get(self, name: str) -> Entry | None:
        return self.all().get(name)

    def all(self) -> dict[str, Entry]:
        return entries(self._folder)


def entries(folder: Path) -> dict[str, Entry]:
    """The entries of a launcher's folder by the names of their enclaves."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            entry = Entry(**json.loads(path.read_text(encoding="utf-8")))
            bytes.fromhex(entry.agreement)
        except (OSError, ValueError, TypeError) as error:
            log.warning("launcher-file-unknown", file=path.name, error=type(error).__name__)
            continue
        if _NAME.fullmatch(path.stem):
            found[path.stem] = entry
    return found
