"""The table of statuses: every code has a row, every error carries its ErrorInfo."""

from __future__ import annotations

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from parley_coordinator import status
from parley_protocol.errors import CODES, ParleyError, RefusedError, UnavailableError, VerificationError


def test_crd_21_the_table_holds_every_code_and_no_other() -> None:
    assert set(status.TABLE) == set(CODES)


def test_crd_21_who_must_act_is_one_of_four() -> None:
    assert {row.who for row in status.TABLE.values()} <= {"caller", "party", "operator", "members"}


@pytest.mark.parametrize("code", sorted(CODES))
def test_crd_21_every_error_carries_its_cause(code: str) -> None:
    found, message, details = status.of(RefusedError(code, "because"))
    told = Status.FromString(details)
    info = ErrorInfo()
    assert told.details[0].Unpack(info)
    assert (told.code, told.message, message) == (found.value[0], "because", "because")
    assert (info.reason, info.domain, info.metadata["cause"]) == (code, "parley", CODES[code])
    assert info.metadata["retry"] == ("true" if status.TABLE[code].retry else "false")
    assert found is not grpc.StatusCode.OK


def test_crd_21_a_time_to_wait_is_told() -> None:
    _, _, details = status.of(UnavailableError("full", code="no-capacity", retry_after_ms=1500))
    retry = RetryInfo()
    assert Status.FromString(details).details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1500


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        (VerificationError("cal-3", "old", code="expired"), "true"),
        (VerificationError("cal-1", "forged", code="signature"), "false"),
    ],
)
def test_crd_2_a_failed_caller_is_unauthenticated(error: ParleyError, retry: str) -> None:
    found, _, details = status.of(error, authenticating=True)
    info = ErrorInfo()
    assert Status.FromString(details).details[0].Unpack(info)
    assert found is grpc.StatusCode.UNAUTHENTICATED
    assert (info.metadata["who"], info.metadata["retry"]) == ("caller", retry)
