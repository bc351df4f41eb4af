"""The roots under which `platform: nitro` is accepted: compiled in, so that no agreement can name another (F10)."""

from __future__ import annotations

from importlib import resources
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

AWS_NITRO_ROOT_G1: Final = bytes.fromhex("641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b")
"""SHA-256 of the DER of AWS's root G1, which signs for all regions of the partition `aws` until 2049-10-28."""

NITRO_ROOTS: Final[frozenset[bytes]] = frozenset({AWS_NITRO_ROOT_G1})
"""All roots of real Nitro hardware that are accepted. Those of China and GovCloud join when they are known."""


def aws_nitro_root_g1() -> bytes:
    """The certificate itself, DER, for those who want to read it. Verification needs no more than its hash."""
    pem = resources.files(__package__).joinpath("aws_nitro_root_g1.pem").read_bytes()
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
