"""Expressions of `where`: a small part of Python's syntax, typed against the tables that an output reads.

What is allowed: columns (`year`, or `planes.year` where two tables have one), numbers, 'texts', true, false;
+ - * and unary minus; == != < <= > >=, chained too; `in` and `not in` a list of literals; `is null`, `is not null`;
and, or, not. Anything else is an ExpressionError with the place in the text.

The logic is SQL's: a comparison with null is unknown, `unknown and false` is false, `unknown or true` is true, `not unknown`
is unknown, and a filter keeps what is true. Only `is null` and `is not null` see a null.

The result is a tree of the classes here, for a vectorised evaluator that needs no types of its own: both sides of a node
have the same kind and scale already. Integers and decimals are exact in 64 bits: whatever could overflow is refused here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import StrEnum
from typing import Final, TypeAlias

from parley_protocol import limits
from parley_protocol.agreement.schema import ColumnRef, ColumnType, Physical, Table


class ExpressionError(ValueError):
    """An expression that is not allowed or not of the right types; `offset` is the place of it in the text (0..)."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset


class Kind(StrEnum):
    """What a node yields, as arrays: INT (i64; also decimals times 10^scale), FLOAT (f64), BOOL, CATEGORY (codes), DATE
    (i32 days), TIMESTAMP (i64 microseconds); each with its nulls."""

    INT = "int"
    FLOAT = "float"
    BOOL = "bool"
    CATEGORY = "category"
    DATE = "date"
    TIMESTAMP = "timestamp"


class Comparison(StrEnum):
    """Operators of Compare."""

    EQ = "=="
    NE = "!="
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="


class Operator(StrEnum):
    """Operators of Arithmetic."""

    ADD = "+"
    SUB = "-"
    MUL = "*"


@dataclass(frozen=True, slots=True)
class ColumnNode:
    """A column's values. A decimal column yields its scaled integers, a bool column BOOL."""

    ref: ColumnRef
    kind: Kind


@dataclass(frozen=True, slots=True)
class Literal:
    """A constant, never null: an integer (scaled, a code, days, microseconds), a float, or 0 and 1 of BOOL."""

    value: Physical
    kind: Kind


@dataclass(frozen=True, slots=True)
class Rescale:
    """An INT times a power of ten, which cannot overflow."""

    operand: Node
    factor: int
    kind: Kind = Kind.INT


@dataclass(frozen=True, slots=True)
class ToFloat:
    """An INT as a float, divided by a power of ten (its scale)."""

    operand: Node
    divisor: int
    kind: Kind = Kind.FLOAT


@dataclass(frozen=True, slots=True)
class Negate:
    """The negative of an INT or a FLOAT."""

    operand: Node
    kind: Kind


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Two INTs or two FLOATs; null where either is."""

    operator: Operator
    left: Node
    right: Node
    kind: Kind


@dataclass(frozen=True, slots=True)
class Compare:
    """Two nodes of one kind; of CATEGORY and BOOL only == and !=. Unknown where either is null."""

    operator: Comparison
    left: Node
    right: Node
    kind: Kind = Kind.BOOL


@dataclass(frozen=True, slots=True)
class Membership:
    """Whether the operand is one of `values`, physical values of its kind. Unknown where it is null."""

    operand: Node
    values: tuple[Physical, ...]
    negated: bool
    kind: Kind = Kind.BOOL


@dataclass(frozen=True, slots=True)
class IsNull:
    """Whether the operand is null; always known."""

    operand: Node
    negated: bool
    kind: Kind = Kind.BOOL


@dataclass(frozen=True, slots=True)
class And:
    """Of BOOLs: false where any is false, else unknown where any is."""

    operands: tuple[Node, ...]
    kind: Kind = Kind.BOOL


@dataclass(frozen=True, slots=True)
class Or:
    """Of BOOLs: true where any is true, else unknown where any is."""

    operands: tuple[Node, ...]
    kind: Kind = Kind.BOOL


@dataclass(frozen=True, slots=True)
class Not:
    """Of a BOOL; unknown stays unknown."""

    operand: Node
    kind: Kind = Kind.BOOL


Node: TypeAlias = (
    ColumnNode | Literal | Rescale | ToFloat | Negate | Arithmetic | Compare | Membership | IsNull | And | Or | Not
)


@dataclass(frozen=True, slots=True)
class Expression:
    """A condition: the author's `text` and the typed tree of it, which yields BOOL."""

    text: str
    root: Node

    @property
    def refs(self) -> tuple[ColumnRef, ...]:
        """The columns it reads, each once."""
        found: dict[ColumnRef, None] = {}
        for node in walk(self.root):
            if isinstance(node, ColumnNode):
                found[node.ref] = None
        return tuple(found)

    @property
    def never_null(self) -> frozenset[ColumnRef]:
        """The columns that are not null in any row for which this is true."""
        return _known(self.root, True)


def _known(node: Node, truth: bool) -> frozenset[ColumnRef]:
    """The columns that are not null wherever `node` is known to be `truth`."""
    if isinstance(node, Not):
        return _known(node.operand, not truth)
    if isinstance(node, And | Or):
        sets = [_known(operand, truth) for operand in node.operands]
        every = isinstance(node, And) is truth
        return frozenset[ColumnRef]().union(*sets) if every else sets[0].intersection(*sets[1:])
    if isinstance(node, IsNull):
        return _strict(node.operand) if node.negated is truth else frozenset()
    return _strict(node)


def _strict(node: Node) -> frozenset[ColumnRef]:
    """The columns that make `node` null wherever they are: `is null` sees a null, and `or` and `and` may get over it."""
    if isinstance(node, ColumnNode):
        return frozenset((node.ref,))
    if isinstance(node, IsNull | Literal):
        return frozenset()
    if isinstance(node, And | Or):
        sets = [_strict(operand) for operand in node.operands]
        return sets[0].intersection(*sets[1:])
    below = (node.left, node.right) if isinstance(node, Arithmetic | Compare) else (node.operand,)
    return frozenset[ColumnRef]().union(*(_strict(child) for child in below))


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it."""
    yield node
    if isinstance(node, And | Or):
        below: Sequence[Node] = node.operands
    elif isinstance(node, Arithmetic | Compare):
        below = (node.left, node.right)
    elif isinstance(node, ColumnNode | Literal):
        below = ()
    else:
        below = (node.operand,)
    for child in below:
        yield from walk(child)


class Scope:
    """The columns that an output may read, by name, and by table and name where a name stands in two of them."""

    def __init__(self, tables: Sequence[tuple[Table, bool]]) -> None:
        """`tables`: each with whether it is joined by a left join."""
        self._tables: Mapping[str, tuple[Table, bool]] = {table.name: (table, left) for table, left in tables}

    def resolve(self, name: str, table: str | None = None) -> ColumnRef:
        """The column; KeyError with a reason for people where there is none or more than one."""
        if table is not None and table not in self._tables:
            raise KeyError(f"no table {table!r} in this output" + nearest(table, self._tables))
        searched = self._tables.values() if table is None else [self._tables[table]]
        found = [ref for each, left in searched if (ref := each.ref(name, left=left)) is not None]
        if len(found) == 1:
            return found[0]
        if found:
            places = " or ".join(ref.text for ref in found)
            raise KeyError(f"column {name!r} is in more than one table: write {places}")
        keys = [each.name for each, _ in searched if each.key == name]
        if keys:
            raise KeyError(f"{name!r} is the key of {keys[0]}, which no output may read")
        names = [column.name for each, _ in searched for column in each.columns]
        raise KeyError(f"no column {name!r}" + nearest(name, names))

    def resolve_text(self, text: str) -> ColumnRef:
        """The column that `name` or `table.name` writes; KeyError as `resolve`."""
        table, dot, name = text.partition(".")
        return self.resolve(name, table) if dot else self.resolve(text)


def nearest(name: str, names: Sequence[str] | Mapping[str, object]) -> str:
    """ " (did you mean 'x'?)", or nothing where no name is near."""
    # Bounded, because the texts come from others and the search takes time with the square of the length.
    from difflib import get_close_matches

    found = get_close_matches(name[: limits.NAME_BYTES], list(names)[: limits.COLUMNS], 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def parse(text: str, scope: Scope) -> Expression:
    """The condition that `text` writes; ExpressionError for anything else."""
    if len(text) > limits.EXPRESSION_CHARACTERS:
        raise ExpressionError(f"longer than {limits.EXPRESSION_CHARACTERS} characters", limits.EXPRESSION_CHARACTERS)
    for forbidden in _FORBIDDEN.finditer(text):
        raise ExpressionError(f"{forbidden.group()!r} is not allowed here", forbidden.start())
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ExpressionError("is not an expression", max(0, (error.offset or 1) - 1)) from None
    except (ValueError, RecursionError, MemoryError):
        raise ExpressionError("is not an expression", 0) from None
    typed = _Typing(text.strip(), scope).node(tree, 0)
    if typed.node.kind is not Kind.BOOL:
        raise ExpressionError("is not a condition: it yields no truth value", 0)
    return Expression(text.strip(), typed.node)


_FORBIDDEN: Final = re.compile(r"[\\#\x00-\x1f\x7f]|:=")
_COMPARISONS: Final[dict[type[ast.cmpop], Comparison]] = {
    ast.Eq: Comparison.EQ,
    ast.NotEq: Comparison.NE,
    ast.Lt: Comparison.LT,
    ast.LtE: Comparison.LE,
    ast.Gt: Comparison.GT,
    ast.GtE: Comparison.GE,
}
_OPERATORS: Final[dict[type[ast.operator], Operator]] = {
    ast.Add: Operator.ADD,
    ast.Sub: Operator.SUB,
    ast.Mult: Operator.MUL,
}
_KINDS: Final = {
    ColumnType.INT: Kind.INT,
    ColumnType.DECIMAL: Kind.INT,
    ColumnType.FLOAT: Kind.FLOAT,
    ColumnType.BOOL: Kind.BOOL,
    ColumnType.CATEGORY: Kind.CATEGORY,
    ColumnType.DATE: Kind.DATE,
    ColumnType.TIMESTAMP: Kind.TIMESTAMP,
}
_CONSTANTS: Final = {"true": True, "false": False, "null": None}
RESERVED: Final = frozenset(_CONSTANTS)
"""Names that no column may have, since they mean something in expressions."""


@dataclass(frozen=True, slots=True)
class _Typed:
    """A node, the scale of an INT, the range of a number (None: any), and the text of a literal without a type yet."""

    node: Node
    scale: int = 0
    low: int = 0
    high: int = 0
    text: str | None = None


class _Typing:
    """The walk over Python's tree: everything that is not named here is refused."""

    def __init__(self, text: str, scope: Scope) -> None:
        self.text = text
        self.scope = scope

    def fail(self, message: str, node: ast.AST) -> ExpressionError:
        # Python counts bytes of UTF-8; people count characters.
        offset = len(self.text.encode()[: getattr(node, "col_offset", 0)].decode(errors="ignore"))
        return ExpressionError(message, offset)

    def node(self, tree: ast.expr, depth: int) -> _Typed:
        if depth > limits.EXPRESSION_DEPTH:
            raise self.fail(f"nested deeper than {limits.EXPRESSION_DEPTH}", tree)
        if isinstance(tree, ast.BoolOp):
            operands = tuple(self.truth(operand, depth) for operand in tree.values)
            return _Typed(And(operands) if isinstance(tree.op, ast.And) else Or(operands))
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Not):
            return _Typed(Not(self.truth(tree.operand, depth)))
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            return self.negate(tree, depth)
        if isinstance(tree, ast.BinOp):
            return self.arithmetic(tree, depth)
        if isinstance(tree, ast.Compare):
            return self.comparison(tree, depth)
        if isinstance(tree, ast.Constant):
            return self.constant(tree)
        if isinstance(tree, ast.Name | ast.Attribute):
            return self.name(tree)
        raise self.fail(f"{_called(tree)} is not allowed", tree)

    def truth(self, tree: ast.expr, depth: int) -> Node:
        node = self.node(tree, depth + 1).node
        if node.kind is not Kind.BOOL:
            raise self.fail("is not a condition: it yields no truth value", tree)
        return node

    def name(self, tree: ast.Name | ast.Attribute) -> _Typed:
        if isinstance(tree, ast.Attribute):
            if not isinstance(tree.value, ast.Name):
                raise self.fail("is not a column", tree)
            wanted: tuple[str, str | None] = tree.attr, tree.value.id
        elif tree.id == "null":
            raise self.fail("null is compared by `is null` and `is not null` alone", tree)
        elif tree.id in _CONSTANTS:
            return _Typed(Literal(int(tree.id == "true"), Kind.BOOL))
        else:
            wanted = tree.id, None
        try:
            ref = self.scope.resolve(*wanted)
        except KeyError as error:
            raise self.fail(str(error.args[0]), tree) from None
        column = ref.column
        typed = _Typed(ColumnNode(ref, _KINDS[column.type]), column.scale)
        if _KINDS[column.type] is Kind.INT:
            assert isinstance(column.low, int) and isinstance(column.high, int)
            return replace(typed, low=column.low, high=column.high)
        return typed

    def constant(self, tree: ast.Constant) -> _Typed:
        if type(tree.value) is bool:
            return _Typed(Literal(int(tree.value), Kind.BOOL))
        if type(tree.value) is str:
            # The other side says what the text is; CATEGORY is a placeholder until then.
            return _Typed(Literal(0, Kind.CATEGORY), text=tree.value)
        if type(tree.value) not in (int, float):
            raise self.fail(
                "None is written null" if tree.value is None else "is not a number, a text or a truth value", tree
            )
        try:
            number = Decimal((ast.get_source_segment(self.text, tree) or "").replace("_", ""))
        except ArithmeticError:
            raise self.fail("is not a decimal number", tree) from None
        return self.number(number, tree)

    def number(self, number: Decimal, tree: ast.expr) -> _Typed:
        exponent = number.as_tuple().exponent
        assert isinstance(exponent, int)
        scale = max(0, -exponent)
        if scale <= limits.DECIMAL_SCALE and number.adjusted() <= 18:
            scaled = int(number.scaleb(scale))
            if abs(scaled) <= limits.INT_BOUND:
                return _Typed(Literal(scaled, Kind.INT), scale, scaled, scaled)
        value = float(number)
        if not abs(value) <= limits.FLOAT_BOUND:
            raise self.fail("the number is too large", tree)
        return _Typed(Literal(value, Kind.FLOAT))

    def negate(self, tree: ast.UnaryOp, depth: int) -> _Typed:
        operand = self.node(tree.operand, depth + 1)
        self.numeric(operand, tree.operand)
        if isinstance(operand.node, Literal):
            node: Node = replace(operand.node, value=-operand.node.value)
        else:
            node = Negate(operand.node, operand.node.kind)
        return _Typed(node, operand.scale, -operand.high, -operand.low)

    def numeric(self, typed: _Typed, tree: ast.expr) -> None:
        if typed.text is not None or typed.node.kind not in (Kind.INT, Kind.FLOAT):
            raise self.fail("is not a number", tree)

    def arithmetic(self, tree: ast.BinOp, depth: int) -> _Typed:
        operator = _OPERATORS.get(type(tree.op))
        if operator is None:
            raise self.fail("of the operators only + - * are allowed", tree)
        left, right = self.node(tree.left, depth + 1), self.node(tree.right, depth + 1)
        self.numeric(left, tree.left)
        self.numeric(right, tree.right)
        if Kind.FLOAT in (left.node.kind, right.node.kind):
            return _Typed(Arithmetic(operator, _float(left), _float(right), Kind.FLOAT))
        if operator is Operator.MUL:
            products = [a * b for a in (left.low, left.high) for b in (right.low, right.high)]
            scale, low, high = left.scale + right.scale, min(products), max(products)
        else:
            left, right = self.align(left, right, tree)
            scale = left.scale
            if operator is Operator.ADD:
                low, high = left.low + right.low, left.high + right.high
            else:
                low, high = left.low - right.high, left.high - right.low
        if scale > limits.DECIMAL_SCALE:
            raise self.fail(f"has more than {limits.DECIMAL_SCALE} digits after the point", tree)
        node = Arithmetic(operator, left.node, right.node, Kind.INT)
        return self.fits(_Typed(node, scale, low, high), tree)

    def align(self, left: _Typed, right: _Typed, tree: ast.expr) -> tuple[_Typed, _Typed]:
        scale = max(left.scale, right.scale)
        return self.rescale(left, scale, tree), self.rescale(right, scale, tree)

    def rescale(self, typed: _Typed, scale: int, tree: ast.expr) -> _Typed:
        factor = 10 ** (scale - typed.scale)
        if factor == 1:
            return typed
        node: Node = Rescale(typed.node, factor)
        if isinstance(typed.node, Literal):
            node = replace(typed.node, value=typed.node.value * factor)
        return self.fits(_Typed(node, scale, typed.low * factor, typed.high * factor), tree)

    def fits(self, typed: _Typed, tree: ast.expr) -> _Typed:
        if max(abs(typed.low), abs(typed.high)) > limits.INT_BOUND:
            raise self.fail("may not fit 64 bits: give the columns narrower ranges", tree)
        return typed

    def comparison(self, tree: ast.Compare, depth: int) -> _Typed:
        parts: list[Node] = []
        left = tree.left
        for operator, right in zip(tree.ops, tree.comparators, strict=True):
            parts.append(self.compare(left, operator, right, depth + 1))
            left = right
        return _Typed(parts[0] if len(parts) == 1 else And(tuple(parts)))

    def compare(self, left: ast.expr, operator: ast.cmpop, right: ast.expr, depth: int) -> Node:
        if isinstance(operator, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Name) and right.id == "null"):
                raise self.fail("after `is` stands null or not null", right)
            operand = self.node(left, depth)
            if operand.text is not None or isinstance(operand.node, Literal):
                raise self.fail("a literal is never null", left)
            return IsNull(operand.node, isinstance(operator, ast.IsNot))
        if isinstance(operator, ast.In | ast.NotIn):
            return self.membership(left, right, isinstance(operator, ast.NotIn), depth)
        first, second = self.node(left, depth), self.node(right, depth)
        if first.text is not None and second.text is not None:
            raise self.fail("compares two texts", left)
        first, second = self.typed_text(first, second, left), self.typed_text(second, first, right)
        kinds = {first.node.kind, second.node.kind}
        comparison = _COMPARISONS[type(operator)]
        if kinds == {Kind.INT, Kind.FLOAT}:
            return Compare(comparison, _float(first), _float(second))
        if kinds == {Kind.INT}:
            first, second = self.align(first, second, left)
        if len(kinds) != 1:
            hint = ""
            if kinds == {Kind.CATEGORY, Kind.INT}:
                hint = ": values of a category are written in quotes"
            raise self.fail(f"compares a {first.node.kind} with a {second.node.kind}{hint}", left)
        if kinds <= {Kind.CATEGORY, Kind.BOOL} and comparison not in (Comparison.EQ, Comparison.NE):
            raise self.fail(f"values of a {first.node.kind} have no order: only == and != are allowed", left)
        if kinds == {Kind.CATEGORY} and not _same_domain(first.node, second.node):
            raise self.fail("compares two categories with different domains", left)
        return Compare(comparison, first.node, second.node)

    def typed_text(self, typed: _Typed, other: _Typed, tree: ast.expr) -> _Typed:
        """A text literal as a value of the kind that it is compared with."""
        if typed.text is None:
            return typed
        return replace(typed, node=Literal(self.value(typed.text, other.node, tree), other.node.kind), text=None)

    def value(self, text: str, of: Node, tree: ast.expr) -> Physical:
        if not isinstance(of, ColumnNode) or of.kind not in (Kind.CATEGORY, Kind.DATE, Kind.TIMESTAMP):
            raise self.fail("a text can be compared with a category, a date or a timestamp alone", tree)
        try:
            return of.ref.column.physical(text)
        except ValueError as error:
            raise self.fail(f"{text!r} {error}", tree) from None

    def membership(self, left: ast.expr, right: ast.expr, negated: bool, depth: int) -> Node:
        if not isinstance(right, ast.List | ast.Tuple) or not right.elts:
            raise self.fail("after `in` stands a list of values such as ['a', 'b']", right)
        operand = self.node(left, depth)
        if operand.text is not None or isinstance(operand.node, Literal):
            raise self.fail("before `in` stands a literal", left)
        items = [self.item(element, depth) for element in right.elts]
        kind = operand.node.kind
        if kind in (Kind.CATEGORY, Kind.DATE, Kind.TIMESTAMP):
            values: list[Physical] = []
            for item, element in zip(items, right.elts, strict=True):
                if item.text is None:
                    raise self.fail("is not a text: values are written in quotes", element)
                values.append(self.value(item.text, operand.node, element))
            return Membership(operand.node, tuple(values), negated)
        allowed = {Kind.BOOL: (Kind.BOOL,), Kind.INT: (Kind.INT,), Kind.FLOAT: (Kind.INT, Kind.FLOAT)}[kind]
        for item, element in zip(items, right.elts, strict=True):
            if item.text is not None or item.node.kind not in allowed:
                raise self.fail(f"is not a value of a {kind}", element)
        if kind is Kind.INT:
            scale = max(operand.scale, *(item.scale for item in items))
            operand = self.rescale(operand, scale, left)
            items = [self.rescale(item, scale, element) for item, element in zip(items, right.elts, strict=True)]
        nodes = [_float(item) if kind is Kind.FLOAT else item.node for item in items]
        return Membership(operand.node, tuple(node.value for node in nodes if isinstance(node, Literal)), negated)

    def item(self, element: ast.expr, depth: int) -> _Typed:
        typed = self.node(element, depth + 1)
        if not isinstance(typed.node, Literal):
            raise self.fail("is not a literal", element)
        return typed


def _float(typed: _Typed) -> Node:
    node = typed.node
    if node.kind is Kind.FLOAT:
        return node
    if isinstance(node, Literal):
        return Literal(float(Decimal(node.value).scaleb(-typed.scale)), Kind.FLOAT)
    return ToFloat(node, int(10**typed.scale))


def _same_domain(left: Node, right: Node) -> bool:
    if isinstance(left, ColumnNode) and isinstance(right, ColumnNode):
        return left.ref.column.values == right.ref.column.values
    return True


_NAMES: Final[Sequence[tuple[type[ast.expr], str]]] = (
    (ast.Call, "a function call"),
    (ast.List, "a list"),
    (ast.Tuple, "a tuple"),
    (ast.IfExp, "if ... else"),
    (ast.Lambda, "a lambda"),
    (ast.JoinedStr, "an f-string"),
    (ast.Subscript, "an index"),
    (ast.UnaryOp, "this operator"),
)


def _called(tree: ast.expr) -> str:
    return next((name for kind, name in _NAMES if isinstance(tree, kind)), "this")
