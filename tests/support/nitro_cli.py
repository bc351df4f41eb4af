"""A stand-in for nitro-cli: its commands, JSON, error texts and exit codes (version 1.5), over a host that is played.

    python nitro_cli.py --host DIR run-enclave|describe-enclaves|terminate-enclave ...

DIR/host.json plays the parent: `memory_mib` and `cpus` of the allocator, and `enclave`, which says what boots: `listener` (a
socket that takes connections), `simulated` (`python -m parley_deploy.enclave` with the `arguments`), `deaf` (a process that does not
listen) or `dies` (no heartbeat). `next` is a list of what the next calls of run-enclave do in place of this. An enclave with
CID n stands in DIR/n, where enclave.sock is its vsock port. Like the real one's, its process lives on detached, and when it
ends the enclave is no longer listed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

NAMES = {
    "E07": "Read from disk failure. Such error appears when the Nitro CLI process fails to read the content of the enclave "
    "sockets directory (usually '/run/nitro_enclaves/').",
    "E11": "Socket error. This is used as an error for catching any other socket operation errors not covered by previous "
    "custom errors.",
    "E19": "File operation failure. Such error appears when the system fails to perform the requested file operations.",
    "E22": "Insufficient CPUs available in the pool. User provided `cpu-count` is more than the configured CPU pool size.",
    "E26": "Insufficient memory requested. User provided `memory` is too little, based on the EIF file size.",
    "E27": "Insufficient memory available. User provided `memory` is more than the available hugepage memory.",
    "E29": "Ioctl failure. Such error is used as a general ioctl error and appears whenever an ioctl fails.",
    "E36": "Enclave boot failure. Such error appears when attempting to receive the `ready` signal from a freshly booted "
    "enclave.",
    "E38": "Enclave process command not executed error.",
    "E39": "Enclave process connection failure. Such error appears when the enclave manager fails to connect to at least one "
    "enclave process for retrieving the description information.",
    "E59": "EIF signature checker error. Such error appears when validation of the signing certificate fails.",
}
EIF_RATIO = 4


def main() -> None:
    """One call."""
    parser = argparse.ArgumentParser(prog="nitro-cli")
    parser.add_argument("--host", type=Path, required=True)
    parser.add_argument("--version", action="version", version="Nitro CLI 1.5.0")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run-enclave")
    run.add_argument("--eif-path", required=True)
    run.add_argument("--memory", type=int, required=True)
    run.add_argument("--cpu-count", type=int, required=True)
    run.add_argument("--enclave-name", required=True)
    run.add_argument("--debug-mode", action="store_true")
    commands.add_parser("describe-enclaves")
    commands.add_parser("terminate-enclave").add_argument("--enclave-id", required=True)
    options = parser.parse_args()
    host = Host(options.host)
    with (host.folder / "calls").open("a") as calls:
        calls.write(json.dumps({**vars(options), "host": "", "at": time.time()}) + "\n")
    if options.command == "run-enclave":
        host.run(options)
    elif options.command == "describe-enclaves":
        host.describe()
    else:
        host.terminate(options.enclave_id)


class Host:
    """The parent that is played."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.played: dict[str, Any] = json.loads((folder / "host.json").read_text())

    def enclaves(self) -> list[dict[str, Any]]:
        """What runs, oldest first. The entry of a process that has ended goes, as its socket does."""
        found = []
        for path in sorted(self.folder.glob("*/described.json"), key=lambda path: int(path.parent.name)):
            described = json.loads(path.read_text())
            if alive(described["ProcessID"]):
                found.append(described)
            else:
                path.unlink()
        return found

    def run(self, options: argparse.Namespace) -> None:
        """run-enclave."""
        script = self.played.get("next") or []
        step = script[0] if script else self.played["enclave"]
        self.played["next"] = script[1:]
        (self.folder / "host.json").write_text(json.dumps(self.played))
        if step == "garbage":
            print("Segmentation fault (core dumped)")
            return
        if step == "endless":
            while True:
                sys.stdout.write("x" * 65536)
        if step == "hang":
            hang()
        if step == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == "usage":
            print("error: unexpected argument '--enclave-name' found", file=sys.stderr)
            sys.exit(2)
        if step == "E39":
            # Its process ended without a word.
            print("Failed connections: 1", file=sys.stderr)
            self.fail("E39")
        if step == "no-cpus":
            self.refuse("E29", "The enclave cannot be created because no CPUs are available in the pool")
        if step.startswith("E"):
            self.refuse(step)
        used = self.enclaves()
        size = os.stat(options.eif_path).st_size
        if options.cpu_count > self.played["cpus"]:
            self.refuse("E22")
        if EIF_RATIO * size > options.memory << 20:
            self.refuse("E26")
        if options.cpu_count > self.played["cpus"] - sum(one["NumberOfCPUs"] for one in used):
            self.refuse("E29", "The enclave cannot be created because no CPUs are available in the pool")
        print("Start allocating memory...", file=sys.stderr)
        if options.memory > self.played["memory_mib"] - sum(one["MemoryMiB"] for one in used):
            self.refuse("E27")
        if step == "renamed":
            # What it does where an enclave has this name.
            options.enclave_name += "_1"
        self.boot(options, "listener" if step in ("renamed", "late") else step, step)

    def boot(self, options: argparse.Namespace, kind: str, step: str) -> None:
        """Starts what is in the image, and describes it."""
        cid = max([15, *(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())]) + 1
        place = self.folder / str(cid)
        place.mkdir()
        cpus = list(range(1, options.cpu_count + 1))
        print(
            f"Started enclave with enclave-cid: {cid}, memory: {options.memory} MiB, cpu-ids: {cpus}", file=sys.stderr
        )
        if kind == "dies":
            print("Waiting on enclave to boot failed with error VsockTimeoutError", file=sys.stderr)
            self.refuse("E36")
        told = {
            "EnclaveName": options.enclave_name,
            "EnclaveID": f"i-0123456789abcdef0-enc{os.urandom(8).hex()}",
            "ProcessID": self.process(place, kind),
            "EnclaveCID": cid,
            "NumberOfCPUs": len(cpus),
            "CPUIDs": cpus,
            "MemoryMiB": options.memory,
        }
        described = {
            **told,
            "State": "RUNNING",
            "Flags": "DEBUG_MODE" if options.debug_mode else "NONE",
            "Measurements": {
                "HashAlgorithm": "Sha384 { ... }",
                "PCR0": "00" * 48,
                "PCR1": "00" * 48,
                "PCR2": "00" * 48,
            },
        }
        (place / "described.json").write_text(json.dumps(described))
        if step == "late":
            # The enclave is there, and nitro-cli does not come back.
            hang()
        print(json.dumps(told, indent=2))

    def process(self, place: Path, kind: str) -> int:
        """A detached process that is the enclave; its number."""
        if kind == "simulated":
            command = [sys.executable, "-m", "parley_deploy.enclave", "--dir", str(place), *self.played["arguments"]]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            return int((place / "nsm.pid").read_text())
        ready, tell = os.pipe()
        if (pid := os.fork()) == 0:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(null, number)
            if kind == "listener":
                listener = socket.socket(socket.AF_UNIX)
                listener.bind(str(place / "enclave.sock"))
                listener.listen(8)
            os.write(tell, b"r")
            if kind == "brief":
                os._exit(0)
            time.sleep(600)
            os._exit(0)
        os.read(ready, 1)
        return pid

    def describe(self) -> None:
        """describe-enclaves."""
        mode = self.played.get("describe", "")
        if mode.startswith("E"):
            self.fail(mode)
        if mode == "garbage":
            print("[{]")
            return
        if mode == "partial":
            print("Failed connections: 1", file=sys.stderr)
            print(json.dumps([], indent=2))
            self.fail("E39")
        print(json.dumps(self.enclaves(), indent=2))

    def terminate(self, identifier: str) -> None:
        """terminate-enclave."""
        found = next((one for one in self.enclaves() if one["EnclaveID"] == identifier), None)
        if found is None:
            self.fail("E11")
        if self.played.get("terminate") == "E39":
            print("Failed connections: 1", file=sys.stderr)
            self.fail("E39")
        os.kill(found["ProcessID"], signal.SIGTERM)
        end = time.monotonic() + 10
        while alive(found["ProcessID"]) and time.monotonic() < end:
            time.sleep(0.01)
        print(f"Successfully terminated enclave {identifier}.", file=sys.stderr)
        told = {"EnclaveName": found["EnclaveName"], "EnclaveID": identifier, "Terminated": True}
        print(json.dumps(told, indent=2))

    def refuse(self, code: str, reason: str = "") -> NoReturn:
        """The reason of the enclave's process, and then nitro-cli's own, which lacks the process's JSON."""
        say(code, reason)
        print("Failed connections: 1", file=sys.stderr)
        self.fail("E39")

    def fail(self, code: str) -> NoReturn:
        """nitro-cli's own error; its exit code is the number of the error."""
        say(code)
        sys.exit(int(code[1:]))


def say(code: str, reason: str = "") -> None:
    """An error as nitro-cli prints it, the backtrace only where it is asked for."""
    lines = [f"[ {code} ] {NAMES.get(code, 'Something else.')}", ""]
    lines += [f"For more details, please visit https://docs.aws.amazon.com/enclaves/latest/user/cli-errors.html#{code}"]
    if os.environ.get("BACKTRACE") == "1":
        lines += ["", "Backtrace:", "  Action: Run Enclave", "  Subactions:", "    Failed to execute command `Run`"]
        lines += [f"    {reason or 'something failed'}", "  Root error file: src/x.rs", "  Root error line: 1"]
        lines += ["  Version: 1.5.0"]
    lines += [
        "",
        'If you open a support ticket, please provide the error log found at "/var/log/nitro_enclaves/err.log"',
    ]
    print("\n".join(lines), file=sys.stderr)


def hang() -> None:
    """Does not come back, as long as somebody waits."""
    caller = os.getppid()
    while os.getppid() == caller:
        time.sleep(0.1)
    sys.exit(1)


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] not in ("Z", "X")


if __name__ == "__main__":
    main()
