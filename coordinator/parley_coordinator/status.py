"""The one table from stable code to gRPC status, and the `google.rpc.Status` that carries a code to the caller.

crd-21: every error carries `google.rpc.ErrorInfo`: reason = the code, domain = "parley", metadata `cause` (the meaning of the
code), `who` (who must act: caller, party, operator, members) and `retry` ("true" where the same call may be repeated).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from parley_protocol.errors import CODES, ParleyError, UnavailableError

DOMAIN: Final = "parley"
DETAILS_KEY: Final = "grpc-status-details-bin"
_S = grpc.StatusCode


@dataclass(frozen=True, slots=True)
class Row:
    """How a code is told: gRPC status, who must act, whether the same call may be repeated as it is."""

    status: grpc.StatusCode
    who: str
    retry: bool = False


TABLE: Final[dict[str, Row]] = {
    "malformed": Row(_S.INVALID_ARGUMENT, "caller"),
    "signature": Row(_S.INVALID_ARGUMENT, "caller"),
    "agreement": Row(_S.FAILED_PRECONDITION, "members"),
    "attestation": Row(_S.FAILED_PRECONDITION, "operator"),
    "head": Row(_S.FAILED_PRECONDITION, "caller"),
    "key": Row(_S.FAILED_PRECONDITION, "party"),
    "revoked": Row(_S.FAILED_PRECONDITION, "party"),
    "policy": Row(_S.FAILED_PRECONDITION, "party"),
    "conflict": Row(_S.FAILED_PRECONDITION, "caller"),
    "incomplete": Row(_S.FAILED_PRECONDITION, "party"),
    "schema": Row(_S.FAILED_PRECONDITION, "party"),
    "order": Row(_S.FAILED_PRECONDITION, "party"),
    "domain": Row(_S.FAILED_PRECONDITION, "party"),
    "range": Row(_S.FAILED_PRECONDITION, "party"),
    "multiplicity": Row(_S.FAILED_PRECONDITION, "party"),
    "rows": Row(_S.FAILED_PRECONDITION, "party"),
    "frame": Row(_S.FAILED_PRECONDITION, "party"),
    "data": Row(_S.FAILED_PRECONDITION, "party"),
    "phase": Row(_S.FAILED_PRECONDITION, "caller"),
    "busy": Row(_S.UNAVAILABLE, "caller", retry=True),
    "expired": Row(_S.FAILED_PRECONDITION, "members"),
    "quorum": Row(_S.FAILED_PRECONDITION, "party"),
    "roster": Row(_S.FAILED_PRECONDITION, "party"),
    "exhausted": Row(_S.FAILED_PRECONDITION, "members"),
    "lost": Row(_S.ABORTED, "members"),
    "state": Row(_S.FAILED_PRECONDITION, "caller"),
    "passphrase": Row(_S.FAILED_PRECONDITION, "caller"),
    "unknown-session": Row(_S.NOT_FOUND, "caller"),
    "unknown-agreement": Row(_S.NOT_FOUND, "caller"),
    "unknown-upload": Row(_S.NOT_FOUND, "caller"),
    "not-a-member": Row(_S.PERMISSION_DENIED, "caller"),
    "stranger": Row(_S.PERMISSION_DENIED, "operator"),
    "too-large": Row(_S.RESOURCE_EXHAUSTED, "caller"),
    "quota": Row(_S.RESOURCE_EXHAUSTED, "operator"),
    "nesting": Row(_S.INVALID_ARGUMENT, "caller"),
    "memory": Row(_S.FAILED_PRECONDITION, "operator"),
    "no-capacity": Row(_S.RESOURCE_EXHAUSTED, "operator", retry=True),
    "unavailable": Row(_S.UNAVAILABLE, "operator", retry=True),
    "internal": Row(_S.INTERNAL, "operator"),
}
"""Every code of `errors.CODES`, once."""


def of(error: ParleyError, *, authenticating: bool = False) -> tuple[grpc.StatusCode, str, bytes]:
    """(gRPC status, message, serialised google.rpc.Status) of an error.

    `authenticating`: it was the caller statement that failed; then the status is UNAUTHENTICATED whatever the code, and
    an expired statement may be made anew and the call repeated.
    """
    row = TABLE[error.code]
    if authenticating:
        row = Row(_S.UNAUTHENTICATED, "caller", retry=error.code == "expired")
    info = ErrorInfo(
        reason=error.code,
        domain=DOMAIN,
        metadata={"cause": CODES[error.code], "who": row.who, "retry": "true" if row.retry else "false"},
    )
    status = Status(code=row.status.value[0], message=error.message)
    _add(status, info)
    if isinstance(error, UnavailableError) and error.retry_after_ms is not None:
        delay = Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        _add(status, RetryInfo(retry_delay=delay))
    return row.status, error.message, status.SerializeToString()


def _add(status: Status, detail: ErrorInfo | RetryInfo) -> None:
    packed = Any()
    packed.Pack(detail)
    status.details.append(packed)
