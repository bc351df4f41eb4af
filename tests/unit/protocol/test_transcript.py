"""Statements: one encoding each, digests of their own, and nothing secret in what they print."""

from __future__ import annotations

import dataclasses

import pytest

from parley_protocol import transcript
from parley_protocol.encoding import decode, encode, sha384
from parley_protocol.errors import MalformedError
from parley_protocol.shapes import Statement
from parley_protocol.transcript import (
    Absentee,
    AgreementSignature,
    Caller,
    Committed,
    Countersignature,
    Included,
    Input,
    Inputs,
    Join,
    JoinKeys,
    Offer,
    Receipt,
    Record,
    RecordBody,
    Refusal,
    Roster,
    RosterConsent,
    SealedOutput,
    Start,
    Upload,
    UploadHeader,
)

D = [bytes([number]) * 48 for number in range(10)]
HEADER = UploadHeader(D[1], "AA", "flights", D[2], 5, 16384, bytes(16), D[3])
BODY = RecordBody(
    D[1],
    "engine",
    (Input("AA", (D[2],), D[3]),),
    (Absentee("BB", "deadline"),),
    (Committed("delay", ("AA", "analyst"), D[4]),),
    (),
    1,
    1,
    bytes(48),
)
EXAMPLES: list[Statement] = [
    AgreementSignature(D[1], "AA", bytes(48)),
    Offer(bytes(16), D[1], bytes(1216), bytes(32), bytes(48), 7),
    HEADER,
    Upload(HEADER.to_bytes(), D[4]),
    JoinKeys((b"k" * 32,), b"s" * 32),
    Join(D[1], "AA", (D[2], D[3]), b"sealed", D[4], bytes(32)),
    Receipt(D[1], "AA", (D[2],), D[3], 8),
    Start(D[1], "analyst"),
    Inputs(D[1], D[2], (Input("AA", (D[3],), D[4]),), ("BB",)),
    Roster(D[1], D[2], (Included("AA", (D[3],), D[4], D[5], bytes(32)),), (Absentee("BB", "deadline"),), 9),
    RosterConsent(D[1], "AA", (D[2],)),
    Countersignature(D[1], "AA", (), bytes(64)),
    Refusal(D[1], "AA"),
    BODY,
    Record(BODY.to_bytes(), bytes(16), D[1], D[2]),
    Caller(bytes(32), D[1], 10),
    SealedOutput(b"x" * 32, b"plain\x80\0"),
]


@pytest.mark.parametrize("statement", EXAMPLES, ids=lambda statement: type(statement).__name__)
def test_stm_1_a_statement_has_one_encoding(statement: Statement) -> None:
    data = statement.to_bytes()
    assert type(statement).from_bytes(data) == statement
    assert statement.digest == sha384(data)
    value = decode(data)
    assert isinstance(value, list) and value[0] == statement.LABEL


@pytest.mark.parametrize("statement", EXAMPLES, ids=lambda statement: type(statement).__name__)
def test_stm_1_every_other_form_is_refused(statement: Statement) -> None:
    value = decode(statement.to_bytes())
    assert isinstance(value, list)
    wrong: list[object] = [
        value[:-1],
        [*value, None],
        ["parley/1/other", *value[1:]],
        ["parley/2" + str(value[0])[8:], *value[1:]],
        {"label": value[0]},
        value[0],
    ]
    for position in range(1, len(value)):
        for bad in (None, {"a": 1}, -1, ""):
            wrong.append([*value[:position], bad, *value[position + 1 :]])
    for item in wrong:
        with pytest.raises(MalformedError):
            type(statement).from_bytes(encode(item))  # type: ignore[arg-type]
    with pytest.raises(MalformedError):
        type(statement).from_bytes(statement.to_bytes() + b"\0")


def test_labels_and_digests_are_all_different() -> None:
    assert len({statement.LABEL for statement in EXAMPLES}) == len(EXAMPLES)
    assert len({statement.digest for statement in EXAMPLES}) == len(EXAMPLES)


def test_a_bad_field_is_named() -> None:
    with pytest.raises(MalformedError, match=r"Receipt\.party"):
        dataclasses.replace(Receipt(D[1], "AA", (D[2],), D[3], 8), party="a\nb").to_bytes()
    with pytest.raises(MalformedError, match=r"Roster\.included\[0\]\.share_digest"):
        Roster(D[1], D[2], (Included("AA", (D[3],), b"short", D[5], bytes(32)),), (), 9).to_bytes()


def test_stm_1_names_are_nfc_without_control_or_surrogate() -> None:
    for name in ("e\u0301", "a\0", "\x7f", "\ud800", "", "x" * 129):
        with pytest.raises(MalformedError):
            Start(D[1], name).to_bytes()
    assert Start.from_bytes(Start(D[1], "Zürich 東京").to_bytes()).member == "Zürich 東京"


def test_stm_2_no_statement_in_the_clear_has_a_row_count() -> None:
    names = {field.name for statement in EXAMPLES for field in dataclasses.fields(statement)}  # type: ignore[arg-type]
    assert not names & {"rows", "row_count", "units", "suppressed", "hidden"}


def test_secrets_do_not_print() -> None:
    keys = JoinKeys((b"K" * 32,), b"S" * 32)
    output = SealedOutput.of(b"x" * 32, b"PLAINTEXT")
    for text in (repr(keys), str(keys), repr(output)):
        assert "KKKK" not in text and "SSSS" not in text and "PLAINTEXT" not in text


def test_derived_values_separate_their_purposes() -> None:
    key, head = b"k" * 32, D[3]
    made = [
        transcript.key_commitment(key),
        transcript.share_digest(key),
        transcript.output_commitment(key, b""),
        transcript.frame_key(key, HEADER.to_bytes()),
        transcript.frame_key(key, dataclasses.replace(HEADER, table="planes").to_bytes()),
        transcript.noise_key((key,), D[1], head, D[2]),
        transcript.noise_key((key,), D[1], head, D[4]),
        transcript.noise_key((key, key), D[1], head, D[2]),
        transcript.output_salt(key, "a"),
        transcript.output_salt(key, "b"),
        transcript.join_info(D[1], "AA", (D[2],)),
        transcript.join_info(D[1], "BB", (D[2],)),
        transcript.output_info(head, "a", "AA"),
        transcript.output_info(head, "a", "BB"),
        transcript.offer_user_data(b"x"),
        transcript.record_user_data(b"x"),
        transcript.unit_salt(D[1], "person"),
        transcript.unit_salt(D[1], "firm"),
        transcript.noise_share_context(D[1], head),
        transcript.noise_share_context(D[1], D[4]),
    ]
    assert len(set(made)) == len(made)


def test_a_record_whose_body_is_no_body_is_refused() -> None:
    with pytest.raises(MalformedError):
        Record.from_bytes(Record(b"\x80", bytes(16), D[1], D[2]).to_bytes())
    with pytest.raises(MalformedError):
        Upload.from_bytes(Upload(BODY.to_bytes(), D[1]).to_bytes())
