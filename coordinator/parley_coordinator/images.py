"""The image that enclaves are started from, held against an agreement before anything is started.

Nobody has to believe this check: members verify what the hypervisor measured. It tells the operator at once what would
otherwise show only when the members refuse the enclave.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from parley_coordinator import log
from parley_coordinator.clock import Clock
from parley_protocol import measurement
from parley_protocol.agreement.model import Agreement, Measurement, Platform
from parley_protocol.errors import MalformedError, RefusedError, UnavailableError


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an agreement asks of an enclave: for its digest, on which platform, of which images."""

    digest: bytes
    simulated: bool
    measurements: tuple[Measurement, ...]

    @classmethod
    def of(cls, agreement: Agreement) -> Self:
        """What this agreement asks."""
        return cls(agreement.digest, agreement.platform is Platform.SIMULATED, agreement.measurements)


_State = tuple[int, int, int, int]


class Images:
    """Measures image files; a file that has not changed is not read again."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[_State, measurement.Image]] = {}

    def measure(self, path: Path) -> measurement.Image:
        """The image in a file; OSError where it cannot be read, MalformedError where it is none."""
        with self._lock, path.open("rb") as file:
            status = os.fstat(file.fileno())
            state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            known = self._known.get(path)
            if known is not None and known[0] == state:
                return known[1]
            image = measurement.measure(file)
            self._known[path] = (state, image)
            return image

    def check(self, path: Path, field: str, wanted: Wanted) -> None:
        """Nothing where the agreement accepts this image now.

        RefusedError "attestation" where it does not, or the file is no image; UnavailableError where it cannot be read.
        """
        try:
            image = self.measure(path)
        except OSError as error:
            log.warning("image-unreadable", field=field, image=str(path), error=type(error).__name__)
            raise UnavailableError(f"the image {path.name} of this coordinator cannot be read") from error
        except MalformedError as error:
            log.warning("image-damaged", field=field, image=str(path), why=error.message)
            raise RefusedError(
                "attestation", f"{path.name} of this coordinator is no image: {error.message}"
            ) from error
        matching = list(_matching(image, wanted.measurements))
        if not matching:
            pcr0 = image.pcrs[0].hex()
            log.warning("image-not-agreed", field=field, image=str(path), pcr0=pcr0, agreement=log.short(wanted.digest))
            raise RefusedError(
                "attestation",
                f"the agreement does not accept the image {path.name} of this coordinator, whose PCR0 is {pcr0}",
            )
        now = self._clock()
        if all(found.until_ms is not None and found.until_ms <= now for found in matching):
            last = max(found.until for found in matching if found.until is not None)
            log.warning("image-expired", field=field, image=str(path), until=last.isoformat())
            raise RefusedError(
                "attestation", f"the agreement accepted the image {path.name} of this coordinator until {last}"
            )


def _matching(image: measurement.Image, accepted: Iterable[Measurement]) -> Iterable[Measurement]:
    for one in accepted:
        if (one.pcr0, one.pcr1, one.pcr2) == (image.pcrs[0], image.pcrs[1], image.pcrs[2]) and (
            one.pcr8 is None or one.pcr8 == image.pcrs.get(8)
        ):
            yield one
