"""`parley local`: a coordinator with simulated enclaves on this machine, for trying things out.

A folder holds everything: the local root and its certificate, the measurements of the installed enclave, the coordinator's
configuration, state and TLS certificate. The same folder comes up again with the same keys.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer

START_SECONDS: Final = 30
"""How long a coordinator may take to answer."""
STOP_SECONDS: Final = 15
"""How long it may take to end after SIGTERM, its grace for running calls included."""
ENCLAVES: Final = {"local": "enclaves", "qemu": "machines"}
"""Folders of the enclaves that these launchers start, where the configuration names no other."""


class StackError(Exception):
    """The local stack cannot be made, started or stopped: the message says what to look at."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A local coordinator in a folder."""

    folder: Path

    @property
    def root(self) -> Path:
        """The folder of the local root."""
        return self.folder / "root"

    @property
    def root_certificate(self) -> Path:
        """The root's certificate: what `root:` of an agreement names."""
        return self.folder / "simulated-root.pem"

    @property
    def measurements(self) -> Path:
        """The measurements of the installed enclave."""
        return self.folder / "measurements.json"

    @property
    def measured(self) -> Path:
        """What `measurements:` of an agreement names: the image that the launcher `qemu` boots, else `measurements`."""
        launcher = self._configuration.get("launcher", {})
        if launcher.get("kind") != "qemu":
            return self.measurements
        return (self.folder / str(launcher.get("qemu", {}).get("image", "parley.eif"))).resolve()

    @property
    def certificate(self) -> Path:
        """The coordinator's TLS certificate: what `--cert` of the client names."""
        return self.folder / "tls.crt"

    @property
    def address(self) -> str:
        """Where the running coordinator listens; StackError where none runs."""
        try:
            return (self.folder / "address").read_text().strip()
        except FileNotFoundError:
            raise StackError(f"{self.folder}: no coordinator runs here") from None

    @property
    def pid(self) -> int | None:
        """The coordinator's process, where it runs."""
        try:
            pid = int((self.folder / "coordinator.pid").read_text())
            os.kill(pid, 0)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return None
        return pid

    @property
    def environment(self) -> dict[str, str]:
        """What members' commands need to find the coordinator without options, once it runs."""
        return {"PARLEY_CERT": str(self.certificate), "PARLEY_COORDINATOR": self._listen}

    @property
    def _listen(self) -> str:
        """The address in the configuration."""
        return str(self._configuration["listen"])

    @property
    def _configuration(self) -> dict[str, Any]:
        path = self.folder / "coordinator.toml"
        if not path.exists():
            return {}
        try:
            return tomllib.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise StackError(f"{path}: {error}") from None

    @classmethod
    def made(cls, folder: Path, *, listen: str = "127.0.0.1:7443", workers: int | None = None) -> Stack:
        """The stack of a folder, made where it is not there: root, measurements of the installed enclave, configuration,
        TLS certificate. Nothing runs yet."""
        from parley_coordinator import config, tls
        from parley_deploy.measure import image_measurements
        from parley_deploy.pki import LocalRoot
        from parley_protocol.measurement import measurements_json

        stack = cls(folder.resolve())
        stack.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        stack.root_certificate.write_bytes(LocalRoot.load_or_create(stack.root).pem)
        stack.measurements.write_text(measurements_json(image_measurements()), "utf-8")
        file = stack.folder / config.FILE
        if not file.exists():
            text = config.TEMPLATE.format(listen=listen)
            if workers is not None:
                text = text.replace("# workers = 2 ", f"workers = {workers}   ")
            file.write_text(text, "utf-8")
        if not stack.certificate.exists():
            tls.make(stack.certificate, stack.folder / "tls.key", [], datetime.now(UTC))
        return stack

    def allow(self, public_files: Iterable[Path]) -> None:
        """Lets these members put agreements and open sessions."""
        files = [str(path) for path in public_files]
        if not files:
            return
        command = [sys.executable, "-m", "parley_coordinator", "operators", "add", "--dir", str(self.folder), *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise StackError(done.stderr.strip())

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Starts the coordinator, detached, and waits until it answers; nothing where it runs already.

        `environment`: variables that it gets beside this process's own.
        """
        if self.pid is not None:
            return
        (self.folder / "address").unlink(missing_ok=True)
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "parley_coordinator", "run", "--dir", str(self.folder)],
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _started[process.pid] = process
        (self.folder / "coordinator.pid").write_text(f"{process.pid}\n")
        end = time.monotonic() + START_SECONDS
        while not (self.folder / "address").exists():
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                _started.pop(process.pid).wait()
                (self.folder / "coordinator.pid").unlink(missing_ok=True)
                raise StackError(f"the coordinator did not start; see {self.folder / 'log'}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends the coordinator and its enclaves; nothing where they have ended."""
        pid = self.pid
        if pid is not None:
            _end(pid)
            (self.folder / "coordinator.pid").unlink(missing_ok=True)
        for name in ("nsm.pid", "enclave.pid"):
            for path in self.of_enclaves(name):
                with suppress(FileNotFoundError, ValueError):
                    _end(int(path.read_text()))

    def of_enclaves(self, name: str) -> list[Path]:
        """The files of that name of all enclaves of this stack, simulated and emulated: of both launchers, since the
        configuration may have changed, and where it says. StackError where it is no TOML."""
        launcher = self._configuration.get("launcher", {})
        folders = {
            self.folder / place
            for kind, usual in ENCLAVES.items()
            for place in (usual, launcher.get(kind, {}).get("folder", usual))
        }
        return sorted(path for folder in folders for path in folder.glob(f"*/{name}"))


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_started: Final[dict[int, subprocess.Popen[bytes]]] = {}
"""The coordinators that this process started: it must wait for them when they end."""


def _end(pid: int) -> None:
    """SIGTERM, and SIGKILL for a process that is still there after its grace."""
    child = _started.pop(pid, None)
    if child is not None:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        return
    end = time.monotonic() + STOP_SECONDS
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        while time.monotonic() < end:
            os.kill(pid, 0)
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)


DirOption = Annotated[Path, typer.Option("--dir", help="The folder of the stack.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(
    help="A coordinator with simulated enclaves on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def up(
    folder: DirOption = Path("parley-local"),
    listen: Annotated[
        str, typer.Option(help="Address and port of a new stack; port 0 takes a free one.")
    ] = "127.0.0.1:7443",
    allow: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Public key of a member that may put agreements and open sessions; repeatable.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the folder where it is not there, start the coordinator, and say what to type next."""
    with _reported():
        stack = Stack.made(folder, listen=listen)
        stack.allow(allow or [])
        stack.start()
        if as_json:
            typer.echo(json.dumps(_state(stack)))
            return
        typer.echo(f"coordinator  {stack.address}, certificate {stack.certificate}")
        typer.echo(f"root         {stack.root_certificate}   SIMULATED: no hardware protects anything here")
        typer.echo(f"measured     {stack.measured}")
        typer.echo("\nnext, as a member who was allowed with --allow:")
        typer.echo(f"  export PARLEY_COORDINATOR={stack.address} PARLEY_CERT={stack.certificate}")
        typer.echo("  parley agreement new mine            # a draft; name the root and the measurements above in it")
        typer.echo("  parley agreement put mine.yaml")


@app.command()
def down(folder: DirOption = Path("parley-local")) -> None:
    """Stop the coordinator and its enclaves. The folder stays, and comes up again with the same keys."""
    with _reported():
        Stack(folder.resolve()).stop()
    typer.echo(f"stopped      {folder}")


@app.command()
def status(folder: DirOption = Path("parley-local"), as_json: JsonOption = False) -> None:
    """Say whether the coordinator runs, and which enclaves. Exit code 4 where it does not."""
    with _reported():
        stack = Stack(folder.resolve())
        state = _state(stack)
        if as_json:
            typer.echo(json.dumps(state))
        elif state["pid"] is None:
            typer.echo(f"stopped      {folder}")
        else:
            typer.echo(f"coordinator  {state['address']}, process {state['pid']}")
            typer.echo(f"enclaves     {len(state['enclaves'])}")
        if state["pid"] is None:
            raise typer.Exit(4)


def _state(stack: Stack) -> dict[str, Any]:
    running = stack.pid is not None
    return {
        "folder": str(stack.folder),
        "pid": stack.pid,
        "address": stack.address if running else None,
        "certificate": str(stack.certificate),
        "root": str(stack.root_certificate),
        "measurements": str(stack.measured if running else stack.measurements),
        "enclaves": sorted(path.parent.name for path in stack.of_enclaves("enclave.sock")),
    }


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except StackError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(4) from None
