"""The command line of the emulated KMS."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from parley_deploy.kms import process, server
from parley_deploy.kms.accounts import Accounts
from parley_deploy.kms.envelope import FORMS
from parley_deploy.kms.process import StartError
from parley_deploy.kms.service import Service, Settings
from parley_deploy.kms.tokens import TokenService
from parley_deploy.pki import LocalRoot
from parley_protocol.errors import ParleyError


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the emulator: prints its URL and returns 0 when it answers, 1 with a line on standard error otherwise."""
    options = _parser().parse_args(arguments)
    passed = ["--listen", options.listen, "--form", options.form, "--clock-ahead", str(options.clock_ahead)]
    try:
        if not options.foreground and not options.behind:
            print(process.start(options.dir, options.root, *passed))
            return 0
        # Held by the process that stays: a lock survives a fork.
        with process.hold(options.dir):
            if options.behind:
                if os.fork():
                    return 0
                os.setsid()
            return _serve(options)
    except (StartError, ParleyError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1


def _serve(options: argparse.Namespace) -> int:
    settings = Settings(
        root_sha256=LocalRoot.load(options.root).sha256,
        now_ms=lambda: time.time_ns() // 1_000_000 + options.clock_ahead * 1000,
        forms=FORMS if options.form == "both" else (options.form,),
    )
    service = Service(options.dir, settings)
    return server.run(options.dir, options.listen, service, TokenService(Accounts(options.dir), settings.now_ms))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m parley_deploy.kms", description="Start an emulated KMS.")
    parser.add_argument("--dir", type=Path, required=True, help="where its state stands")
    parser.add_argument("--root", type=Path, required=True, help="folder of the local root of attestation documents")
    parser.add_argument("--listen", default="127.0.0.1:0", help="HOST:PORT; port 0: the one of before, or any")
    parser.add_argument("--foreground", action="store_true", help="serve in this process")
    parser.add_argument("--behind", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--form", choices=[*FORMS, "both"], default="both", help="of the encrypted content; both: in turn"
    )
    parser.add_argument("--clock-ahead", type=int, default=0, help="seconds that its clock is ahead of this machine's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
