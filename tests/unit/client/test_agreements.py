"""Agreements as YAML: what people write, and every message that they get back, with field and line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from parley.agreements import (
    duration,
    load_signed,
    load_source,
    parse_source,
    parse_yaml,
    reader,
    save_signed,
    show,
)
from parley_protocol.agreement.canonical import parse
from parley_protocol.agreement.model import Consent, Function, JoinKind, Normalise, Platform, effective
from parley_protocol.agreement.signed import SignedAgreement, sign
from parley_protocol.errors import AgreementError, MalformedError
from support import agreements
from support.agreements import identity, yaml_text


def problems(text: str) -> list[tuple[str, int | None, str]]:
    with pytest.raises(AgreementError) as caught:
        parse_source(text.encode(), read)
    return [(problem.path, problem.line, problem.message) for problem in caught.value.problems]


def read(name: str) -> bytes:
    special = {
        "keys/private.pub": b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        "keys/AAA.pub": agreements.read("keys/AA.pub"),
        "not.json": b"{",
        "list.json": b"[]",
        "one.json": b'{"PCR0": "11"}',
        "two.json": ('{"PCR0": "%s", "PCR1": "%s"}' % ("11" * 48, "22" * 48)).encode(),
        "zero.json": ('{"PCR0": "%s", "PCR1": "%s", "PCR2": "%s"}' % ("00" * 48, "22" * 48, "33" * 48)).encode(),
        "latin.txt": "é".encode("latin-1"),
        "values.txt": b"\xef\xbb\xbfalpha\r\nbeta\n\n",
        "double.txt": b"alpha\nalpha\n",
        "empty.txt": b"\n\n",
    }
    return special[name] if name in special else agreements.read(name)


DIGEST = "ab" * 48

# What is replaced in flights.yaml, by what, and the field and the message that follow. The line is that of the replacement,
# or of the nearest field above where the field is missing.
CASES = [
    ("max: 2880", "max: -200", "tables.flights.columns.arr_delay.max", "-200 is below min (-180)"),
    ("parley: 1 ", "parley: 2 ", "parley", "this program knows version 1 of the language"),
    ("version: 1 ", "version: 0 ", "version", "0 is not 1 to 64"),
    ("version: 1 ", "version: 01 ", "version", "'01' is not a whole number"),
    ("version: 1 ", "version: 2 ", "replaces", "version 2 must name the digest of version 1"),
    ("version: 1 ", f"replaces: {DIGEST}\nversion: 1 ", "replaces", "version 1 replaces nothing"),
    (
        "version: 1 ",
        f"series: {DIGEST}\nversion: 1 ",
        "series",
        "the series is the digest of version 1: it cannot name its own",
    ),
    (
        "version: 1 ",
        f"replaces: {DIGEST}\nversion: 3 ",
        "series",
        "version 3 must name the digest of version 1",
    ),
    (
        "version: 1 ",
        f"replaces: {DIGEST}\nseries: {DIGEST}\nversion: 3 ",
        "replaces",
        "is the digest of version 1 in version 2 and in no other",
    ),
    ("version: 1 ", "replaces: ABC\nversion: 2 ", "replaces", "is not a digest: 96 hexadecimal digits in lower case"),
    ("title: flights-by-engine", "title: ''", "title", "is empty"),
    ("title: flights-by-engine", "title: a/b", "title", "contains / or \\, or begins with . or -"),
    ("title: flights-by-engine", 'title: "a\\u202eb"', "title", "contains a control or invisible character"),
    (
        "title: flights-by-engine",
        'title: "cafe\\u0301"',
        "title",
        "is not in Unicode's form NFC: type its accents as single characters",
    ),
    ("title: flights-by-engine", f"title: {'x' * 129}", "title", "is longer than 128 bytes"),
    ("title: flights-by-engine", "title: ' a'", "title", "begins or ends with blank space"),
    ("title: flights-by-engine", "title: [a]", "title", "is a list, not a text"),
    ("title: flights-by-engine", "titel: flights", "titel", "unknown key (did you mean 'title'?)"),
    ("expires: 2027-12-31", "expires: 31.12.2027", "expires", "'31.12.2027' is not a date such as 2013-01-31"),
    ("expires: 2027-12-31", "expires: 1999-12-31", "expires", "'1999-12-31' is not a day of the years 2000 to 9998"),
    ("platform: simulated", "platform: nitr", "platform", "'nitr' is none of simulated, nitro (did you mean 'nitro'?)"),
    (
        "platform: simulated",
        "platform: nitro",
        "root",
        "platform nitro accepts the roots in the verifier and no other: leave it out",
    ),
    ("root: simulated-root.pem", "root: other.pem", "root", "'other.pem' cannot be read: No such file or directory"),
    ("root: simulated-root.pem", "root: measurements.json", "root", "is not a certificate in PEM"),
    ("[measurements.json]", "[]", "measurements", "none: no enclave could be accepted"),
    ("[measurements.json]", "[not.json]", "measurements[0]", "'not.json' is neither an image nor JSON"),
    ("[measurements.json]", "[list.json]", "measurements[0]", "'list.json' holds no measurements"),
    ("[measurements.json]", "[one.json]", "measurements[0]", "PCR0 is not 96 hexadecimal digits"),
    (
        "[measurements.json]",
        "[two.json]",
        "measurements[0]",
        "PCR2 is missing: PCR0, PCR1 and PCR2 fix an image only together",
    ),
    ("[measurements.json]", "[zero.json]", "measurements[0]", "PCR0 is all zero, which every debug enclave has"),
    ("[measurements.json]", "[measurements.json, measurements.json]", "measurements[1]", "is there already"),
    ("[measurements.json]", "[{PCR0: ab}]", "measurements[0].PCR1", "is missing"),
    ("AA: keys/AA.pub", "AA: keys/AA.key", "members.AA", "'keys/AA.key' cannot be read: No such file or directory"),
    (
        "AA: keys/AA.pub",
        "AA: keys/private.pub",
        "members.AA",
        "is not the file of a public identity: not a file of a public identity",
    ),
    ("AS: keys/AS.pub", "AS: keys/AAA.pub", "members.AS", "has a key of AA"),
    ("  analyst: keys", "  all: keys", "members.all", "is a word of the language: name the member otherwise"),
    ("  carriers: [", "  AA: [", "groups.AA", "is the name of a member"),
    ("[9E, AA,", "[9E, AAX,", "groups.carriers[1]", "no member 'AAX' (did you mean 'AA'?)"),
    ("[9E, AA,", "[9E, 9E, AA,", "groups.carriers[1]", "9E is there twice"),
    ("carriers: [9E", "none: []\n  carriers: [9E", "groups.none", "is empty"),
    (
        "normalise: exact",
        "normalise: mail",
        "unit.normalise",
        "'mail' is none of exact, casefold, email, phone, digits (did you mean 'email'?)",
    ),
    (
        "from: carriers",
        "from: carrier",
        "tables.flights.from",
        "no member or group 'carrier' (did you mean 'carriers'?)",
    ),
    ("from: carriers", "from: [carriers, AA]", "tables.flights.from[1]", "AA is there twice"),
    ("from: carriers", "from: []", "tables.flights.from", "nobody"),
    ("rows_per_unit: 600", "rows_per_unit: 0", "tables.flights.rows_per_unit", "0 is not 1 to 1000000"),
    ("rows_per_unit: 600", "rows_per_unit: many", "tables.flights.rows_per_unit", "'many' is not a whole number"),
    (
        "  flights:\n    from",
        "  fl-ights:\n    from",
        "tables.fl-ights",
        "the name is not made of letters, digits and _, beginning with no digit",
    ),
    (
        "      arr_delay:",
        "      null:",
        "tables.flights.columns.null",
        "the name is a word of the language of expressions",
    ),
    (
        "      arr_delay:",
        "      tailnum:",
        "tables.flights.columns.tailnum",
        "is the key, which stands in every table by itself",
    ),
    ("type: float", "type: real", "tables.flights.columns.arr_delay.type", None),
    ("min: -180, ", "", "tables.flights.columns.arr_delay.min", "is missing: a float needs its range"),
    ("min: -180", "min: few", "tables.flights.columns.arr_delay.min", "'few' is not a number"),
    ("min: -180", "min: -1e101", "tables.flights.columns.arr_delay.min", "'-1e101' is beyond 1e+100"),
    (
        "null: true}\n  planes",
        "null: yes}\n  planes",
        "tables.flights.columns.arr_delay.null",
        "'yes' is neither true nor false",
    ),
    ("max: 2880,", "max: 2880, scale: 2,", "tables.flights.columns.arr_delay.scale", "a float has no such property"),
    ("min: 1900", "min: 1900.5", "tables.planes.columns.year.min", "'1900.5' is not a whole number"),
    (
        "min: 1900",
        "min: 9999999999999999999",
        "tables.planes.columns.year.min",
        "'9999999999999999999' does not fit 64 bits",
    ),
    (
        "{type: int, min: 1900, max: 2013",
        "{type: decimal, scale: 19, min: 1900, max: 2013",
        "tables.planes.columns.year.scale",
        "19 is not 0 to 18",
    ),
    (
        "{type: int, min: 1900, max: 2013",
        "{type: decimal, scale: 1, min: 1900.25, max: 2013",
        "tables.planes.columns.year.min",
        "'1900.25' has more than 1 digits after the point",
    ),
    ("[4 Cycle, ", "[4 Cycle, 4 Cycle, ", "tables.planes.columns.engine.values[1]", "'4 Cycle' is there twice"),
    (
        "[4 Cycle, ",
        "[(null), ",
        "tables.planes.columns.engine.values[0]",
        "'(null)' is how nulls are shown: write null: true instead",
    ),
    ("[4 Cycle, ", "['', ", "tables.planes.columns.engine.values[0]", "'' is empty"),
    ("values: [4 Cycle", "nothing: [4 Cycle", "tables.planes.columns.engine.nothing", None),
    ("values: [4 Cycle", "values_file: values.txt, values: [4 Cycle", "tables.planes.columns.engine", None),
    (
        re.compile(r"values: \[4 C[^]]*\]"),
        "values_file: empty.txt",
        "tables.planes.columns.engine.values_file",
        "none: a category has at least one value",
    ),
    (
        re.compile(r"values: \[4 C[^]]*\]"),
        "values_file: double.txt",
        "tables.planes.columns.engine.values_file",
        "'alpha' is there twice",
    ),
    (
        re.compile(r"values: \[4 C[^]]*\]"),
        "values_file: latin.txt",
        "tables.planes.columns.engine.values_file",
        "is not a text in UTF-8",
    ),
    (
        re.compile(r"values: \[4 C[^]]*\]"),
        "values_file: no.txt",
        "tables.planes.columns.engine.values_file",
        "'no.txt' cannot be read: No such file or directory",
    ),
    ("kind: aggregate", "kind: survival", "outputs.delay_by_engine.kind", "'survival' is none of aggregate"),
    ("from: flights ", "from: flight ", "outputs.delay_by_engine.from", "no table 'flight' (did you mean 'flights'?)"),
    (
        "{planes: inner}",
        "{plane: inner}",
        "outputs.delay_by_engine.join.plane",
        "no table 'plane' (did you mean 'planes'?)",
    ),
    (
        "{planes: inner}",
        "{planes: outer}",
        "outputs.delay_by_engine.join.planes",
        "'outer' is none of inner, left",
    ),
    (
        "{planes: inner}",
        "{planes: inner, flights: inner}",
        "outputs.delay_by_engine.join.flights",
        "is the output's own table",
    ),
    (
        "rows_per_unit: 1\n",
        "rows_per_unit: 2\n",
        "outputs.delay_by_engine.join.planes",
        "must have rows_per_unit 1: its rows would multiply those of the output",
    ),
    (
        "from: registry",
        "from: [registry, analyst]",
        "outputs.delay_by_engine.join.planes",
        "must come from one party: a unit could have a row of each",
    ),
    (
        "engine: engine",
        "engine: engines",
        "outputs.delay_by_engine.by.engine",
        "no column 'engines' (did you mean 'engine'?)",
    ),
    (
        "engine: engine",
        "engine: plane.engine",
        "outputs.delay_by_engine.by.engine",
        "no table 'plane' in this output (did you mean 'planes'?)",
    ),
    (
        "engine: engine",
        "engine: tailnum",
        "outputs.delay_by_engine.by.engine",
        "'tailnum' is the key of flights, which no output may read",
    ),
    (
        "engine: engine",
        "engine: year",
        "outputs.delay_by_engine.by.engine",
        "planes.year is a int: write {bin: year, edges: [...]}",
    ),
    (
        "bin: year",
        "bin: engine",
        "outputs.delay_by_engine.by.built.bin",
        "planes.engine is a category, which has no bins: name the column alone",
    ),
    ("[1994, 2004]", "[]", "outputs.delay_by_engine.by.built.edges", "0 edges are not 1 to 1000"),
    (
        "[1994, 2004]",
        "[1994, 1994]",
        "outputs.delay_by_engine.by.built.edges[1]",
        "1994 is not above the edge before it",
    ),
    (
        "[1994, 2004]",
        "[1900, 2004]",
        "outputs.delay_by_engine.by.built.edges[0]",
        "1900 leaves a bin empty: year is 1900 to 2013",
    ),
    (
        "[1994, 2004]",
        "[1994, 2014]",
        "outputs.delay_by_engine.by.built.edges[1]",
        "2014 leaves a bin empty: year is 1900 to 2013",
    ),
    ("[1994, 2004]", "[1994, x]", "outputs.delay_by_engine.by.built.edges[1]", "'x' is not a whole number"),
    (
        "[1994, 2004]}",
        "[1994, 2004], labels: [a, b]}",
        "outputs.delay_by_engine.by.built.labels",
        "2 labels for 3 bins",
    ),
    (
        "[1994, 2004]}",
        "[1994, 2004], labels: [a, b, a]}",
        "outputs.delay_by_engine.by.built.labels",
        "a label is there twice, or is (null)",
    ),
    ("flights: count ", "flights: counts ", "outputs.delay_by_engine.values.flights", None),
    (
        "aircraft: units",
        "aircraft: units(year)",
        "outputs.delay_by_engine.values.aircraft",
        "units takes no column: it counts distinct units",
    ),
    ("mean(arr_delay)", "mean", "outputs.delay_by_engine.values.mean_delay", "mean needs a column: mean(x)"),
    (
        "mean(arr_delay)",
        "mean(engine)",
        "outputs.delay_by_engine.values.mean_delay",
        "planes.engine is a category, which has no mean",
    ),
    (
        "mean(arr_delay)",
        "mean(dep_delay)",
        "outputs.delay_by_engine.values.mean_delay",
        "no column 'dep_delay' (did you mean 'arr_delay'?)",
    ),
    (
        "mean(arr_delay)",
        "mean(arr_delay",
        "outputs.delay_by_engine.values.mean_delay",
        "'mean(arr_delay' is not count, units or a function of a column such as mean(x)",
    ),
    (
        "      aircraft: units",
        "      engine: units",
        "outputs.delay_by_engine.values.engine",
        "is the name of a `by` column of this output",
    ),
    (
        "to: [carriers, analyst]",
        "to: [carriers, analist]",
        "outputs.delay_by_engine.to[1]",
        "no member or group 'analist' (did you mean 'analyst'?)",
    ),
    (
        "to: [carriers, analyst]",
        "to: []",
        "outputs.delay_by_engine.to",
        "nobody: an output that nobody receives is not computed",
    ),
    (
        "    by:\n",
        "    where: year > 'x'\n    by:\n",
        "outputs.delay_by_engine.where",
        "a text can be compared with a category, a date or a timestamp alone, at character 8 of \"year > 'x'\"",
    ),
    ("min_units: 10", "min_units: 1", "rules.everyone.min_units", "1 is below 2: a value of one unit is that unit's"),
    ("min_parties: 3", "min_parties: 0", "rules.everyone.min_parties", "0 is below 1"),
    (
        "min_parties: 3",
        "min_parties: 16",
        "rules.everyone.min_parties",
        "16 parties, whichever 1 is taken away, are more than bring flights: outputs.delay_by_engine stays empty",
    ),
    ("coalition: 1 ", "coalition: some ", "rules.everyone.coalition", "'some' is not a whole number"),
    ("  everyone:", "  everybody:", "rules", "everyone is missing: the rules that hold for all"),
    ("    coalition: 1 ", "    colition: 1 ", "rules.everyone.colition", "unknown key (did you mean 'coalition'?)"),
    ("rules:\n", "rules:\n  ZZ: {min_units: 20}\n", "rules.ZZ", "no member or group 'ZZ'"),
    ("rules:\n", "rules:\n  AA: {}\n", "rules.AA", "asks nothing"),
    (
        "rules:\n",
        "rules:\n  AA: {min_units: 20}\n  carriers: {min_units: 20}\n",
        "rules.carriers",
        "AA has rules already",
    ),
    ("start: analyst", "start: []", "session.start", "nobody"),
    ("quorum: all", "quorum: 18", "session.quorum", "18 is not 1 to 17, the number of parties"),
    (
        "deadline: 14 days",
        "deadline: 14 d",
        "session.deadline",
        "'14 d' is not a duration such as '14 days', '2 hours' or '30 seconds'",
    ),
    ("deadline: 14 days", "deadline: 53 weeks", "session.deadline", "53 weeks is not within 1 second and 366 days"),
    ("max_releases: 4", "max_releases: 0", "session.max_releases", "0 is not 1 to 100000"),
    ("consent: roster", "consent: none", "session.consent", "'none' is none of roster, standing"),
    ("    to: [carriers, analyst]", "    too: [carriers, analyst]", "outputs.delay_by_engine.to", "is missing"),
    ("session:\n", "sessions:\n", "session", "is missing"),
    ("title: flights-by-engine", "title: a\ntitle: b", "title", "is there twice"),
    (
        "title: flights-by-engine",
        "title: &x a",
        "title",
        "has an anchor or an alias: write the value where it is meant",
    ),
    ("title: flights-by-engine", "title: !!str a", "title", None),
    ("rules:\n", "rules:\n  <<: {a: b}\n", "rules", "merge keys are not read: write the values where they are meant"),
]


@pytest.mark.parametrize(
    ("old", "new", "path", "message"), CASES, ids=[f"{case[2]}-{number}" for number, case in enumerate(CASES)]
)
def test_every_problem_names_field_and_line(
    old: str | re.Pattern[str], new: str, path: str, message: str | None
) -> None:
    before = yaml_text("flights")
    after = old.sub(new, before, count=1) if isinstance(old, re.Pattern) else before.replace(old, new, 1)
    assert after != before
    found = {place: (line, text) for place, line, text in problems(after)}
    assert path in found, found
    line, text = found[path]
    if message is not None:
        assert text == message
    assert line is not None or path in ("series", "session", "replaces")
    if line is not None:
        # The line shows the last name of the path, or that of the field above where it is missing.
        shown = after.splitlines()[line - 1]
        names = ["<<"] if "<<" in shown else [name for name in re.split(r"[.\[\]]+", path) if name]
        assert any(name in shown for name in names[-3:]), shown


def test_the_line_of_the_transcript() -> None:
    text = yaml_text("flights").replace("max: 2880", "max: -200")
    number = next(number for number, line in enumerate(text.splitlines(), 1) if "max: -200" in line)
    assert problems(text) == [("tables.flights.columns.arr_delay.max", number, "-200 is below min (-180)")]


def test_all_problems_are_reported_at_once() -> None:
    text = yaml_text("flights").replace("max: 2880", "max: -200").replace("14 days", "soon")
    text = text.replace("min_units: 10", "min_units: 1").replace("expires: 2027", "expires: 27")
    assert {path for path, _, _ in problems(text)} == {
        "tables.flights.columns.arr_delay.max",
        "session.deadline",
        "rules.everyone.min_units",
        "expires",
    }


NESTED = """
  by_engine:
    from: flights
    join: {planes: inner}
    %s
    values: {flights: count}
    to: analyst
"""


@pytest.mark.parametrize(
    "by",
    [
        "by: {engine: engine}",
        "by: {built: {bin: year, edges: [1994]}}",
        "where: year > 2000",
        "by: {late: {bin: arr_delay, edges: [15]}}",
        "by: {built: {bin: year, edges: [1990]}}",
        "by: {late: {bin: arr_delay, edges: [15]}}\n    where: year > 2000",
    ],
)
def test_outputs_that_nest_or_share_a_table_are_refused(by: str) -> None:
    (found,) = problems(yaml_text("flights").replace("\nrules:\n", NESTED % by + "\nrules:\n"))
    assert found[0] == "outputs.by_engine.from"
    assert "flights is read by outputs.delay_by_engine too" in found[2]


def test_a_measure_that_a_party_could_weigh_is_refused() -> None:
    weighed = yaml_text("flights").replace("mean(arr_delay)", "mean(year)")
    (found,) = problems(weighed)
    assert found[0] == "outputs.delay_by_engine.values.mean_delay"
    assert "once for each of up to 600 rows of flights" in found[2]
    once = weighed.replace("rows_per_unit: 600", "rows_per_unit: 1")
    assert parse_source(once.encode(), read).tables["flights"].rows_per_unit == 1


def test_a_table_that_no_output_reads_is_refused() -> None:
    text = re.sub(r"    join: .*\n    by:\n.*\n.*\n", "", yaml_text("flights"))
    assert ("tables.planes", 45, "is read by no output: nobody should bring it") in problems(text)


def test_too_many_combinations_are_refused() -> None:
    edges = ", ".join(str(edge) for edge in range(1901, 2013))
    fine = ", ".join(f"{edge}" for edge in range(-179, 700))
    text = yaml_text("flights").replace(
        "[1994, 2004]}", f"[{edges}]}}\n      late: {{bin: arr_delay, edges: [{fine}]}}"
    )
    found, sealed = problems(text)
    assert found[2] == f"{6 * 114 * 881} combinations are more than 100000"
    assert sealed[0] == "outputs"


def test_flights() -> None:
    agreement = parse_source(yaml_text("flights").encode(), read)
    assert agreement.platform is Platform.SIMULATED
    assert len(agreement.parties) == 17
    assert agreement.parties[0] == "9E"
    assert agreement.parties[-1] == "registry"
    assert agreement.series == agreement.digest
    assert agreement.expires_ms == 1830297600000
    output = agreement.outputs["delay_by_engine"]
    assert output.rows == 24
    assert output.joins[0].kind is JoinKind.INNER
    assert output.by[1].labels == ("before 1994", "1994 to 2003", "2004 and later", None)
    assert [value.function for value in output.values] == [Function.COUNT, Function.UNITS, Function.MEAN, Function.STD]
    assert output.recipients == (*agreement.groups["carriers"], "analyst")
    assert agreement.tables["flights"].widths == (8,)
    assert [column.dtype for column in agreement.tables["planes"].columns] == ["u1", "<i8"]
    assert agreement.session.consent is Consent.ROSTER
    assert agreement.session.countersign_within_ms == 86_400_000
    assert agreement.tables_of("registry") == ("planes",)
    assert parse(agreement.canonical) == agreement


def test_pay() -> None:
    agreement = parse_source(yaml_text("pay").encode(), read)
    assert agreement.unit.normalise is Normalise.DIGITS
    output = agreement.outputs["salary"]
    # `where` leaves no null rank and no null sex.
    assert output.rows == 18
    assert output.by[0].labels == ("92", "95", "99")
    assert [(rule.member, rule.min_units, rule.min_parties, rule.coalition) for rule in agreement.rules] == [
        (None, 5, 3, 1),
        ("mich", 6, 3, 1),
    ]
    assert len(effective(agreement)) == 2
    assert parse(agreement.canonical) == agreement


def test_scalars_are_text_until_the_schema_types_them() -> None:
    text = yaml_text("flights").replace("[4 Cycle, Reciprocating", "[NO, 012, 1e5, 0x10, ~, true, 2013-01-01, 1_0")
    values = parse_source(text.encode(), read).tables["planes"].columns[0].values
    assert values[:8] == ("NO", "012", "1e5", "0x10", "~", "true", "2013-01-01", "1_0")


def test_a_domain_may_come_from_a_file() -> None:
    text = re.sub(r"values: \[4 C[^]]*\]", "values_file: values.txt", yaml_text("flights"))
    assert parse_source(text.encode(), read).tables["planes"].columns[0].values == ("alpha", "beta")


def test_an_amendment_names_what_it_replaces() -> None:
    first = parse_source(yaml_text("flights").encode(), read)
    text = yaml_text("flights").replace("version: 1 ", f"replaces: {first.digest.hex()}\nversion: 2 ")
    second = parse_source(text.encode(), read)
    assert (second.replaces, second.series) == (first.digest, first.digest)
    assert second.digest != first.digest
    assert parse(second.canonical) == second


def test_measurements_with_a_last_day() -> None:
    text = yaml_text("flights").replace("[measurements.json]", "[{file: measurements.json, until: 2026-12-31}]")
    (measurement,) = parse_source(text.encode(), read).measurements
    assert measurement.until_ms == 1798761600000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"a: [", "is not YAML"),
        (b"a: 1\n---\nb: 2\n", "a second document begins"),
        (b"\xff", "is not a text in UTF-8"),
        (b"a: \x00", "is not YAML"),
        (b"? [a]\n: b\n", "a key is not a text"),
        (b"[" * 40 + b"]" * 40, "is nested deeper"),
        (b"- *x\n", "anchor or an alias"),
    ],
)
def test_what_is_no_yaml_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(AgreementError, match=re.escape(message)):
        parse_yaml(data)


def test_a_tree_that_is_no_map_is_refused() -> None:
    assert problems("[a]")[0][2] == "is a list, not a map of names to values"


def test_show_fills_in_defaults_and_names_groups() -> None:
    text = yaml_text("flights").replace("  max_releases: 4\n", "").replace("    coalition: 1 ", "    # coalition")
    shown = show(parse_source(text.encode(), read))
    assert "max_releases: 1" in shown
    assert "coalition: 1}  # at least 4 parties" in shown
    assert "to: [carriers, analyst]" in shown
    assert "from: carriers" in shown
    assert "countersign_within: 1 day" in shown
    assert f"AA: {identity('AA').public.fingerprint}" in shown


def test_what_is_shown_is_yaml_and_says_the_same() -> None:
    agreement = parse_source(yaml_text("pay").encode(), read)
    tree, _ = parse_yaml(show(agreement).encode())
    assert isinstance(tree, dict)
    original, _ = parse_yaml(yaml_text("pay").encode())
    assert isinstance(original, dict)
    for name in ("members", "root", "measurements"):
        tree[name] = original[name]
    from parley_protocol.agreement.source import build

    assert build(tree, read) == agreement


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (86_400_000, "1 day"),
        (7_200_000, "2 hours"),
        (60_000, "1 minute"),
        (30_000, "30 seconds"),
        (1001, "1001 milliseconds"),
    ],
)
def test_durations(milliseconds: int, text: str) -> None:
    assert duration(milliseconds) == text


def test_files_are_read_beside_the_agreement(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    for name in parse_source(yaml_text("pay").encode(), read).members:
        (tmp_path / "keys" / f"{name}.pub").write_bytes(read(f"keys/{name}.pub"))
    for name in ("simulated-root.pem", "measurements.json"):
        (tmp_path / name).write_bytes(read(name))
    (tmp_path / "pay.yaml").write_text(yaml_text("pay"), "utf-8")
    assert load_source(tmp_path / "pay.yaml") == parse_source(yaml_text("pay").encode(), read)
    with pytest.raises(OSError, match="missing"):
        reader(tmp_path)("missing")


def test_a_signed_agreement_survives_its_file(tmp_path: Path) -> None:
    agreement = parse_source(yaml_text("pay").encode(), read)
    signed = SignedAgreement(agreement.canonical, {"mich": sign(agreement, "mich", identity("mich"))})
    save_signed(tmp_path / "pay.parley", signed)
    loaded = load_signed(tmp_path / "pay.parley")
    assert loaded.to_bytes() == signed.to_bytes()
    assert "mich" not in loaded.missing()
    (tmp_path / "bad.parley").write_bytes(b"x")
    with pytest.raises(MalformedError):
        load_signed(tmp_path / "bad.parley")
