"""Several accepted images: which one a client sees, until when, and how an amendment adds and retires one."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from parley.clock import now_ms
from parley.differences import amends, changes
from parley.images import AcceptedImage, matching_image, measure_file
from parley_protocol import limits
from parley_protocol.agreement.model import Agreement, Measurement, end_of_day_ms
from parley_protocol.errors import MalformedError, VerificationError
from support.client import frame_of
from support.images import image
from support.paperwire import Desk, session_of

DAY_MS = 86_400_000
OLD, NEW = (
    Measurement(bytes([first]) * 48, bytes([first + 1]) * 48, bytes([first + 2]) * 48) for first in (0x10, 0x20)
)


def in_days(days: int) -> date:
    return (datetime.now(UTC) + timedelta(days=days)).date()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """Members under an agreement that accepts one image, without an end."""
    made = Desk(tmp_path)
    made.agreement = replace(made.agreement, measurements=(OLD,))
    made.wire.agreement = made.agreement
    made.sign()
    return made


# What is said


def test_an_accepted_image_says_which_it_is() -> None:
    assert str(AcceptedImage(1, 1, OLD)) == "measurement 1 of 1 in the agreement (PCR0 1010...1010)"
    until = replace(NEW, until=date(2027, 1, 31))
    assert str(AcceptedImage(2, 3, until)) == "measurement 2 of 3 in the agreement, until 2027-01-31 (PCR0 2020...2020)"


def test_a_notice_comes_fourteen_days_before_the_end() -> None:
    day = date(2027, 1, 31)
    found, end = AcceptedImage(1, 2, replace(OLD, until=day)), end_of_day_ms(day)
    assert limits.MEASUREMENT_NOTICE_MS == 14 * DAY_MS
    assert found.notice(end - 14 * DAY_MS - 1) is None
    assert "2027-01-31 (14 more days)" in (found.notice(end - 14 * DAY_MS) or "")
    assert "(1 more day)" in (found.notice(end - 2 * DAY_MS + 1) or "")
    assert "(today is its last day)" in (found.notice(end - 1) or "")
    # No amendment comes in time any more.
    assert found.notice(end) is None
    assert AcceptedImage(1, 2, OLD).notice(end) is None


def test_an_image_is_accepted_until_the_end_of_its_day() -> None:
    day = date(2027, 1, 31)
    found = AcceptedImage(1, 1, replace(OLD, until=day))
    assert found.accepted(end_of_day_ms(day) - 1) and not found.accepted(end_of_day_ms(day))
    assert AcceptedImage(1, 1, OLD).accepted(1 << 60)


def test_registers_match_a_measurement_that_is_accepted_before_one_that_is_not(desk: Desk) -> None:
    ended, later = (replace(OLD, until=day) for day in (date(2026, 1, 1), date(2027, 1, 1)))
    agreement = replace(desk.agreement, measurements=(ended, NEW, later))
    pcrs = {0: OLD.pcr0, 1: OLD.pcr1, 2: OLD.pcr2}
    middle = end_of_day_ms(date(2026, 6, 1))
    assert matching_image(agreement, pcrs, at_ms=middle) == AcceptedImage(3, 3, later)
    assert matching_image(agreement, pcrs, at_ms=end_of_day_ms(date(2028, 1, 1))) == AcceptedImage(3, 3, later)
    assert matching_image(agreement, pcrs, at_ms=0) == AcceptedImage(1, 3, ended)
    # The registers of two measurements are never mixed.
    assert matching_image(agreement, {**pcrs, 2: NEW.pcr2}, at_ms=middle) is None
    signed = replace(desk.agreement, measurements=(replace(OLD, pcr8=b"\7" * 48),))
    assert matching_image(signed, pcrs, at_ms=middle) is None
    assert matching_image(signed, {**pcrs, 8: b"\7" * 48}, at_ms=middle) is not None


def test_a_bad_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.eif").write_bytes(image()[:-1])
    with pytest.raises(MalformedError, match=r"x\.eif: image: truncated"):
        measure_file(tmp_path / "x.eif")
    with pytest.raises(FileNotFoundError):
        measure_file(tmp_path / "y.eif")


# A rollout: version 1 accepts the old image, version 2 both for a while, version 3 the new one


def rollout(desk: Desk, days: int) -> Agreement:
    """Version 2, signed by all: the old image ends after `days`."""
    second = desk.amended(measurements=(replace(OLD, until=in_days(days)), NEW))
    desk.sign(second)
    return second


def test_a_client_says_which_of_the_images_it_saw(desk: Desk) -> None:
    second = rollout(desk, 30)
    for number, measurement in ((1, OLD), (2, NEW)):
        session = session_of(desk, "ada", desk.wire.open(second, image=measurement))
        assert desk.members["ada"].state.joined(session.id) is None and session.image is None
        session.verify()
        seen = session.image
        assert seen == AcceptedImage(number, 2, second.measurements[number - 1])
        assert seen is not None and seen.notice(now_ms()) is None


def test_what_was_joined_is_still_known_later(desk: Desk) -> None:
    second = rollout(desk, 30)
    opened = desk.wire.open(second, image=NEW)
    session_of(desk, "ada", opened).submit({"visits": frame_of(1)})
    again = session_of(desk, "ada", opened)
    assert again.image is not None and again.image.number == 2
    assert session_of(desk, "bea", opened).image is None


def test_an_image_that_soon_ends_gives_notice(desk: Desk) -> None:
    second = rollout(desk, 3)
    session = session_of(desk, "ada", desk.wire.open(second, image=OLD))
    session.verify()
    assert session.image is not None
    assert "(3 more days): sign the amendment" in (session.image.notice(now_ms()) or "")


def test_an_image_that_has_ended_is_refused_and_the_next_one_is_not(desk: Desk) -> None:
    second = rollout(desk, -1)
    with pytest.raises(VerificationError, match="no longer accepted") as refused:
        session_of(desk, "ada", desk.wire.open(second, image=OLD)).verify()
    assert (refused.value.step, refused.value.code) == ("att-14", "expired")
    session_of(desk, "ada", desk.wire.open(second, image=NEW)).verify()


def test_an_image_that_was_retired_is_refused(desk: Desk) -> None:
    second = rollout(desk, 30)
    third = replace(second, version=3, series_digest=second.series, replaces=second.digest, measurements=(NEW,))
    desk.sign(third)
    with pytest.raises(VerificationError, match="not an image of the agreement"):
        session_of(desk, "ada", desk.wire.open(third, image=OLD)).verify()
    session = session_of(desk, "ada", desk.wire.open(third, image=NEW))
    session.verify()
    assert str(session.image) == "measurement 1 of 1 in the agreement (PCR0 2020...2020)"


# What an amendment changes


def test_the_difference_of_a_rollout_is_its_images(desk: Desk) -> None:
    second = replace(
        desk.amended(measurements=(replace(OLD, until=date(2027, 1, 31)), NEW)), purpose=desk.agreement.purpose
    )
    assert amends(desk.agreement, second) and not amends(second, desk.agreement)
    assert [str(change) for change in changes(desk.agreement, second)] == [
        "~ version: 1 -> 2",
        "+ measurements.1010...1010.until: 2027-01-31",
        f"+ measurements.2020...2020.PCR0: {NEW.pcr0.hex()}",
        f"+ measurements.2020...2020.PCR1: {NEW.pcr1.hex()}",
        f"+ measurements.2020...2020.PCR2: {NEW.pcr2.hex()}",
        f"+ series: {desk.agreement.digest.hex()}",
        f"+ replaces: {desk.agreement.digest.hex()}",
    ]
    third = replace(second, version=3, replaces=second.digest, measurements=(NEW,))
    gone = [str(change) for change in changes(second, third) if change.new is None]
    assert gone[0] == f"- measurements.1010...1010.PCR0: {OLD.pcr0.hex()}"
    assert gone[-1] == "- measurements.1010...1010.until: 2027-01-31"


def test_the_same_agreements_differ_in_nothing(desk: Desk) -> None:
    assert changes(desk.agreement, replace(desk.agreement)) == ()


def test_every_kind_of_change_is_told(desk: Desk) -> None:
    first = desk.agreement
    table, output = first.tables["visits"], first.outputs["by_site"]
    other = Desk(desk.members["ada"].path.parent / "others").members["ada"].public
    cases: dict[str, tuple[Agreement, str]] = {
        "text": (replace(first, purpose="Another."), f"~ purpose: {first.purpose} -> Another."),
        "duration": (
            replace(first, session=replace(first.session, deadline_ms=7_200_000)),
            "~ session.deadline: 14 days -> 2 hours",
        ),
        "key": (replace(first, members={**first.members, "ada": other}), f"-> {other.fingerprint}, SHA-256 "),
        "order of members": (
            replace(first, members=dict(reversed(list(first.members.items())))),
            "~ members.order: ada, bea, cyd -> cyd, bea, ada",
        ),
        "item of a list": (
            replace(first, outputs={"by_site": replace(output, recipients=("ada",))}),
            "- outputs.by_site.to: bea",
        ),
        "new entry": (replace(first, groups={**first.groups, "few": ("ada",)}), "+ groups.few: ada"),
        "number": (
            replace(first, tables={"visits": replace(table, rows_per_unit=table.rows_per_unit + 1)}),
            f"~ tables.visits.rows_per_unit: {table.rows_per_unit} -> {table.rows_per_unit + 1}",
        ),
        "order of images": (
            replace(first, measurements=(NEW, OLD)),
            "+ measurements.2020...2020.PCR0",
        ),
    }
    for name, (changed, line) in cases.items():
        found = [str(change) for change in changes(first, changed)]
        assert any(line in text for text in found), (name, found)
        back = changes(changed, first)
        assert {(change.path, change.new, change.old) for change in back} == {
            (change.path, change.old, change.new) for change in changes(first, changed)
        }, name


def test_images_with_one_pcr0_are_told_apart(desk: Desk) -> None:
    shifted = replace(OLD, pcr1=b"\1" * 48, pcr2=b"\2" * 48)
    both = replace(desk.agreement, measurements=(OLD, shifted))
    found = [str(change) for change in changes(desk.agreement, both)]
    assert found[1] == f"+ measurements.1010...1010 (2).PCR1: {shifted.pcr1.hex()}"
    swapped = replace(desk.agreement, measurements=(shifted, OLD))
    assert changes(both, swapped)
