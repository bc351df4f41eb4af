"""Errors survive pickling and copying, and use only codes of the table."""

from __future__ import annotations

import copy
import pickle

import pytest

from parley_protocol import errors

EXAMPLES: list[errors.ParleyError] = [
    errors.MalformedError("trailing bytes"),
    errors.VerificationError("att-3", "another root", code="attestation", expected=b"\1", actual=b"\2"),
    errors.AgreementError([errors.Problem("members", 3, "none"), errors.Problem("", None, "empty")]),
    errors.DataError("not a number", row=3, column="age"),
    errors.RefusedError("busy"),
    errors.StateError("no state for this key"),
    errors.UnavailableError("connection lost", retry_after_ms=100),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_pickle_and_copy(error: errors.ParleyError) -> None:
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert (str(other), other.__dict__) == (str(error), error.__dict__)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_has_a_code_of_the_table(error: errors.ParleyError) -> None:
    assert error.code in errors.CODES


def test_a_code_that_is_not_in_the_table_is_a_fault_of_the_program() -> None:
    with pytest.raises(ValueError, match="bizarre"):
        errors.RefusedError("bizarre")
    with pytest.raises(ValueError, match="needs a problem"):
        errors.AgreementError([])


def test_an_unknown_code_from_the_wire_is_internal() -> None:
    assert errors.RefusedError.from_wire("quota", "no").code == "quota"
    unknown = errors.RefusedError.from_wire("bizarre", "what happened")
    assert unknown.code == "internal" and "what happened" in unknown.message


def test_messages_name_step_field_row_and_column() -> None:
    assert str(EXAMPLES[1]).startswith("att-3: ")
    assert str(EXAMPLES[2]) == "line 3: members: none\n: empty"
    assert str(EXAMPLES[3]) == "row 3, column 'age': not a number"
