"""KMS joins: who may make one, of what, and what their ciphertext and documents are bound to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from parley_protocol.agreement.model import Consent
from parley_protocol.claims import verify_kms_join
from parley_protocol.encoding import decode
from parley_protocol.errors import MalformedError, VerificationError
from parley_protocol.transcript import (
    NO_ROSTER_KEY,
    KmsJoin,
    kms_context,
    kms_plaintext,
    kms_share_context,
    kms_user_data,
)
from support.desk import MEMBERS, make_agreement
from support.kms import arn

AGREEMENT = make_agreement(kms={"ann": arn()})
JOIN = KmsJoin(AGREEMENT.digest, "ann", (b"u" * 48,), b"ciphertext", b"s" * 48, b"r" * 32, 1)


def refused(join: KmsJoin, step: str, code: str, signer: str = "ann", agreement: Any = AGREEMENT) -> None:
    with pytest.raises(VerificationError) as caught:
        verify_kms_join(MEMBERS[signer].sign(join.to_bytes()), agreement)
    assert (caught.value.step, caught.value.code) == (step, code)


def test_a_good_one_passes() -> None:
    assert verify_kms_join(MEMBERS["ann"].sign(JOIN.to_bytes()), AGREEMENT) == JOIN


def test_kms_1_of_this_agreement() -> None:
    refused(replace(JOIN, agreement=bytes(48)), "kms-1", "agreement")


def test_kms_2_by_a_party_whose_key_the_agreement_names() -> None:
    refused(replace(JOIN, party="cyd"), "kms-2", "not-a-member", "cyd")
    refused(replace(JOIN, party="nobody"), "kms-2", "not-a-member")
    refused(replace(JOIN, party="bob"), "kms-2", "agreement", "bob")


def test_kms_3_an_upload_for_each_table() -> None:
    refused(replace(JOIN, uploads=(b"u" * 48, b"v" * 48)), "kms-3", "schema")


def test_kms_4_a_roster_key_where_rosters_are_countersigned_and_nowhere_else() -> None:
    refused(replace(JOIN, roster_key=NO_ROSTER_KEY), "kms-4", "agreement")
    standing = make_agreement(kms={"ann": arn()}, consent=Consent.STANDING)
    join = replace(JOIN, agreement=standing.digest)
    refused(join, "kms-4", "agreement", agreement=standing)
    good = replace(join, roster_key=NO_ROSTER_KEY)
    assert verify_kms_join(MEMBERS["ann"].sign(good.to_bytes()), standing) == good


def test_kms_5_signed_by_the_party() -> None:
    refused(JOIN, "kms-5", "signature", "bob")


def test_the_statement_has_one_form() -> None:
    assert KmsJoin.from_bytes(JOIN.to_bytes()) == JOIN
    assert decode(JOIN.to_bytes())[0] == "parley/1/kms-join"  # type: ignore[index]
    for wrong in (replace(JOIN, number=0), replace(JOIN, ciphertext=b""), replace(JOIN, ciphertext=bytes(6145))):
        with pytest.raises(MalformedError):
            wrong.to_bytes()


def test_what_kms_and_documents_are_told_names_agreement_party_and_uploads() -> None:
    context = kms_context(b"\xab" * 48, "ann", (b"u" * 48,))
    assert list(context) == ["parley:label", "parley:agreement", "parley:party", "parley:uploads"]
    assert context["parley:label"] == "parley/1/kms-keys" and context["parley:agreement"] == "ab" * 48
    others = [
        kms_context(bytes(48), "ann", (b"u" * 48,)),
        kms_context(b"\xab" * 48, "bob", (b"u" * 48,)),
        kms_context(b"\xab" * 48, "ann", (b"v" * 48,)),
    ]
    assert all(other != context for other in others)
    assert decode(kms_user_data(b"o" * 48, b"j" * 48)) == ["parley/1/kms-document", b"o" * 48, b"j" * 48]
    assert decode(kms_share_context(b"a" * 48, (b"u" * 48,))) == ["parley/1/kms-share-context", b"a" * 48, [b"u" * 48]]
    assert kms_plaintext((b"k" * 32, b"l" * 32), b"n" * 32) == b"k" * 32 + b"l" * 32 + b"n" * 32
