"""Properties of agreements: one canonical form each; a parser accepts or raises MalformedError; expressions never crash."""

from __future__ import annotations

import string
from datetime import date

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from parley.agreements import parse_source, parse_yaml, show
from parley_protocol.agreement.canonical import parse
from parley_protocol.agreement.expression import Compare, Expression, ExpressionError, Scope, walk
from parley_protocol.agreement.expression import parse as parse_expression
from parley_protocol.agreement.model import LABEL, Agreement
from parley_protocol.agreement.schema import NUMERIC, Column, ColumnType, Table, physical, text_of
from parley_protocol.agreement.signed import SignedAgreement
from parley_protocol.agreement.source import Tree, build
from parley_protocol.encoding import Value, decode, encode
from parley_protocol.errors import AgreementError, MalformedError
from parley_protocol.identity import PublicIdentity, dump_public, load_private, load_public
from support.agreements import agreement, identity, read

CANONICAL = [agreement("flights").canonical, agreement("pay").canonical]

NAMES = st.text(string.ascii_letters + "éß中_", min_size=1, max_size=12).filter(str.isidentifier)
BOUNDS = st.integers(-(10**6), 10**6)


def _plain(name: str) -> bool:
    return name not in ("null", "true", "false", "id") and not _keyword(name)


def _keyword(name: str) -> bool:
    import keyword

    return keyword.iskeyword(name)


@st.composite
def columns(draw: st.DrawFn) -> dict[str, Tree]:
    kind = draw(st.sampled_from(list(ColumnType)))
    column: dict[str, Tree] = {"type": str(kind), "null": draw(st.sampled_from(["true", "false"]))}
    low = draw(BOUNDS)
    high = draw(st.integers(low + 1, low + 10**6))
    if kind is ColumnType.INT:
        column |= {"min": str(low), "max": str(high)}
    elif kind is ColumnType.FLOAT:
        column |= {"min": repr(low / 8), "max": repr(high / 8)}
    elif kind is ColumnType.DECIMAL:
        scale = draw(st.integers(0, 6))
        column |= {"scale": str(scale), "min": text_of(kind, low, scale), "max": text_of(kind, high, scale)}
    elif kind is ColumnType.CATEGORY:
        column["values"] = draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    return column


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Tree]:
    parties = [f"party{number}" for number in range(draw(st.integers(4, 6)))]
    schema = {
        name: draw(columns()) for name in draw(st.lists(NAMES.filter(_plain), min_size=1, max_size=5, unique=True))
    }
    values: dict[str, Tree] = {"n": "count", "u": "units"}
    by: dict[str, Tree] = {}
    for number, (name, column) in enumerate(schema.items()):
        kind = ColumnType(str(column["type"]))
        if kind in NUMERIC:
            function = draw(st.sampled_from(["count", "sum", "mean", "variance", "std"]))
            values[f"v{number}"] = f"{function}({name})"
            if draw(st.booleans()):
                by[f"b{number}"] = {"bin": name, "edges": [column["max"]]}
        elif kind in (ColumnType.CATEGORY, ColumnType.BOOL):
            by[f"b{number}"] = name
    return {
        "parley": "1",
        "version": "1",
        "title": draw(NAMES),
        "purpose": "A test.",
        "expires": draw(st.dates(date(2000, 1, 1), date(2900, 1, 1))).isoformat(),
        "platform": "simulated",
        "root": "simulated-root.pem",
        "measurements": "measurements.json",
        "members": {name: f"keys/{name}.pub" for name in parties},
        "unit": {"name": draw(NAMES)},
        "tables": {
            "rows": {"from": parties, "key": "id", "rows_per_unit": str(draw(st.integers(1, 9))), "columns": schema}
        },
        "outputs": {"all": {"from": "rows", "by": by, "values": values, "to": draw(st.sampled_from(parties))}},
        "rules": {"everyone": {"min_units": str(draw(st.integers(2, 99))), "min_parties": "3"}},
        "session": {"start": parties[0], "deadline": draw(st.sampled_from(["1 second", "36 hours", "2 weeks"]))},
    }


@settings(max_examples=60)
@given(trees())
def test_the_canonical_form_round_trips(tree: dict[str, Tree]) -> None:
    found = build(tree, read)
    again = parse(found.canonical)
    assert again == found
    assert again.digest == found.digest
    assert {name: table.schema_digest for name, table in again.tables.items()} == {
        name: table.schema_digest for name, table in found.tables.items()
    }
    assert [output.by for output in again.outputs.values()] == [output.by for output in found.outputs.values()]


@settings(max_examples=30)
@given(trees())
def test_what_is_shown_can_be_read_and_says_the_same(tree: dict[str, Tree]) -> None:
    found = build(tree, read)
    shown, _ = parse_yaml(show(found).encode())
    assert isinstance(shown, dict)
    assert build({**shown, **{name: tree[name] for name in ("members", "root", "measurements")}}, read) == found


def accepts_or_malformed(data: bytes) -> None:
    try:
        found = parse(data)
    except MalformedError:
        return
    assert found.canonical == data


@settings(max_examples=150)
@given(st.sampled_from(CANONICAL), st.integers(0, 2**20), st.binary(min_size=0, max_size=3), st.integers(0, 3))
def test_mutated_bytes_are_refused_or_canonical(data: bytes, place: int, patch: bytes, removed: int) -> None:
    place %= len(data)
    accepts_or_malformed(data[:place] + patch + data[place + removed :])


def _paths(value: Value, path: tuple[int | str, ...] = ()) -> list[tuple[int | str, ...]]:
    found = [path]
    if isinstance(value, list):
        for number, item in enumerate(value):
            found += _paths(item, (*path, number))
    elif isinstance(value, dict):
        for key, item in value.items():
            found += _paths(item, (*path, key))
    return found


def _replaced(value: Value, path: tuple[int | str, ...], new: Value) -> Value:
    if not path:
        return new
    if isinstance(value, list):
        assert isinstance(path[0], int)
        return [_replaced(item, path[1:], new) if number == path[0] else item for number, item in enumerate(value)]
    assert isinstance(value, dict)
    return {key: _replaced(item, path[1:], new) if key == path[0] else item for key, item in value.items()}  # type: ignore[return-value]


FORMS = [decode(data) for data in CANONICAL]
PLACES = [(number, path) for number, form in enumerate(FORMS) for path in _paths(form)]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.binary(max_size=4)
    | st.sampled_from([bytes(32), bytes(48), b"\x01" * 48])
    | st.text(max_size=8)
    | st.sampled_from(
        ["all", "everyone", "1e5", "-0", "2013-01-01", "9E", "count", "int", "category", "flights", "engine"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400)
@given(st.sampled_from(PLACES), VALUES)
@example((0, (1, "title")), "flights-by-engine")
def test_a_form_with_one_part_replaced_is_refused_or_canonical(
    place: tuple[int, tuple[int | str, ...]], new: Value
) -> None:
    number, path = place
    try:
        data = encode(_replaced(FORMS[number], path, new))
    except MalformedError:
        assume(False)
    accepts_or_malformed(data)


@settings(max_examples=200)
@given(VALUES)
@example({"[": 1, "a[": 2, "a.\n": 3, "]": 4, ".": 5})
def test_any_value_under_the_label_is_refused(value: Value) -> None:
    accepts_or_malformed(encode([LABEL, value]))


@settings(max_examples=200)
@given(
    st.recursive(
        st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    )
)
def test_any_tree_is_an_agreement_or_an_agreement_error(tree: Tree) -> None:
    try:
        build(tree, read)
    except AgreementError:
        return
    raise AssertionError("nothing so small is an agreement")


@settings(max_examples=300)
@given(st.binary(max_size=60) | st.text("abc:-[]{}&*!<>|'\"\n #,?%@`~\x00\t", max_size=40).map(str.encode))
@example(b"a: &x [*x]")
@example(b"? ")
@example(b"%YAML 9.9\n---\na: b")
def test_any_bytes_are_yaml_or_an_agreement_error(data: bytes) -> None:
    try:
        tree, lines = parse_yaml(data)
    except AgreementError:
        return
    assert all(line >= 1 for line in lines.values())
    assert isinstance(tree, str | list | dict)


COLUMNS = (
    Column("a", ColumnType.INT, low=-5, high=10**12, null=True),
    Column("d", ColumnType.DECIMAL, low=0, high=10**9, scale=2),
    Column("f", ColumnType.FLOAT, low=0.0, high=1.0),
    Column("b", ColumnType.BOOL),
    Column("c", ColumnType.CATEGORY, values=("x", "y")),
    Column("t", ColumnType.DATE, low=0, high=9),
)
SCOPE = Scope([(Table("rows", ("p",), "id", 1, COLUMNS), False)])
TOKENS = (
    "a d f b c t rows.a id null true None and or not in is == != < <= > >= + - * / ** % ( ) [ ] , 'x' 'z' '1970-01-02' "
    "1 2.5 1e9 0x1F 1_0 99999999999999999999 . : { } @ ~ lambda if else await := \\ # é \n"
).split(" ")


@settings(max_examples=600)
@given(st.lists(st.sampled_from(TOKENS), max_size=14).map(" ".join) | st.text(max_size=40))
@example("a" + "+a" * 400 + ">1")
@example("(" * 199 + "a" + ")" * 199)
@example("a if" * 200)
@example("1or b")
def test_any_text_is_a_condition_or_an_expression_error(text: str) -> None:
    try:
        found = parse_expression(text, SCOPE)
    except ExpressionError as error:
        assert 0 <= error.offset <= max(len(text), 1)
        assert error.message
        return
    assert isinstance(found, Expression)
    assert found.root.kind == "bool"
    for node in walk(found.root):
        if isinstance(node, Compare):
            assert node.left.kind == node.right.kind
    assert parse_expression(found.text, SCOPE) == found
    assert found.never_null <= set(found.refs)


@given(st.sampled_from([kind for kind in ColumnType if kind not in (ColumnType.BOOL, ColumnType.CATEGORY)]), st.data())
def test_physical_values_have_one_text(kind: ColumnType, data: st.DataObject) -> None:
    scale = data.draw(st.integers(0, 18)) if kind is ColumnType.DECIMAL else 0
    values: dict[ColumnType, st.SearchStrategy[int | float]] = {
        ColumnType.FLOAT: st.floats(-1e100, 1e100),
        ColumnType.DATE: st.integers(-719162, 2932896),
        ColumnType.TIMESTAMP: st.integers(-719162 * 86_400_000_000, 2932896 * 86_400_000_000),
    }
    value = data.draw(values.get(kind, st.integers(-(2**63) + 1, 2**63 - 1)))
    text = text_of(kind, value, scale)
    assert physical(kind, text, scale) == value


@settings(max_examples=200)
@given(st.integers(0, 10**6), st.binary(max_size=3), st.integers(0, 3), st.booleans())
def test_mutated_identities_are_refused_or_identities(place: int, patch: bytes, removed: int, pem: bool) -> None:
    public = identity("a").public
    data = dump_public(public) if pem else public.to_bytes()
    place %= len(data)
    changed = data[:place] + patch + data[place + removed :]
    for load in (load_public, load_private, PublicIdentity.from_bytes, SignedAgreement.from_bytes):
        try:
            load(changed)  # type: ignore[operator]
        except MalformedError:
            continue


def test_the_demos_are_agreements() -> None:
    from support.agreements import yaml_text

    for name in ("flights", "pay"):
        assert isinstance(parse_source(yaml_text(name).encode(), read), Agreement)
