"""Evaluation of conditions on arrays: SQL's three-valued logic, one numpy operation a node (eng-8)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from parley_enclave.engine.checks import is_null
from parley_protocol.agreement import expression as tree
from parley_protocol.agreement.expression import Comparison, Kind, Operator
from parley_protocol.agreement.schema import ColumnRef

Mask = NDArray[np.bool_]
Columns = Callable[[ColumnRef], NDArray[Any]]
"""The values of a column, all of one length, with the column's own nulls."""

_COMPARE: Final[dict[Comparison, Callable[[Any, Any], Any]]] = {
    Comparison.EQ: operator.eq,
    Comparison.NE: operator.ne,
    Comparison.LT: operator.lt,
    Comparison.LE: operator.le,
    Comparison.GT: operator.gt,
    Comparison.GE: operator.ge,
}
_ARITHMETIC: Final[dict[Operator, Callable[[Any, Any], Any]]] = {
    Operator.ADD: operator.add,
    Operator.SUB: operator.sub,
    Operator.MUL: operator.mul,
}


@dataclass(frozen=True, slots=True)
class _Vector:
    """Values (an array, or a scalar of a literal) and where they are null (None: nowhere). What stands at a null is
    anything; a truth value there is False."""

    values: Any
    null: Mask | None


def holds(condition: tree.Expression, columns: Columns, rows: int) -> Mask:
    """Where the condition is true: neither false nor unknown. `rows`: the length of the columns."""
    # What stands at nulls may overflow; it is not looked at.
    with np.errstate(all="ignore"):
        found = _evaluate(condition.root, columns)
    truth: Mask = np.broadcast_to(np.asarray(found.values, np.bool_), (rows,))
    return truth if found.null is None else truth & ~found.null


def _evaluate(node: tree.Node, columns: Columns) -> _Vector:
    match node:
        case tree.ColumnNode():
            return _column(node, columns)
        case tree.Literal():
            # Python's own numbers take the type of the array that they meet.
            return _Vector(bool(node.value) if node.kind is Kind.BOOL else node.value, None)
        case tree.Rescale():
            operand = _evaluate(node.operand, columns)
            return _Vector(operand.values * np.int64(node.factor), operand.null)
        case tree.ToFloat():
            operand = _evaluate(node.operand, columns)
            return _Vector(operand.values / float(node.divisor), operand.null)
        case tree.Negate():
            operand = _evaluate(node.operand, columns)
            return _Vector(-operand.values, operand.null)
        case tree.Arithmetic():
            left, right = _evaluate(node.left, columns), _evaluate(node.right, columns)
            return _Vector(_ARITHMETIC[node.operator](left.values, right.values), _either(left.null, right.null))
        case tree.Compare():
            left, right = _evaluate(node.left, columns), _evaluate(node.right, columns)
            return _truth(_COMPARE[node.operator](left.values, right.values), _either(left.null, right.null))
        case tree.Membership():
            operand = _evaluate(node.operand, columns)
            inside = np.isin(operand.values, np.array(node.values, np.asarray(operand.values).dtype))
            return _truth(~inside if node.negated else inside, operand.null)
        case tree.IsNull():
            return _is_null(node, columns)
        case tree.Not():
            operand = _evaluate(node.operand, columns)
            return _truth(np.logical_not(operand.values), operand.null)
        case tree.And() | tree.Or():
            return _junction([_evaluate(operand, columns) for operand in node.operands], isinstance(node, tree.And))


def _column(node: tree.ColumnNode, columns: Columns) -> _Vector:
    values = columns(node.ref)
    null = is_null(node.ref.column, values) if node.ref.nullable else None
    return _truth(values == 1, null) if node.kind is Kind.BOOL else _Vector(values, null)


def _is_null(node: tree.IsNull, columns: Columns) -> _Vector:
    operand = _evaluate(node.operand, columns)
    if operand.null is None:
        null: Any = np.zeros(np.shape(operand.values), np.bool_)
    else:
        null = operand.null
    return _Vector(~null if node.negated else null, None)


def _junction(operands: list[_Vector], conjunction: bool) -> _Vector:
    """And: false where any is false, else unknown where any is. Or: the same of the negations."""
    decided: Any = np.bool_(False)
    unknown: Any = None
    for operand in operands:
        found = operand.values
        if conjunction:
            # False where it is null, but not known to be so.
            found = np.logical_not(found) if operand.null is None else ~(found | operand.null)
        decided = decided | found
        unknown = _either(unknown, operand.null)
    null = None if unknown is None else unknown & ~decided
    return _truth(~decided if conjunction else decided, null)


def _truth(values: Any, null: Mask | None) -> _Vector:
    return _Vector(values if null is None else values & ~null, null)


def _either(left: Mask | None, right: Mask | None) -> Mask | None:
    if left is None or right is None:
        return right if left is None else left
    return left | right
