"""Caller statements: bound to this server's TLS key and to a few minutes."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from parley_coordinator import tls
from parley_coordinator.callers import METADATA_KEY, Callers
from parley_coordinator.config import ConfigError
from parley_protocol import limits
from parley_protocol.errors import MalformedError, VerificationError
from parley_protocol.identity import PrivateIdentity
from parley_protocol.transcript import Caller

NOW = 1_800_000_000_000
SERVER = b"s" * 48
ME = PrivateIdentity.generate(os.urandom)


def metadata(signer: PrivateIdentity = ME, **wrong: Any) -> tuple[tuple[str, bytes], ...]:
    fields: dict[str, Any] = {"member_key": ME.public.signing, "server": SERVER, "expires_at": NOW + 60_000} | wrong
    return ((METADATA_KEY, signer.sign(Caller(**fields).to_bytes())),)


def test_a_good_statement_names_the_key() -> None:
    assert Callers(SERVER).key((("user-agent", "x"), *metadata()), now_ms=NOW) == ME.public.signing


@pytest.mark.parametrize("count", [0, 2])
def test_crd_1_exactly_one_statement(count: int) -> None:
    with pytest.raises(VerificationError) as caught:
        Callers(SERVER).key(metadata() * count, now_ms=NOW)
    assert (caught.value.step, caught.value.code) == ("crd-1", "signature")


@pytest.mark.parametrize("value", [b"", b"x", bytes(limits.CALLER_BYTES + 1), "text"])
def test_crd_1_bytes_that_are_no_statement(value: bytes | str) -> None:
    with pytest.raises(MalformedError):
        Callers(SERVER).key([(METADATA_KEY, value)], now_ms=NOW)


@pytest.mark.parametrize(
    ("wrong", "step", "code"),
    [
        ({"member_key": PrivateIdentity.generate(os.urandom).public.signing}, "cal-1", "signature"),
        ({"signer": PrivateIdentity.generate(os.urandom)}, "cal-1", "signature"),
        ({"server": b"t" * 48}, "cal-2", "signature"),
        ({"expires_at": NOW}, "cal-3", "expired"),
        ({"expires_at": NOW + limits.CALLER_AGE_MS + limits.CLOCK_SKEW_MS + 1}, "cal-3", "expired"),
    ],
)
def test_crd_2_what_does_not_hold_is_refused(wrong: dict[str, Any], step: str, code: str) -> None:
    with pytest.raises(VerificationError) as caught:
        Callers(SERVER).key(metadata(**wrong), now_ms=NOW)
    assert (caught.value.step, caught.value.code) == (step, code)


def test_the_made_certificate_is_for_its_names_and_kept_private(tmp_path: Path) -> None:
    tls.make(tmp_path / "c", tmp_path / "k", ["relay.example", "192.0.2.7"], datetime.now(UTC))
    made = x509.load_pem_x509_certificate((tmp_path / "c").read_bytes())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"relay.example", "localhost"} <= set(names.get_values_for_type(x509.DNSName))
    assert {"192.0.2.7", "127.0.0.1"} <= {str(a) for a in names.get_values_for_type(x509.IPAddress)}
    assert isinstance(made.public_key(), ec.EllipticCurvePublicKey)
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        tls.make(tmp_path / "c", tmp_path / "k", [], datetime.now(UTC))


def test_the_digest_is_of_the_key_not_of_the_certificate(tmp_path: Path) -> None:
    tls.make(tmp_path / "c", tmp_path / "k", [], datetime.now(UTC))
    pem = (tmp_path / "c").read_bytes()
    assert tls.server_digest(pem) == tls.server_digest(pem + pem)
    with pytest.raises(ConfigError):
        tls.server_digest(b"no certificate")
