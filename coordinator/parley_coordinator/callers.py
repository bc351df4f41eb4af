"""Who calls: a caller statement in the metadata, bound to this server's TLS key and to a few minutes (SPEC, "Caller")."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from parley_protocol import limits
from parley_protocol.claims import verify_caller
from parley_protocol.errors import MalformedError, VerificationError

METADATA_KEY: Final = "parley-caller-bin"


class Callers:
    """The check of caller statements. `server` is the SHA-384 of this server's SubjectPublicKeyInfo."""

    def __init__(self, server: bytes) -> None:
        self._server = server

    def key(self, metadata: Iterable[tuple[str, str | bytes]], *, now_ms: int) -> bytes:
        """The signing key (32 bytes) that signed the statement in `metadata`.

        VerificationError: crd-1 where there is not exactly one statement, cal-1 to cal-3 where it does not hold;
        MalformedError where it is none.
        """
        found = [value for name, value in metadata if name == METADATA_KEY]
        if len(found) != 1:
            raise VerificationError("crd-1", f"not one entry {METADATA_KEY} in the metadata", code="signature")
        signed = found[0]
        if not isinstance(signed, bytes) or len(signed) > limits.CALLER_BYTES:
            raise MalformedError(f"{METADATA_KEY}: no caller statement")
        return verify_caller(signed, self._server, now_ms=now_ms).member_key
