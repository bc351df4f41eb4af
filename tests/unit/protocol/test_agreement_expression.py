"""Expressions of `where`: what is allowed, its types, and what is refused where."""

from __future__ import annotations

import pytest

from parley_protocol.agreement.expression import (
    And,
    Arithmetic,
    ColumnNode,
    Compare,
    Comparison,
    Expression,
    ExpressionError,
    IsNull,
    Kind,
    Literal,
    Membership,
    Negate,
    Not,
    Operator,
    Or,
    Rescale,
    Scope,
    ToFloat,
    parse,
    walk,
)
from parley_protocol.agreement.schema import Column, ColumnType, Table

COLUMNS = (
    Column("age", ColumnType.INT, low=0, high=120, null=True),
    Column("big", ColumnType.INT, low=-(2**62), high=2**62),
    Column("pay", ColumnType.DECIMAL, low=0, high=10_000_00, scale=2, null=True),
    Column("rate", ColumnType.FLOAT, low=0.0, high=1.0),
    Column("smoker", ColumnType.BOOL, null=True),
    Column("region", ColumnType.CATEGORY, values=("EU", "US", "92"), null=True),
    Column("home", ColumnType.CATEGORY, values=("EU", "US", "92")),
    Column("other", ColumnType.CATEGORY, values=("a",)),
    Column("day", ColumnType.DATE, low=0, high=30000),
    Column("at", ColumnType.TIMESTAMP, low=0, high=10**15),
)
PEOPLE = Table("people", ("a",), "id", 5, COLUMNS)
FIRMS = Table(
    "firms",
    ("b",),
    "id",
    1,
    (Column("size", ColumnType.INT, low=0, high=9), Column("age", ColumnType.INT, low=0, high=9)),
)
SCOPE = Scope([(PEOPLE, False), (FIRMS, True)])


def column(name: str, table: Table = PEOPLE) -> ColumnNode:
    ref = table.ref(name, left=table is FIRMS)
    assert ref is not None
    kinds = {ColumnType.DECIMAL: Kind.INT}
    return ColumnNode(ref, kinds.get(ref.column.type) or Kind(str(ref.column.type)))


def root(text: str) -> object:
    return parse(text, SCOPE).root


def integer(value: int) -> Literal:
    return Literal(value, Kind.INT)


AGE = column("age", FIRMS)
PAGE = column("age")

ACCEPTED = [
    ("people.age > 30", Compare(Comparison.GT, PAGE, integer(30))),
    ("30 <= size", Compare(Comparison.LE, integer(30), column("size", FIRMS))),
    ("pay == 10.5", Compare(Comparison.EQ, column("pay"), integer(1050))),
    ("pay > 10.505", Compare(Comparison.GT, Rescale(column("pay"), 10), integer(10505))),
    ("pay > rate", Compare(Comparison.GT, ToFloat(column("pay"), 100), column("rate"))),
    ("rate < 1", Compare(Comparison.LT, column("rate"), Literal(1.0, Kind.FLOAT))),
    ("rate < -0.1", Compare(Comparison.LT, column("rate"), Literal(-0.1, Kind.FLOAT))),
    ("rate < 1e-30", Compare(Comparison.LT, column("rate"), Literal(1e-30, Kind.FLOAT))),
    ("-size < 3", Compare(Comparison.LT, Negate(column("size", FIRMS), Kind.INT), integer(3))),
    (
        "size * 2 + firms.age > 3",
        Compare(
            Comparison.GT,
            Arithmetic(
                Operator.ADD,
                Arithmetic(Operator.MUL, column("size", FIRMS), integer(2), Kind.INT),
                AGE,
                Kind.INT,
            ),
            integer(3),
        ),
    ),
    (
        "0 < size < 5",
        And(
            (
                Compare(Comparison.LT, integer(0), column("size", FIRMS)),
                Compare(Comparison.LT, column("size", FIRMS), integer(5)),
            )
        ),
    ),
    ("region == 'EU'", Compare(Comparison.EQ, column("region"), Literal(1, Kind.CATEGORY))),
    ("'92' != region", Compare(Comparison.NE, Literal(3, Kind.CATEGORY), column("region"))),
    ("region == home", Compare(Comparison.EQ, column("region"), column("home"))),
    ("region in ['EU', '92']", Membership(column("region"), (1, 3), False)),
    ("region not in ('EU',)", Membership(column("region"), (1,), True)),
    ("size in [1, 2]", Membership(column("size", FIRMS), (1, 2), False)),
    ("pay in [1, 2.5]", Membership(column("pay"), (100, 250), False)),
    ("size in [1.5]", Membership(Rescale(column("size", FIRMS), 10), (15,), False)),
    ("rate in [1, 0.5]", Membership(column("rate"), (1.0, 0.5), False)),
    ("smoker in [true]", Membership(column("smoker"), (1,), False)),
    ("day >= '2000-01-01'", Compare(Comparison.GE, column("day"), Literal(10957, Kind.DATE))),
    ("at < '2000-01-01T00:00:00Z'", Compare(Comparison.LT, column("at"), Literal(946684800000000, Kind.TIMESTAMP))),
    ("region is null", IsNull(column("region"), False)),
    ("region is not null", IsNull(column("region"), True)),
    ("size + 1 is null", None),
    ("smoker", column("smoker")),
    ("not smoker", Not(column("smoker"))),
    ("smoker == true", Compare(Comparison.EQ, column("smoker"), Literal(1, Kind.BOOL))),
    ("smoker == False", Compare(Comparison.EQ, column("smoker"), Literal(0, Kind.BOOL))),
    ("smoker and size > 1 or not smoker", None),
    ("smoker or true", Or((column("smoker"), Literal(1, Kind.BOOL)))),
    ("  size   > 1 ", Compare(Comparison.GT, column("size", FIRMS), integer(1))),
]


@pytest.mark.parametrize(("text", "tree"), ACCEPTED, ids=[case[0] for case in ACCEPTED])
def test_accepted(text: str, tree: object) -> None:
    found = root(text)
    assert tree is None or found == tree


REFUSED = [
    ("", 0, "is not an expression"),
    ("size >", None, "is not an expression"),
    ("size", 0, "is not a condition"),
    ("1", 0, "is not a condition"),
    ("age > 1", 0, "column 'age' is in more than one table: write people.age or firms.age"),
    ("id == 1", 0, "'id' is the key of people"),
    ("sizes > 1", 0, "no column 'sizes' (did you mean 'size'?)"),
    ("firm.size > 1", 0, "no table 'firm' in this output (did you mean 'firms'?)"),
    ("a.b.c > 1", 0, "is not a column"),
    ("size / 2 > 1", 0, "only + - *"),
    ("size ** 2 > 1", 0, "only + - *"),
    ("size % 2 > 1", 0, "only + - *"),
    ("~size > 1", 0, "this operator is not allowed"),
    ("+size > 1", 0, "this operator is not allowed"),
    ("abs(size) > 1", 0, "a function call is not allowed"),
    ("size > 1 if smoker else smoker", 0, "if ... else is not allowed"),
    ("[size] == 1", 0, "a list is not allowed"),
    ("region[0] == 'E'", 0, "an index is not allowed"),
    ("lambda: 1", 0, "a lambda is not allowed"),
    ("f'{size}' == 'x'", 0, "an f-string is not allowed"),
    ("b'x' == region", 0, "is not a number, a text or a truth value"),
    ("1j == size", 0, "is not a number, a text or a truth value"),
    ("... == size", 0, "is not a number, a text or a truth value"),
    ("(x := size) > 1", 3, "':=' is not allowed here"),
    ("size > 1 # really", 9, "'#' is not allowed here"),
    ("region == 'E\\x55'", 12, "is not allowed here"),
    ("size > 1\nor smoker", 8, "is not allowed here"),
    ("size == null", 8, "null is compared by `is null`"),
    ("size is None", 8, "after `is` stands null or not null"),
    ("size is 1", 8, "after `is` stands null or not null"),
    ("size > None", 7, "None is written null"),
    ("1 is null", 0, "a literal is never null"),
    ("'a' == 'b'", 0, "compares two texts"),
    ("region == 'XX'", 10, "'XX' is not in the domain"),
    ("region == 92", 0, "compares a category with a int: values of a category are written in quotes"),
    ("region < 'EU'", 0, "values of a category have no order"),
    ("region == other", 0, "compares two categories with different domains"),
    ("smoker < true", 0, "values of a bool have no order"),
    ("smoker == 1", 0, "compares a bool with a int"),
    ("smoker == 'EU'", 10, "a text can be compared with a category, a date or a timestamp alone"),
    ("size == 'EU'", 8, "a text can be compared with a category, a date or a timestamp alone"),
    ("day == '2000-13-01'", 7, "is not a date"),
    ("day == 5", 0, "compares a date with a int"),
    ("at > day", 0, "compares a timestamp with a date"),
    ("region + 1 > 1", 0, "is not a number"),
    ("'a' + 1 > 1", 0, "is not a number"),
    ("-smoker", 1, "is not a number"),
    ("size in 5", 8, "after `in` stands a list of values"),
    ("size in []", 8, "after `in` stands a list of values"),
    ("size in [size]", 9, "is not a literal"),
    ("size in ['a']", 9, "is not a value of a int"),
    ("size in [null]", 9, "null is compared by"),
    ("1 in [1]", 0, "before `in` stands a literal"),
    ("region in [1]", 11, "is not a text"),
    ("region in ['EU', 'XX']", 17, "'XX' is not in the domain"),
    ("big * big > 1", 0, "may not fit 64 bits"),
    ("big + big + big > 1", 0, "may not fit 64 bits"),
    ("big > 0.01", 0, "may not fit 64 bits"),
    ("not size", 4, "is not a condition"),
    ("smoker and size", 11, "is not a condition"),
    ("1e200 > rate", 0, "the number is too large"),
    ("size > " + "9" * 5000, 1000, "longer than 1000 characters"),
    ("not " * 100 + "smoker", None, "nested deeper than 64"),
    ("(" * 300 + "smoker" + ")" * 300, None, "is not an expression"),
    ("-" * 900 + "size > 1", None, ""),
    ("'é' == region and sizes > 1", 18, "no column 'sizes'"),
]


@pytest.mark.parametrize(("text", "offset", "message"), REFUSED, ids=[case[0][:30] for case in REFUSED])
def test_refused(text: str, offset: int | None, message: str) -> None:
    scope = SCOPE
    if "é" in text:
        column = Column("region", ColumnType.CATEGORY, values=("é",))
        scope = Scope(
            [(Table("people", ("a",), "id", 5, (column, Column("size", ColumnType.INT, low=0, high=1))), False)]
        )
    with pytest.raises(ExpressionError) as caught:
        parse(text, scope)
    assert message in caught.value.message
    if offset is not None:
        assert caught.value.offset == offset


def test_a_column_of_a_left_join_may_be_null() -> None:
    (ref,) = parse("size > 1", SCOPE).refs
    assert ref.nullable
    assert not ref.column.null


NEVER_NULL = [
    ("region is not null", {"region"}),
    ("region is not null and smoker is not null", {"region", "smoker"}),
    ("region is not null or smoker is not null", set()),
    ("region is null", set()),
    ("not region is null", {"region"}),
    ("not (region is null or smoker is null)", {"region", "smoker"}),
    ("not (region is null and smoker is null)", set()),
    ("not region is not null", set()),
    ("region == 'EU'", {"region"}),
    ("not region == 'EU'", {"region"}),
    ("pay + people.age > 1", {"pay", "age"}),
    ("smoker", {"smoker"}),
    ("smoker or true", set()),
    ("(region == 'EU' and smoker) or region == 'US'", {"region"}),
    # Inside a comparison of truth values `is null` still sees nulls, and `or` gets over them.
    ("(pay > 1) == (region is null)", {"pay"}),
    ("(region is null) in [true]", set()),
    ("(pay > 1 or true) == true", set()),
    ("(pay > 1 or pay < 0) == smoker", {"pay", "smoker"}),
    ("(pay > 1 or true) is not null", set()),
    ("not ((region is null) is null)", set()),
]


@pytest.mark.parametrize(("text", "columns"), NEVER_NULL, ids=[case[0] for case in NEVER_NULL])
def test_columns_that_a_condition_leaves_without_nulls(text: str, columns: set[str]) -> None:
    assert {ref.column.name for ref in parse(text, SCOPE).never_null} == columns


def test_refs_are_listed_once() -> None:
    expression = parse("pay > 1 and pay < 10 or smoker", SCOPE)
    assert isinstance(expression, Expression)
    assert [ref.text for ref in expression.refs] == ["people.pay", "people.smoker"]
    assert len(list(walk(expression.root))) == 9
