"""`parley-coordinator`: init, run, migrate, operators, digest, doctor, restore-record."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import select

from parley_coordinator import config as configuration
from parley_coordinator import doctor, log, server, tls
from parley_coordinator.clock import now_ms
from parley_coordinator.config import Config, ConfigError
from parley_coordinator.doctor_system import System, Verdict
from parley_coordinator.models import Operator
from parley_coordinator.store import Store
from parley_protocol import limits
from parley_protocol.errors import MalformedError, ParleyError
from parley_protocol.identity import PublicIdentity, load_public


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Exit code 0; 1 where `doctor` finds what does not work; 2 for a wrong command line or configuration, with a line that names the field."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ConfigError, ParleyError, OSError) as error:
        sys.stderr.write(f"parley-coordinator: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="parley-coordinator", description="The relay of Parley: it decides nothing.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    make = commands.add_parser("init", help="write a configuration and a self-made TLS certificate")
    make.add_argument("--dir", type=Path, default=Path(), help="folder to write them to (default: here)")
    make.add_argument("--listen", default="127.0.0.1:7443", help="address:port that stands in the configuration")
    make.add_argument("--name", action="append", default=[], help="host name or address in the certificate; repeatable")
    make.set_defaults(run=_init)
    run = commands.add_parser("run", help="run until SIGTERM")
    _place(run)
    run.add_argument("--listen", help="address:port instead of the configured one")
    run.set_defaults(run=_run)
    migrate = commands.add_parser("migrate", help="bring the database's tables up to date, or make them")
    _place(migrate)
    migrate.set_defaults(run=_migrate)
    operators = commands.add_parser("operators", help="keys that may put agreements and open sessions")
    actions = operators.add_subparsers(required=True, metavar="ACTION")
    for name, action, text in (("add", _add, "list keys"), ("remove", _remove, "list them no longer")):
        command = actions.add_parser(name, help=text)
        command.add_argument("pubfile", type=Path, nargs="+", help="public key file of `parley keygen`")
        _place(command)
        command.set_defaults(run=action)
    listing = actions.add_parser("list", help="print the listed keys")
    _place(listing)
    listing.set_defaults(run=_list)
    digest = commands.add_parser("digest", help="print the SHA-384 of the TLS key, which callers are bound to")
    _place(digest)
    digest.set_defaults(run=_digest)
    check = commands.add_parser("doctor", help="look at host, image, storage and keys, and say what to do")
    _place(check)
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(run=_doctor)
    back = commands.add_parser(
        "restore-record", help="take releases that a restored database lacks back from bundles that somebody has kept"
    )
    back.add_argument("bundle", type=Path, nargs="+", help="file that `parley fetch` wrote")
    back.add_argument(
        "--replace-outputs",
        action="store_true",
        help="store the sealed outputs of the bundles also where there are some: for those that their recipients cannot open",
    )
    _place(back)
    back.set_defaults(run=_restore_record)
    return parser


def _place(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--config", type=Path, help=f"configuration file (default: {configuration.FILE} in --dir)")
    where.add_argument("--dir", type=Path, default=Path(), help="folder of the coordinator (default: here)")


def _config(options: argparse.Namespace) -> Config:
    path = options.config if options.config is not None else options.dir / configuration.FILE
    if not path.exists():
        raise ConfigError(f"{path}: no such file; `parley-coordinator init` makes one")
    return configuration.load(path)


def _init(options: argparse.Namespace) -> int:
    folder: Path = options.dir
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / configuration.FILE
    if path.exists():
        raise ConfigError(f"{path}: is there already")
    config = configuration.defaults(folder)
    tls.make(config.certificate, config.key, options.name, datetime.now(UTC))
    path.write_text(configuration.TEMPLATE.format(listen=options.listen), encoding="utf-8")
    _print(f"{path}  edit it, then: parley-coordinator run --dir {folder}")
    _print(f"{config.certificate}  give it to the members")
    return 0


def _run(options: argparse.Namespace) -> int:
    config = _config(options)
    if options.listen is not None:
        config = replace(config, listen=options.listen)
    log.setup(config.log_level)
    asyncio.run(server.serve(config))
    return 0


def _migrate(options: argparse.Namespace) -> int:
    from parley_coordinator import migrations

    before, now = migrations.migrate(_config(options).database)
    _print(f"{before or 'empty'} -> {now}" if before != now else f"{now}: nothing to do")
    return 0


def _add(options: argparse.Namespace) -> int:
    store = Store(_config(options).database)
    for path, member in _members(options):
        with store.write() as session:
            if session.get(Operator, member.signing) is None:
                session.add(Operator(key=member.signing, label=path.stem, added_ms=now_ms()))
        _print(f"{member.fingerprint}  {path.stem}  listed")
    store.close()
    return 0


def _remove(options: argparse.Namespace) -> int:
    store = Store(_config(options).database)
    for path, member in _members(options):
        with store.write() as session:
            row = session.get(Operator, member.signing)
            if row is not None:
                session.delete(row)
        _print(f"{member.fingerprint}  {path.stem}  {'was not listed' if row is None else 'removed'}")
    store.close()
    return 0


def _list(options: argparse.Namespace) -> int:
    store = Store(_config(options).database)
    with store.read() as session:
        rows = list(session.scalars(select(Operator).order_by(Operator.added_ms)))
    store.close()
    for row in rows:
        _print(f"{row.key.hex()}  {row.label}")
    return 0


def _digest(options: argparse.Namespace) -> int:
    _print(tls.server_digest(_config(options).certificate.read_bytes()).hex())
    return 0


def _doctor(options: argparse.Namespace) -> int:
    checks = doctor.examine(_config(options), System())
    _print(doctor.report(checks, as_json=options.json))
    return int(any(check.verdict is Verdict.FAIL for check in checks))


def _restore_record(options: argparse.Namespace) -> int:
    from parley_coordinator import recovery

    config = _config(options)
    data = [_bundle(path) for path in options.bundle]
    store, blobs = Store(config.database), server.blobs_of(config)
    try:
        found = recovery.restore(store, blobs, now_ms, data, replace_outputs=options.replace_outputs)
    finally:
        store.close()
        blobs.close()
    for item in found:
        said = "restored" if item.new else "was here"
        if item.new != item.outputs:
            said += ", its outputs stored" if item.outputs else ", its outputs were here"
        _print(f"{item.session.hex()}  record {item.sequence} of series {item.series.hex()[:16]}  {said}")
    return 0


def _bundle(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(limits.BUNDLE_BYTES + 1)
    if len(data) > limits.BUNDLE_BYTES:
        raise MalformedError(f"{path}: more than {limits.BUNDLE_BYTES} bytes, no bundle")
    return data


def _members(options: argparse.Namespace) -> list[tuple[Path, PublicIdentity]]:
    return [(path, load_public(path.read_bytes())) for path in options.pubfile]


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
