"""Errors: one short tree, each class with one meaning, each instance with a stable `code`.

Messages name fields, steps and positions. They never hold a data value, a key or another secret, because they are
logged and shown to people who may not see those.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Self

CODES: Final[dict[str, str]] = {
    # what was sent is not what it should be
    "malformed": "the bytes are no valid statement of the specification",
    "signature": "a signature does not verify under the key that must have made it",
    "agreement": "names or follows another agreement than this one, or one that is not signed by all",
    "attestation": "the attestation document does not prove the enclave that was agreed on",
    "head": "follows another head of the chain of records",
    "key": "a content key does not open what it was said to open, or does not match its commitment",
    "revoked": "the policy of a party's own KMS key refuses: the party has revoked",
    "policy": "the policy or a grant of a KMS key allows more than the agreement says",
    "passphrase": "the passphrase of a private key is missing or wrong",
    "conflict": "contradicts something that was accepted before",
    "incomplete": "the upload lacks bytes",
    # what a table holds is not what was agreed
    "schema": "the table has other columns than agreed",
    "order": "the rows are not sorted by the unit key",
    "domain": "a value is not in the agreed domain",
    "range": "a value is out of the agreed range",
    "multiplicity": "a unit has more rows than agreed",
    "rows": "the number of rows is not as stated or not as allowed",
    "frame": "a sealed frame is missing, altered or of another place",
    "data": "a party's own table is not as agreed",
    # what may not be done now
    "phase": "not possible in the present phase of the session",
    "busy": "other work must end first; try again",
    "expired": "the time for this is over",
    "quorum": "fewer parties than the agreement asks for",
    "roster": "the roster is not what the parties consented to, or was refused",
    "exhausted": "the agreed number of releases or the privacy budget is spent",
    "lost": "the enclave of this session is gone; join again",
    "state": "the local state forbids it",
    # who and what is unknown
    "unknown-session": "no such session",
    "unknown-agreement": "no such agreement",
    "unknown-upload": "no such upload",
    "not-a-member": "the agreement gives the caller no such role",
    "stranger": "the caller is not known here",
    # what does not fit
    "too-large": "larger than a limit",
    "quota": "the caller has used its quota",
    "nesting": "nested deeper than allowed",
    "memory": "the computation does not fit the memory of the enclave",
    "no-capacity": "no enclave is free; try again later",
    # what is not the caller's fault
    "unavailable": "the other side is away; try again",
    "internal": "a fault of the program",
}
"""Every stable code and its meaning. The enclave's failures and the coordinator's status table use these and no others."""


class ParleyError(Exception):
    """Base of all errors that Parley raises on purpose: a `message` for people and a stable `code` for programs."""

    code: str
    message: str

    def __init__(self, message: str, *, code: str) -> None:
        if code not in CODES:
            raise ValueError(f"{code!r} is no code of the table of errors")
        super().__init__(message)
        self.message = message
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception would call the class with `args` alone, which have lost the keywords.
        return _restore, (type(self), self.args, dict(self.__dict__))


class MalformedError(ParleyError):
    """Bytes that are no valid statement of the specification. All parsers raise this and nothing else."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="malformed")


class VerificationError(ParleyError):
    """A claim that does not hold: `step` is the numbered step of SPEC that refused it, such as "att-4".

    `expected` and `actual` are public values (digests, names, times) where both are known.
    """

    step: str
    expected: object
    actual: object

    def __init__(self, step: str, message: str, *, code: str, expected: object = None, actual: object = None) -> None:
        super().__init__(f"{step}: {message}", code=code)
        self.step = step
        self.expected = expected
        self.actual = actual


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with an agreement: `path` of the field, such as "outputs.by_region.by", and its line (1..)."""

    path: str
    line: int | None
    message: str

    def __str__(self) -> str:
        where = self.path if self.line is None else f"line {self.line}: {self.path}"
        return f"{where}: {self.message}"


class AgreementError(ParleyError):
    """An agreement that is contradictory, empty or not of the schema: all problems that were found."""

    problems: tuple[Problem, ...]

    def __init__(self, problems: Iterable[Problem]) -> None:
        found = tuple(problems)
        if not found:
            raise ValueError("an AgreementError needs a problem")
        super().__init__("\n".join(str(problem) for problem in found), code="agreement")
        self.problems = found


class DataError(ParleyError):
    """A party's own table is not as agreed: `row` (1.., as in the file without its header) and `column` where known.

    `source` names the file. Values of the data are never told.
    """

    source: str | None
    row: int | None
    column: str | None

    def __init__(
        self,
        message: str,
        *,
        source: str | None = None,
        row: int | None = None,
        column: str | None = None,
        code: str = "data",
    ) -> None:
        places = (source, None if row is None else f"row {row}", None if column is None else f"column {column!r}")
        where = ", ".join(place for place in places if place)
        super().__init__(f"{where}: {message}" if where else message, code=code)
        self.source = source
        self.row = row
        self.column = column


class RefusedError(ParleyError):
    """The enclave or the coordinator refused: `code` says why, from CODES."""

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(message or CODES.get(code, ""), code=code)

    @classmethod
    def from_wire(cls, code: str, message: str = "") -> Self:
        """The refusal that the other side sent; a code that this version does not know becomes "internal"."""
        return cls(code, message) if code in CODES else cls("internal", f"unknown code: {message}")


class StateError(ParleyError):
    """The local state forbids it: nothing is known under this key, or it would go back on what was signed."""

    def __init__(self, message: str, *, code: str = "state") -> None:
        super().__init__(message, code=code)


class UnavailableError(ParleyError):
    """The wire or the other side is away; what was asked may be asked again, after `retry_after_ms` where it is known."""

    retry_after_ms: int | None

    def __init__(self, message: str, *, code: str = "unavailable", retry_after_ms: int | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_ms = retry_after_ms


def _restore(kind: type[ParleyError], args: tuple[Any, ...], state: dict[str, Any]) -> ParleyError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error
