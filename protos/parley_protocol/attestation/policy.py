"""What a verifier accepts: measured images, a root, an agreement. An empty or contradictory policy cannot be made."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Self

from parley_protocol import limits
from parley_protocol.attestation.document import ZERO_PCR
from parley_protocol.attestation.roots import NITRO_ROOTS
from parley_protocol.errors import AgreementError, Problem

if TYPE_CHECKING:
    from parley_protocol.agreement.model import Agreement

AGREEMENT_PCR: Final = 16
"""The register that holds the agreement: the first that belongs to the application."""
IMAGE_PCRS: Final = (0, 1, 2)
"""Whole image; kernel, command line and first ramdisk; the other ramdisks. Only together do they fix an image."""
SIGNER_PCR: Final = 8
"""The certificate that signed the image."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One accepted image: PCR0, 1 and 2 together, 48 bytes each, PCR8 where given, before `until_ms` where given."""

    pcr0: bytes
    pcr1: bytes
    pcr2: bytes
    pcr8: bytes | None = None
    until_ms: int | None = None

    def __post_init__(self) -> None:
        for name in ("pcr0", "pcr1", "pcr2", "pcr8"):
            value = getattr(self, name)
            if value is None and name == "pcr8":
                continue
            if type(value) is not bytes or len(value) != limits.PCR_BYTES:
                raise _problem(f"measurements.{name}", "not 48 bytes")
            if value == ZERO_PCR:
                raise _problem(f"measurements.{name}", "all zero, which every debug enclave has")

    def matches(self, pcrs: Mapping[int, bytes]) -> bool:
        """Whether these registers are those of this image."""
        image = tuple(pcrs.get(index) for index in IMAGE_PCRS)
        signer = self.pcr8 is None or pcrs.get(SIGNER_PCR) == self.pcr8
        return image == (self.pcr0, self.pcr1, self.pcr2) and signer


@dataclass(frozen=True, slots=True)
class RootPolicy:
    """Which root a chain must end in. `nitro`: those compiled in. `simulated`: one that is not among those (F10)."""

    platform: Literal["nitro", "simulated"]
    simulated_root: bytes | None = None

    def __post_init__(self) -> None:
        if self.platform == "nitro":
            if self.simulated_root is not None:
                raise _problem("root", "platform nitro accepts the roots in the verifier and no other")
        elif self.platform == "simulated":
            if self.simulated_root is None or len(self.simulated_root) != 32:
                raise _problem("root", "platform simulated needs the SHA-256 of its root")
            if self.simulated_root in NITRO_ROOTS:
                raise _problem("root", "a root of real hardware cannot be called simulated")
        else:
            raise _problem("platform", "neither nitro nor simulated")

    @classmethod
    def nitro(cls) -> Self:
        """Real hardware."""
        return cls("nitro")

    @classmethod
    def simulated(cls, sha256: bytes) -> Self:
        """Documents under a local root, whose certificate's DER has this SHA-256."""
        return cls("simulated", sha256)

    @property
    def accepted(self) -> Collection[bytes]:
        """SHA-256 digests of the roots' DER."""
        return NITRO_ROOTS if self.simulated_root is None else frozenset({self.simulated_root})


@dataclass(frozen=True, slots=True)
class Policy:
    """What `verify_live` and `verify_statement` accept. `agreement`: the digest that PCR16 must hold."""

    measurements: tuple[Measurement, ...]
    root: RootPolicy
    agreement: bytes
    max_age_ms: int = limits.DOCUMENT_AGE_MS

    def __post_init__(self) -> None:
        if not self.measurements:
            raise _problem("measurements", "none: no enclave could be accepted")
        if len(self.agreement) != limits.PCR_BYTES:
            raise _problem("agreement", "not a digest of 48 bytes")
        if not 0 < self.max_age_ms <= limits.DOCUMENT_AGE_MS:
            raise _problem("max_age_ms", f"not 1 to {limits.DOCUMENT_AGE_MS}")

    @classmethod
    def of(cls, agreement: Agreement) -> Self:
        """What an agreement says, whole: its images, its root, its digest."""
        images = (
            Measurement(image.pcr0, image.pcr1, image.pcr2, image.pcr8, image.until_ms)
            for image in agreement.measurements
        )
        root = RootPolicy("simulated" if agreement.platform == "simulated" else "nitro", agreement.root_sha256)
        return cls(tuple(images), root, agreement.digest)


def _problem(path: str, message: str) -> AgreementError:
    return AgreementError([Problem(path, None, message)])
