"""What people and programs see: output tables, exit codes, small forms of digests, sizes and times."""

from __future__ import annotations

import json

import pytest

from parley.cli import console, exits, tables
from parley.cli.exits import Exit, Failure
from parley_protocol.errors import CODES, DataError, MalformedError, RefusedError, StateError, UnavailableError
from parley_protocol.output import OutputColumn, OutputTable, Reason

TABLE = OutputTable(
    agreement=bytes(48),
    name="delay_by_engine",
    kind="aggregate",
    columns=(
        OutputColumn("engine", "label", ("Turbo-fan", "Turbo-fan", "Turbo-jet", "Turbo-jet")),
        OutputColumn("built", "label", ("before 1994", None, "before 1994", None)),
        OutputColumn("flights", "count", (23_570, 4_618, 12_807, None)),
        OutputColumn("mean_delay", "float", (2.871, 0.01234567, None, None)),
        OutputColumn("total", "decimal", ("1.50", "2.25", None, None)),
    ),
    rows=4,
    reasons=(Reason("min_parties", 2), Reason("min_units", 3)),
)


def test_a_table_shows_combinations_and_says_what_is_hidden() -> None:
    assert tables.render(TABLE, "SIMULATED", "aircraft", "carriers") == [
        "delay_by_engine                           SIMULATED",
        "engine     built        flights  mean_delay   total",
        "Turbo-fan  before 1994   23,570        2.87    1.50",
        "Turbo-fan  (null)         4,618     0.01235    2.25",
        "Turbo-jet  before 1994   12,807      hidden  hidden",
        "1 of 4 combinations is hidden or empty: too few aircraft or carriers",
        "2 more values are hidden in the rows above",
    ]


def test_json_of_a_table_has_null_for_hidden_values_and_totals_by_rule() -> None:
    form = json.loads(json.dumps(tables.as_json(TABLE)))
    assert form["rows"][2] == ["Turbo-jet", "before 1994", 12_807, None, None]
    assert form["hidden"] == {"min_parties": 2, "min_units": 3}


def test_csv_of_a_table_has_every_combination_and_full_precision() -> None:
    lines = tables.as_csv(TABLE).splitlines()
    assert lines[0] == "engine,built,flights,mean_delay,total"
    assert lines[2] == "Turbo-fan,,4618,0.01234567,2.25"
    assert lines[4] == "Turbo-jet,,,,"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DataError("not a number", row=18, column="arr_delay"), Exit.DATA, "row 18"),
        (RefusedError("domain"), Exit.DATA, "domain"),
        (RefusedError("lost"), Exit.LOST, "join again"),
        (RefusedError("signature"), Exit.REFUSED, "signature"),
        (RefusedError("no-capacity"), Exit.UNAVAILABLE, "later"),
        (RefusedError("unknown-session"), Exit.USAGE, "session"),
        (StateError("a second roster"), Exit.REFUSED, "roster"),
        (UnavailableError("no answer"), Exit.UNAVAILABLE, "no answer"),
        (MalformedError("not a bundle"), Exit.REFUSED, "bundle"),
        (Failure("which key?"), Exit.USAGE, "which key"),
        (FileNotFoundError(2, "No such file or directory", "x.csv"), Exit.USAGE, "x.csv"),
    ],
)
def test_each_error_has_a_line_and_an_exit_code(error: Exception, code: Exit, text: str) -> None:
    message, name, found = exits.describe(error)
    assert found is code
    assert text in message
    assert name


def test_an_unforeseen_error_shows_its_type_and_no_text_of_it() -> None:
    message, _, code = exits.describe(ValueError("secret 4711"))
    assert code is Exit.INTERNAL
    assert "ValueError" in message and "4711" not in message


def test_every_stable_code_has_an_exit_code_that_is_no_success() -> None:
    assert {exits.code_of(name) for name in CODES} <= set(Exit) - {Exit.DONE, Exit.STOPPED}


def test_small_forms() -> None:
    assert console.short(bytes.fromhex("9c41" + "00" * 44 + "20aa")) == "9c41...20aa"
    assert console.session_name(bytes.fromhex("6d0288f1" + "00" * 12)) == "6d02-88f1"
    assert console.plural(1, "output") == "1 output"
    assert console.plural(1200, "party", "parties") == "1,200 parties"
    assert console.size(612_000) == "612.0 kB"
    assert console.when(1_796_638_320_000) == "7 December, 10:12 UTC"
    assert console.ago(1_000, 121_000) == "2 minutes ago"


def test_what_a_coordinator_says_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "lost\x1b]0;title\x07\x9b2J\u202egnp"
    out = console.Console()
    out.text(hostile)
    out.line("session", hostile)
    out.columns([[hostile, "x"]])
    out.note(hostile)
    shown = capsys.readouterr()
    for stream in (shown.out, shown.err):
        assert "lost?]0;title??2J?gnp" in stream
        assert all(character.isprintable() or character == "\n" for character in stream)
    assert console.when(2**63 - 1) == console.when(2**64 - 1) == "no time"
