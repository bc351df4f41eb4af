"""The command line in tests: how it is called, and an agreement's files for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from parley_deploy.demo import DEMOS, agreement_members, agreement_text
from parley_deploy.pki import LocalRoot
from parley_protocol.identity import PrivateIdentity, dump_public

Result = tuple[int, str, str]
"""Exit code, standard output, standard error."""
Parley = Callable[..., Result]


def agreement_folder(folder: Path, name: str = "pay") -> Path:
    """The files of a demo's agreement with fresh keys, a fresh root and made-up measurements."""
    demo = DEMOS[name]
    (folder / "keys").mkdir(parents=True)
    for member in agreement_members(demo):
        (folder / "keys" / f"{member}.pub").write_bytes(dump_public(PrivateIdentity.generate(os.urandom).public))
    (folder / "simulated-root.pem").write_bytes(LocalRoot.create(1_790_000_000_000).pem)
    registers = {f"PCR{index}": bytes([index + 1]).hex() * 48 for index in range(3)}
    (folder / "measurements.json").write_text(json.dumps({"Measurements": registers}))
    (folder / demo.file).write_text(agreement_text(demo))
    return folder / demo.file
