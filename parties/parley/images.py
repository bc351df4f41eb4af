"""Enclave images: measured from a file, and which of the images that an agreement accepts one is.

An agreement may accept several, each until a day: that is how a new image takes the place of an old one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from parley_protocol import limits
from parley_protocol.agreement.model import Agreement, Measurement
from parley_protocol.attestation.policy import Policy
from parley_protocol.attestation.verify import VerifiedEnclave, VerifiedStatement
from parley_protocol.errors import MalformedError
from parley_protocol.measurement import Image, measure

_DAY_MS: Final = 86_400_000


def measure_file(path: str | Path) -> Image:
    """What the EIF in a file is measured to be, in bounded memory; MalformedError with the file's name, OSError."""
    with Path(path).open("rb") as file:
        try:
            return measure(file)
        except MalformedError as error:
            raise MalformedError(f"{path}: {error.message}") from None


@dataclass(frozen=True, slots=True)
class AcceptedImage:
    """One of the images that an agreement accepts: the `number`th (1..) of `of`."""

    number: int
    of: int
    measurement: Measurement

    def __str__(self) -> str:
        pcr0, until = self.measurement.pcr0, self.measurement.until
        end = "" if until is None else f", until {until.isoformat()}"
        which = f"measurement {self.number} of {self.of} in the agreement{end}"
        return f"{which} (PCR0 {pcr0[:2].hex()}...{pcr0[-2:].hex()})"

    def accepted(self, at_ms: int) -> bool:
        """Whether it is accepted at this time."""
        until_ms = self.measurement.until_ms
        return until_ms is None or at_ms < until_ms

    def notice(self, now_ms: int) -> str | None:
        """What to do where the image is soon accepted no more; None where that is not soon, or where it no longer is."""
        until, until_ms = self.measurement.until, self.measurement.until_ms
        if until is None or until_ms is None or not 0 < until_ms - now_ms <= limits.MEASUREMENT_NOTICE_MS:
            return None
        days = (until_ms - now_ms) // _DAY_MS
        left = "today is its last day" if days == 0 else f"{days} more day{'' if days == 1 else 's'}"
        return (
            f"this image is accepted until {until.isoformat()} ({left}): sign the amendment that accepts the next one"
        )


def seen_image(agreement: Agreement, verified: VerifiedEnclave | VerifiedStatement) -> AcceptedImage:
    """Which of the agreement's images a verified document is of."""
    return _image(agreement, Policy.of(agreement).measurements.index(verified.measurement))


def matching_image(agreement: Agreement, pcrs: Mapping[int, bytes], *, at_ms: int) -> AcceptedImage | None:
    """Which of the agreement's images has these registers: one that is accepted at `at_ms` before one that is not."""
    rules = Policy.of(agreement).measurements
    found = [_image(agreement, number) for number, rule in enumerate(rules) if rule.matches(pcrs)]
    return next((image for image in found if image.accepted(at_ms)), found[-1] if found else None)


def _image(agreement: Agreement, number: int) -> AcceptedImage:
    return AcceptedImage(number + 1, len(agreement.measurements), agreement.measurements[number])
