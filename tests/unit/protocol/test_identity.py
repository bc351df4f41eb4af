"""Identities and the HPKE suite: keys, fingerprints, files, and that no secret gets out."""

from __future__ import annotations

import base64
import copy
import os
import pickle
import traceback

import pytest

from parley_protocol import hpke, limits
from parley_protocol.encoding import encode
from parley_protocol.errors import MalformedError, VerificationError
from parley_protocol.identity import (
    PrivateIdentity,
    PublicIdentity,
    dump_private,
    dump_public,
    load_private,
    load_public,
    needs_passphrase,
)
from support.agreements import identity


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SCRYPT_N", 1 << 10)


def test_idn_1_the_statement_round_trips_and_nothing_else_is_one() -> None:
    public = identity("a").public
    assert PublicIdentity.from_bytes(public.to_bytes()) == public
    for wrong in (
        b"",
        encode(["parley/1/identity", public.signing]),
        encode(["parley/2/identity", public.signing, public.sealing]),
        encode(["parley/1/identity", "text", public.sealing]),
        encode({"parley/1/identity": 1}),
        public.to_bytes() + b"\x00",
    ):
        with pytest.raises(MalformedError):
            PublicIdentity.from_bytes(wrong)


def test_idn_2_bytes_that_are_no_keys_are_refused() -> None:
    public = identity("a").public
    for signing, sealing in (
        (public.signing[:-1], public.sealing),
        (public.signing, public.sealing[:-1]),
        (public.signing, b"\xff" * 1216),
        # A point of small order, to which nothing can be sealed.
        (public.signing, public.sealing[:-32] + bytes(32)),
    ):
        with pytest.raises(MalformedError):
            PublicIdentity(signing, sealing)


def test_idn_3_the_fingerprint_names_both_keys() -> None:
    one, other = identity("a").public, identity("b").public
    assert one.fingerprint == "-".join(one.fingerprint.split("-"))
    assert [len(part) for part in one.fingerprint.split("-")] == [4, 4, 4, 4]
    assert PublicIdentity(one.signing, other.sealing).fingerprint != one.fingerprint
    assert PublicIdentity(other.signing, one.sealing).fingerprint != one.fingerprint


def test_idn_4_only_the_key_and_the_purpose_open() -> None:
    member = identity("a")
    sealed = hpke.seal(member.public.sealing, b"secret", b"info")
    assert len(sealed) == len(b"secret") + hpke.OVERHEAD_BYTES
    assert member.open(sealed, b"info") == b"secret"
    for who, data, info in (
        (member, sealed, b"other"),
        (identity("b"), sealed, b"info"),
        (member, sealed[:-1], b"info"),
        (member, b"", b"info"),
        (member, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"info"),
    ):
        with pytest.raises(VerificationError) as caught:
            who.open(data, info)
        assert (caught.value.step, caught.value.code) == ("idn-4", "key")


def test_idn_5_only_the_member_signs() -> None:
    signed = identity("a").sign(b"payload")
    assert identity("a").public.verify(signed) == b"payload"
    with pytest.raises(VerificationError) as caught:
        identity("b").public.verify(signed)
    assert (caught.value.step, caught.value.code) == ("idn-5", "signature")


def test_idn_6_a_passphrase_is_needed_and_must_be_right() -> None:
    data = dump_private(identity("a"), "horse", random=os.urandom)
    assert needs_passphrase(data)
    assert b"PRIVATE KEY" not in data
    assert load_private(data, "horse").public == identity("a").public
    for wrong in (None, "", "cow", "x" * 2000):
        with pytest.raises(VerificationError) as caught:
            load_private(data, wrong)
        assert (caught.value.step, caught.value.code) == ("idn-6", "passphrase")


def test_idn_7_derived_secrets_depend_on_member_label_context_and_length() -> None:
    base = identity("a").derive(b"label", b"context", 32)
    assert base == identity("a").derive(b"label", b"context", 32)
    assert len(base) == 32
    others = [
        identity("b").derive(b"label", b"context", 32),
        identity("a").derive(b"label2", b"context", 32),
        identity("a").derive(b"label", b"context2", 32),
        identity("a").derive(b"labelc", b"ontext", 32),
    ]
    assert base not in others
    assert len(set(others)) == 4


def test_files_round_trip() -> None:
    member = identity("a")
    assert load_public(dump_public(member.public)) == member.public
    plain = dump_private(member, random=os.urandom)
    assert not needs_passphrase(plain)
    assert plain.startswith(b"-----BEGIN PRIVATE KEY-----\n")
    loaded = load_private(plain)
    assert loaded.public == member.public
    assert loaded.derive(b"l", b"c", 32) == member.derive(b"l", b"c", 32)
    assert load_private(plain.replace(b"\n", b"\r\n")).public == member.public


def test_idn_8_files_of_the_wrong_kind_are_refused() -> None:
    member = identity("a")
    plain, public = dump_private(member, random=os.urandom), dump_public(member.public)
    signing = plain[: plain.index(b"-----BEGIN PARLEY")]
    for data in (
        b"",
        b"hello",
        public,
        signing,
        plain + plain,
        plain + b"x",
        plain.replace(b"PRIVATE", b"PUBLIC"),
        b"x" * 20000,
    ):
        with pytest.raises(MalformedError):
            load_private(data)
    for data in (b"", plain, public + public, public.replace(b"A", b"*"), public.replace(b"END", b"ENDE")):
        with pytest.raises(MalformedError):
            load_public(data)
    for content in (b"", b"x", encode(["parley/1/encrypted-identity", b"", b"", b""])):
        block = b"-----BEGIN PARLEY ENCRYPTED IDENTITY-----\n%s\n-----END PARLEY ENCRYPTED IDENTITY-----\n"
        with pytest.raises(MalformedError):
            load_private(block % (base64.b64encode(content) or b"AA"), "horse")


def test_private_keys_never_print_and_are_neither_pickled_nor_copied() -> None:
    secret = bytes(range(32)) + bytes(range(100, 196))
    taken = iter((secret[:32], secret[32:]))
    member = PrivateIdentity.generate(lambda count: next(taken))
    key = hpke.generate_sealing_key(lambda count: secret[32:])
    for thing in (member, key):
        for text in (repr(thing), str(thing), f"{thing}"):
            assert secret[:32].hex() not in text
            assert "\\x" not in text
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                attempt(thing)
        assert not hasattr(thing, "__dict__")
    try:
        member.open(b"", b"")
    except VerificationError as error:
        assert repr(secret[:8])[2:-1] not in "".join(traceback.format_exception(error))


def test_a_private_sealing_key_has_its_length() -> None:
    with pytest.raises(MalformedError):
        hpke.SealingKey(bytes(95))
    with pytest.raises(MalformedError):
        hpke.seal(bytes(1215), b"", b"")
    key = hpke.generate_sealing_key(os.urandom)
    assert hpke.open(key, hpke.seal(key.public, b"x", b"i"), b"i") == b"x"
