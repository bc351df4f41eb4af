"""The agreement's canonical form, its signatures, its schema and the notes on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from parley_protocol import limits
from parley_protocol.agreement.canonical import canonical, parse
from parley_protocol.agreement.lint import Level, lint
from parley_protocol.agreement.model import LABEL, Agreement, Output, Rules, effective
from parley_protocol.agreement.schema import Column, ColumnType, Table, physical, text_of
from parley_protocol.agreement.semantics import plaintext_bytes
from parley_protocol.agreement.signed import SignedAgreement, sign
from parley_protocol.agreement.source import Tree, build
from parley_protocol.encoding import decode, encode, sha384
from parley_protocol.errors import AgreementError, MalformedError, VerificationError
from parley_protocol.output import OutputColumn, OutputTable, Reason
from parley_protocol.transcript import AgreementSignature
from support.agreements import agreement, identity, read, tree


def form(name: str) -> dict[str, object]:
    value = decode(agreement(name).canonical)
    assert isinstance(value, list)
    assert isinstance(value[1], dict)
    return value[1]  # type: ignore[return-value]


def changed(change: Callable[[dict], object], name: str = "flights") -> bytes:  # type: ignore[type-arg]
    value = form(name)
    change(value)
    return encode([LABEL, value])  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["flights", "pay"])
def test_agr_4_the_canonical_form_is_deterministic_cbor_with_its_label(name: str) -> None:
    found = agreement(name)
    assert found.digest == sha384(canonical(found))
    assert parse(found.canonical) == found
    for wrong in (b"", b"\x80", encode(["parley/2/agreement", form(name)]), encode([LABEL]), found.canonical + b"\x00"):  # type: ignore[list-item]
        with pytest.raises(MalformedError):
            parse(wrong)
    with pytest.raises(MalformedError):
        parse(bytes(limits.AGREEMENT_BYTES + 1))


VIOLATIONS: list[Callable[[dict], object]] = [  # type: ignore[type-arg]
    lambda form: form.update(version=2),
    lambda form: form.update(parley=2),
    lambda form: form.update(measurements=[]),
    lambda form: form.update(outputs=[]),
    lambda form: form.update(tables=[]),
    lambda form: form.update(members=[]),
    lambda form: form.update(platform="nitro"),
    lambda form: form.pop("root"),
    lambda form: form.pop("session"),
    lambda form: form.update(extra=1),
    lambda form: form["rules"][0][1].update(min_units=1),
    lambda form: form["rules"][0][1].update(min_parties=16),
    lambda form: form["rules"].append(["stranger", {"min_units": 3}]),
    lambda form: form["members"].append(form["members"][0]),
    lambda form: form["members"][0].__setitem__(1, b"no key"),
    lambda form: form["members"][0].__setitem__(1, "keys/9E.pub"),
    lambda form: form.update(root="simulated-root.pem"),
    lambda form: form.update(measurements=["measurements.json"]),
    lambda form: form["tables"][1]["columns"].append(form["tables"][1]["columns"][0]),
    lambda form: form["tables"][1].update(rows_per_unit=2),
    lambda form: form["outputs"][0].update(to=[]),
    lambda form: form["outputs"][0].update(where="nothing > 1"),
    lambda form: form["outputs"][0]["values"].append(["x", "max(arr_delay)"]),
    lambda form: form["session"].update(quorum=18),
    lambda form: form.update(title="a/b"),
    lambda form: form.update(title=None),
    lambda form: form.update(tables=None),
    lambda form: form.update(tables={}),
    lambda form: form["tables"][0].pop("columns"),
    lambda form: form["outputs"][0].pop("by"),
    lambda form: form["outputs"][0]["by"][0].pop("column"),
]


@pytest.mark.parametrize("violation", range(len(VIOLATIONS)))
def test_agr_5_a_canonical_form_that_breaks_a_rule_is_refused(violation: int) -> None:
    with pytest.raises(MalformedError):
        parse(changed(VIOLATIONS[violation]))


VARIANTS: list[Callable[[dict], object]] = [  # type: ignore[type-arg]
    lambda form: form["tables"][0]["from"].reverse(),
    lambda form: form["tables"][0].update({"from": "carriers"}),
    lambda form: form["tables"][0].update(rows_per_unit="600"),
    lambda form: form["tables"][0]["columns"][0].update(min="-180.0"),
    lambda form: form["tables"][0]["columns"][0].update(null="true"),
    lambda form: form["tables"][0]["columns"][0].update(max="2.88e3"),
    lambda form: form["outputs"][0]["by"][0].update(column="engine"),
    lambda form: form["outputs"][0]["by"][1].pop("labels"),
    lambda form: form["outputs"][0]["values"][2].__setitem__(1, "mean( flights.arr_delay )"),
    lambda form: form["session"].update(quorum="all"),
    lambda form: form["session"].update(deadline="14 days"),
    lambda form: form["session"].pop("consent"),
    lambda form: form["rules"][0][1].pop("coalition"),
    lambda form: form["measurements"][0].update(PCR0="11" * 48),
    lambda form: form.update(purpose=form["purpose"] + " "),
    lambda form: form.update(version="1"),
]


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_agr_6_another_way_to_write_the_same_is_refused(variant: int) -> None:
    with pytest.raises(MalformedError, match="not the canonical form"):
        parse(changed(VARIANTS[variant]))


def all_signed(found: Agreement, head: bytes = bytes(48)) -> SignedAgreement:
    return SignedAgreement(found.canonical, {name: sign(found, name, identity(name), head) for name in found.members})


def refusal(signed: SignedAgreement) -> tuple[str, str]:
    with pytest.raises(VerificationError) as caught:
        signed.verify()
    return caught.value.step, caught.value.message


def test_agr_7_all_members_sign_and_nobody_else() -> None:
    pay = agreement("pay")
    signed = all_signed(pay)
    assert signed.verify() == pay
    assert signed.missing() == ()
    assert SignedAgreement.from_bytes(signed.to_bytes()).verify() == pay
    without = {name: cose for name, cose in signed.signatures.items() if name not in ("mich", "osu")}
    assert SignedAgreement(pay.canonical, without).missing() == ("mich", "osu")
    assert refusal(SignedAgreement(pay.canonical, without)) == ("agr-7", "agr-7: not signed by mich, osu")
    stranger = signed.with_signature("eve", identity("eve").sign(b"x"))
    assert refusal(stranger) == ("agr-7", "agr-7: signed by eve, no members")


def test_agr_1_agr_2_agr_3_each_signature_names_agreement_and_member_and_holds() -> None:
    pay = agreement("pay")
    signed = all_signed(pay)
    other = AgreementSignature(agreement("flights").digest, "mich", bytes(48)).to_bytes()
    assert refusal(signed.with_signature("mich", identity("mich").sign(other)))[0] == "agr-1"
    assert refusal(signed.with_signature("mich", signed.signatures["osu"]))[0] == "agr-2"
    mine = AgreementSignature(pay.digest, "mich", bytes(48)).to_bytes()
    assert refusal(signed.with_signature("mich", identity("osu").sign(mine)))[0] == "agr-3"
    with pytest.raises(VerificationError, match="agr-3"):
        sign(pay, "mich", identity("osu"))
    with pytest.raises(VerificationError, match="agr-3"):
        sign(pay, "eve", identity("eve"))


def test_agr_8_version_1_follows_the_head_genesis() -> None:
    assert refusal(all_signed(agreement("pay"), bytes([1]) * 48))[0] == "agr-8"


def test_a_file_that_is_no_signed_agreement_is_refused() -> None:
    label = "parley/1/signed-agreement"
    for wrong in (
        b"",
        encode([label, b""]),
        encode([label, "x", {}]),
        encode([label, b"", {"a": "x"}]),
        encode([label, b"", []]),
    ):
        with pytest.raises(MalformedError):
            SignedAgreement.from_bytes(wrong)
    with pytest.raises(MalformedError):
        SignedAgreement(b"x").verify()


def test_a_program_cannot_make_what_a_file_may_not_say() -> None:
    pay = agreement("pay")
    change: dict[str, Any]
    for change in (
        {"measurements": ()},
        {"rules": (Rules(None, 1, 3),)},
        {"rules": (Rules(None, 5, 9),)},
        {"tables": {}},
        {"version": 2},
        {"root_sha256": None},
    ):
        parts = {name: getattr(pay, name) for name in pay.__dataclass_fields__ if name not in ("canonical", "digest")}
        with pytest.raises(AgreementError):
            Agreement(**{**parts, **change})


def test_equal_agreements_are_equal_and_mappings_are_read_only() -> None:
    pay = agreement("pay")
    assert pay == parse(pay.canonical)
    assert hash(pay) == hash(parse(pay.canonical))
    assert pay != agreement("flights")
    with pytest.raises(TypeError):
        pay.members["eve"] = pay.members["mich"]  # type: ignore[index]


def test_order_that_the_author_chose_stays_and_counts() -> None:
    changed_tree = tree("pay")
    outputs = changed_tree["outputs"]
    assert isinstance(outputs, dict)
    output = outputs["salary"]
    assert isinstance(output, dict)
    by = output["by"]
    assert isinstance(by, dict)
    output["by"] = dict(reversed(by.items()))
    found = build(changed_tree, read)
    assert [grouping.name for grouping in found.outputs["salary"].by] == ["sex", "rank", "year"]
    assert found.digest != agreement("pay").digest


def test_the_schema_digest_says_what_a_table_is_and_not_who_brings_it() -> None:
    table = agreement("pay").tables["staff"]
    assert replace(table, parties=("mich",)).schema_digest == table.schema_digest
    for other in (
        replace(table, name="people"),
        replace(table, key="person"),
        replace(table, rows_per_unit=4),
        replace(table, columns=table.columns[:-1]),
        replace(table, columns=tuple(reversed(table.columns))),
        replace(table, columns=(*table.columns[:-1], replace(table.columns[-1], high=500001))),
    ):
        assert other.schema_digest != table.schema_digest


@pytest.mark.parametrize(
    ("column", "dtype", "null"),
    [
        (Column("x", ColumnType.INT, low=0, high=1), "<i8", -(2**63)),
        (Column("x", ColumnType.DECIMAL, low=0, high=1), "<i8", -(2**63)),
        (Column("x", ColumnType.TIMESTAMP, low=0, high=1), "<i8", -(2**63)),
        (Column("x", ColumnType.DATE, low=0, high=1), "<i4", -(2**31)),
        (Column("x", ColumnType.BOOL), "u1", 255),
        (Column("x", ColumnType.CATEGORY, values=tuple(map(str, range(255)))), "u1", 0),
        (Column("x", ColumnType.CATEGORY, values=tuple(map(str, range(256)))), "<u2", 0),
        (Column("x", ColumnType.CATEGORY, values=tuple(map(str, range(65535)))), "<u2", 0),
        (Column("x", ColumnType.CATEGORY, values=tuple(map(str, range(65536)))), "<u4", 0),
    ],
)
def test_columns_have_fixed_widths(column: Column, dtype: str, null: int) -> None:
    assert (column.dtype, column.width, column.null_value) == (dtype, int(dtype[-1]), null)


def test_a_float_is_8_bytes_and_its_null_is_nan() -> None:
    column = Column("x", ColumnType.FLOAT, low=0.0, high=1.0)
    assert (column.dtype, column.width) == ("<f8", 8)
    assert column.null_value != column.null_value


@pytest.mark.parametrize(
    ("kind", "scale", "text", "value", "written"),
    [
        (ColumnType.INT, 0, "-42", -42, "-42"),
        (ColumnType.DECIMAL, 2, "1.5", 150, "1.50"),
        (ColumnType.DECIMAL, 0, "10000", 10000, "10000"),
        (ColumnType.DECIMAL, 2, "-0.05", -5, "-0.05"),
        (ColumnType.FLOAT, 0, "1e3", 1000.0, "1000"),
        (ColumnType.FLOAT, 0, "-0.0", 0.0, "0"),
        (ColumnType.FLOAT, 0, "0.1", 0.1, "0.1"),
        (ColumnType.DATE, 0, "1969-12-31", -1, "1969-12-31"),
        (ColumnType.TIMESTAMP, 0, "1970-01-01T00:00:01.5Z", 1_500_000, "1970-01-01T00:00:01.500000Z"),
        (ColumnType.TIMESTAMP, 0, "1970-01-02", 86_400_000_000, "1970-01-02T00:00:00Z"),
    ],
)
def test_physical_values_and_their_texts(kind: ColumnType, scale: int, text: str, value: float, written: str) -> None:
    assert physical(kind, text, scale) == value
    assert text_of(kind, value, scale) == written
    assert physical(kind, written, scale) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (ColumnType.INT, "1.0"),
        (ColumnType.INT, "012"),
        (ColumnType.INT, "+1"),
        (ColumnType.INT, "١"),
        (ColumnType.DECIMAL, "1e5"),
        (ColumnType.DECIMAL, "99999999999999999999"),
        (ColumnType.FLOAT, "nan"),
        (ColumnType.FLOAT, "inf"),
        (ColumnType.FLOAT, "1e999"),
        (ColumnType.DATE, "2013-02-30"),
        (ColumnType.DATE, "20130228"),
        (ColumnType.DATE, "2013-W01-1"),
        (ColumnType.TIMESTAMP, "2013-01-01T24:61:00Z"),
        (ColumnType.TIMESTAMP, "2013-01-01T00:00:00+02:00"),
        (ColumnType.CATEGORY, "x"),
    ],
)
def test_texts_that_write_no_value(kind: ColumnType, text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        physical(kind, text)


def test_a_column_reads_categories_and_truth_values() -> None:
    column = Column("x", ColumnType.CATEGORY, values=("a", "b"))
    assert [column.physical("a"), column.physical("b")] == [1, 2]
    assert column.text_of(2) == "b"
    with pytest.raises(ValueError, match="domain"):
        column.physical("c")
    truth = Column("x", ColumnType.BOOL)
    assert [truth.physical("false"), truth.physical("true")] == [0, 1]
    assert truth.text_of(1) == "true"
    with pytest.raises(ValueError, match="neither"):
        truth.physical("yes")


def test_bins_of_every_type_have_labels_that_say_where_they_end() -> None:
    base = tree("pay")
    tables = base["tables"]
    assert isinstance(tables, dict)
    staff = tables["staff"]
    assert isinstance(staff, dict)
    staff["columns"] = {
        "whole": {"type": "int", "min": "0", "max": "9"},
        "money": {"type": "decimal", "scale": "1", "min": "0", "max": "9"},
        "share": {"type": "float", "min": "0", "max": "1"},
        "day": {"type": "date"},
        "at": {"type": "timestamp"},
        "yes": {"type": "bool", "null": "true"},
    }
    outputs: Tree = {
        "all": {
            "from": "staff",
            "by": {
                "a": {"bin": "whole", "edges": ["2", "3"]},
                "b": {"bin": "money", "edges": ["2", "3"]},
                "c": {"bin": "share", "edges": ["0.5"]},
                "d": {"bin": "day", "edges": ["2000-01-01", "2000-03-01"]},
                "e": {"bin": "at", "edges": ["2000-01-01"]},
                "f": "yes",
            },
            "values": {"n": "count"},
            "to": "mich",
        }
    }
    base["outputs"] = outputs
    found = build(base, read)
    assert [grouping.labels for grouping in found.outputs["all"].by] == [
        ("before 2", "2", "3 and later"),
        ("below 2.0", "2.0 to below 3.0", "3.0 and above"),
        ("below 0.5", "0.5 and above"),
        ("before 2000-01-01", "2000-01-01 to 2000-02-29", "2000-03-01 and later"),
        ("below 2000-01-01T00:00:00Z", "2000-01-01T00:00:00Z and above"),
        ("false", "true", None),
    ]
    assert parse(found.canonical) == found


def test_effective_rules_are_listed_once() -> None:
    assert [rule.min_units for rule in effective(agreement("pay"))] == [5, 6]
    base = tree("pay")
    base["rules"] = {"everyone": {"min_units": "5", "min_parties": "3"}, "universities": {"min_units": "6"}}
    found = build(base, read)
    assert len(found.rules) == 10
    assert [(rule.member, rule.min_units) for rule in effective(found)] == [(None, 5), ("illinois", 6)]


def notes(base: dict[str, Tree], now_ms: int | None = None) -> list[tuple[Level, str, str]]:
    return [(note.level, note.path, note.message) for note in lint(build(base, read), now_ms)]


def test_notes_on_the_demos() -> None:
    assert notes(tree("flights")) == [
        (Level.WARNING, "platform", "simulated: no hardware protects the data"),
        (Level.NOTE, "outputs", "registry receives no output"),
        (
            Level.NOTE,
            "outputs.delay_by_engine",
            "delay_by_engine: a value needs 10 aircraft and 4 parties (3, whichever one is taken away) behind it",
        ),
    ]
    assert "by the rules of mich" in notes(tree("pay"))[-1][2]


def test_notes_warn_of_what_protects_less_than_it_seems() -> None:
    base = tree("pay")
    members = base["members"]
    assert isinstance(members, dict)
    base["members"] = {**members, "idle": "keys/idle.pub", "MICH": "keys/MICH2.pub"}
    base["measurements"] = [{"file": "measurements.json", "until": "2026-01-01"}]
    base["rules"] = {
        "everyone": {"min_units": "5", "min_parties": "3", "coalition": "0"},
        "mich": {"min_units": "4"},
        "osu": {"coalition": "all"},
    }
    session = base["session"]
    assert isinstance(session, dict)
    base["session"] = {**session, "quorum": "5", "consent": "standing"}
    staff = base["tables"]
    assert isinstance(staff, dict)
    assert isinstance(staff["staff"], dict)
    columns = staff["staff"]["columns"]
    assert isinstance(columns, dict)
    columns["unused"] = {"type": "bool"}
    found = {(path, message) for _, path, message in notes(base, 2_000_000_000_000)}
    assert {
        ("members", "idle and MICH have no role: they sign and get nothing"),
        ("members.MICH", "MICH reads like mich"),
        ("expires", "expired at the end of 2027-12-31"),
        ("measurements[0]", "the image was accepted until 2026-01-01"),
        ("tables.staff.columns.unused", "staff.unused is read by no output: nobody should bring it"),
        (
            "rules.everyone.coalition",
            "coalition 0: a party can take its own rows away and see what fewer than the rule's parties have",
        ),
        ("rules.mich", "the rules of mich ask no more than everyone's: they change nothing"),
        (
            "session.quorum",
            "two rosters of 5 of 9 parties may have only 1 in common: what one shows and the other does not is the difference",
        ),
        (
            "session.consent",
            (
                "standing consent: the host chooses which parties take part in each run, and nobody is asked;"
                " when it calls a session lost that is not, there is a release that max_releases does not count"
            ),
        ),
    } <= found
    assert any("each with no person of its own or at least 5" in message for _, message in found)
    assert ("measurements[0]", "the image is accepted until 2026-01-01, before the agreement expires") in {
        (path, message) for _, path, message in notes(base)
    }


def test_a_quorum_that_shows_nothing_is_warned_of() -> None:
    base = tree("pay")
    session = base["session"]
    assert isinstance(session, dict)
    base["session"] = {**session, "quorum": "3"}
    messages = [message for _, _, message in notes(base)]
    assert "with only the quorum, salary may stay empty: it needs 4 parties of staff" in messages


def test_tables_name_their_columns() -> None:
    table = Table("t", ("a",), "id", 1, (Column("x", ColumnType.BOOL), Column("y", ColumnType.BOOL, null=True)))
    assert table.column("y") == table.columns[1]
    assert table.column("z") is None
    second = table.ref("y")
    assert second is not None
    assert (second.number, second.nullable, second.text) == (2, True, "t.y")
    first = table.ref("x", left=True)
    assert first is not None
    assert first.nullable


def test_hostile_sizes_are_refused_at_the_first_problem() -> None:
    many = [f"x{number}" for number in range(20_000)]
    for change in (
        lambda form: form["tables"][0].update({"from": many}),
        lambda form: form["tables"][0].update(columns=[{"name": name, "type": "bool", "null": False} for name in many]),
        lambda form: form["outputs"][0].update(values=[[name, "count"] for name in many]),
        lambda form: form["outputs"][0].update(to=many),
        lambda form: form.update(groups=[[name, ["AA"]] for name in many]),
        lambda form: form.update(dict.fromkeys(many, 1)),
    ):
        with pytest.raises(MalformedError) as caught:
            parse(changed(change))
        assert len(caught.value.message) < 1000


def _empty(output: Output) -> OutputTable:
    """The output with every value hidden."""
    columns, inner = [], output.rows
    for grouping in output.by:
        inner //= grouping.size
        cells = [label for label in grouping.labels for _ in range(inner)]
        columns.append(OutputColumn(grouping.name, "label", tuple(cells * (output.rows // len(cells)))))
    nothing = (None,) * output.rows
    columns += [OutputColumn(value.name, value.type, nothing) for value in output.values]
    reasons = (Reason("min_units", output.rows * len(output.values)),)
    return OutputTable(bytes(48), output.name, "aggregate", tuple(columns), output.rows, reasons)


def _with_labels(length: int) -> dict[str, Tree]:
    """flights, by two categories of 1,000 and of 90 values of `length` characters."""
    base = tree("flights")
    tables, outputs = base["tables"], base["outputs"]
    assert isinstance(tables, dict)
    assert isinstance(tables["flights"], dict)
    assert isinstance(tables["flights"]["columns"], dict)
    assert isinstance(outputs, dict)
    assert isinstance(outputs["delay_by_engine"], dict)
    for name, count in (("tail", 1000), ("crew", 90)):
        values: list[Tree] = [f"{number:04d}".ljust(length, "x") for number in range(count)]
        tables["flights"]["columns"][name] = {"type": "category", "values": values, "null": "false"}
    outputs["delay_by_engine"]["by"] = {"tail": "tail", "crew": "crew"}
    return base


@pytest.mark.parametrize("base", [tree("flights"), tree("pay"), _with_labels(40)], ids=["flights", "pay", "labels"])
def test_no_output_is_longer_than_its_agreement_was_checked_for(base: dict[str, Tree]) -> None:
    for output in build(base, read).outputs.values():
        empty = _empty(output)
        assert len(empty.to_bytes()) <= empty.widest <= plaintext_bytes(output) <= limits.OUTPUT_BYTES


def test_an_output_that_may_not_fit_is_refused() -> None:
    with pytest.raises(AgreementError, match="outputs.delay_by_engine.by: the output may take 20342304 bytes"):
        build(_with_labels(90), read)


def test_a_release_that_may_not_fit_is_refused() -> None:
    base = _with_labels(40)
    assert isinstance(base["outputs"], dict)
    base["outputs"]["delay_by_engine"]["to"] = ["carriers", "analyst", "registry"]
    with pytest.raises(
        AgreementError, match=r"outputs: sealed to each of their recipients they may take 2\d{8} bytes, more"
    ):
        build(_with_labels(60) | {"outputs": base["outputs"]}, read)


ARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
OTHER_ARN = "arn:aws:kms:us-east-1:444455556666:key/4234abcd-12ab-34cd-56ef-1234567890ab"


def test_a_party_may_keep_its_keys_under_its_own_kms_key() -> None:
    found = build(tree("flights") | {"kms": {"UA": OTHER_ARN, "AA": ARN}}, read)
    assert list(found.kms) == ["AA", "UA"], "in the members' order"
    key = found.kms["AA"]
    assert (key.text, key.account, key.region, str(key)) == (ARN, "111122223333", "eu-central-1", ARN)
    assert parse(found.canonical) == found and parse(found.canonical).kms == found.kms
    assert found.digest != agreement("flights").digest
    assert build(tree("flights") | {"kms": {}}, read) == agreement("flights")


def test_agr_6_an_empty_map_of_keys_is_left_out() -> None:
    with pytest.raises(MalformedError, match="not the canonical form"):
        parse(changed(lambda form: form.update(kms=[])))
    with pytest.raises(MalformedError, match="not the canonical form"):
        parse(changed(lambda form: form.update(kms=[["UA", OTHER_ARN], ["AA", ARN]])))


@pytest.mark.parametrize(
    ("kms", "path", "message"),
    [
        ({"nobody": ARN}, "kms.nobody", "no member 'nobody'"),
        ({"analyst": ARN}, "kms.analyst", "brings no table: there is nothing that its key would hold"),
        ({"AA": ARN, "UA": ARN}, "kms.UA", "is the key of AA too: each party keeps its content keys under its own"),
        ({"AA": "key"}, "kms.AA", "key is not the ARN of a KMS key, arn:aws:kms:REGION:ACCOUNT:key/ID"),
        ({"AA": ARN.replace("key/", "alias/")}, "kms.AA", "is an alias, which can be moved to another key"),
        ({"AA": ARN.replace(":kms:", ":s3:")}, "kms.AA", "is not the ARN of a KMS key"),
        ({"AA": ARN.replace("111122223333", "1111")}, "kms.AA", "is not the ARN of a KMS key"),
        ({"AA": ARN + "\n"}, "kms.AA", "is not the ARN of a KMS key"),
        ({"AA": ARN.rpartition("/")[0] + "/mrk-" + "0" * 32}, "kms.AA", "is a multi-Region key"),
        ({"AA": [ARN]}, "kms.AA", "is a list, not a text"),
        ([ARN], "kms", "is a list, not a map of names to values"),
    ],
)
def test_a_key_that_is_none_of_a_party_is_refused(kms: Tree, path: str, message: str) -> None:
    with pytest.raises(AgreementError) as caught:
        build(tree("flights") | {"kms": kms}, read)
    (problem,) = caught.value.problems
    assert problem.path == path and message in problem.message


def test_notes_say_what_a_kms_key_costs_and_what_its_policy_revokes() -> None:
    base = tree("flights") | {"kms": {"AA": ARN}}
    found = [(level, path, message) for level, path, message in notes(base) if path == "kms.AA"]
    assert [level for level, _, _ in found] == [Level.WARNING, Level.NOTE]
    assert "neither forward secret nor post-quantum" in found[0][2]
    assert "AA can revoke by the policy of its key until an enclave has got the keys of a session" in found[1][2]
    assert any(path == "measurements[0]" and "no `until`" in message for _, path, message in notes(base))
    session = base["session"]
    assert isinstance(session, dict)
    standing = base | {"session": {**session, "consent": "standing"}}
    assert any(path == "kms.AA" and "is needed for no run" in message for _, path, message in notes(standing))
    assert not [path for _, path, _ in notes(tree("flights")) if path.startswith("kms")]
