"""The KMS demo with real processes: a party that is away, one that revokes, and the figures of pandas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parley_protocol.agreement.model import Consent
from support import oracle, played
from support.oracle import Rule

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_a_party_is_away_and_another_revokes(tmp_path: Path) -> None:
    done, lines = played.run("kms", tmp_path / "demo", None)
    bundle = played.opened(done)
    expected = oracle.pay(played.party_files(done, "kms"), [Rule(5, 3, 1), Rule(6, 3, 1)])
    assert played.compare(bundle.tables["salary"], expected) > 0
    assert bundle.simulated and not bundle.countersigned
    assert bundle.agreement.session.consent is Consent.STANDING and set(bundle.agreement.kms) == {"mich", "wisc"}
    text = "\n".join(lines)
    away = text.index("mich goes: no process of it runs")
    assert away < text.index("illinois$ parley start") < text.index("released; mich comes back")
    # The second session: mich is in without a process, wisc is not, and the reason stands there.
    second = text[text.index("wisc$ parley kms revoke") :].splitlines()
    assert "  mich      joined" in second and "  wisc      refused (revoked)" in second
    assert "fewer parties than the agreement asks for" in second
    log = (done.folder / "aws" / "log").read_text()
    assert log.count("Decrypt ok") == 3, "two parties in the first session, one in the second"
    assert "Decrypt AccessDeniedException" in log
    keys = json.loads((done.folder / "aws" / "keys.json").read_text())
    enclaves = {key["account"]: "RecipientAttestation" in key["policy"] for key in keys}
    assert enclaves == {"222222222222": True, "333333333333": False}
