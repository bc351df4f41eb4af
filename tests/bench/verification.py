"""An attestation document verified, against five bare P-384 verifications: four certificates under the root, and COSE."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA384
from figures import Figure, seconds

from parley_protocol.attestation.verify import verify_live
from support import documents

CALLS = 20
ROUNDS = 15


def figures(rows: list[int]) -> list[Figure]:
    """One row: milliseconds a document, the least of interleaved rounds, since noise only ever adds."""
    document, policy = documents.document(), documents.policy()
    key = generate_private_key(SECP384R1())
    message = b"m" * 640
    signature = key.sign(message, ECDSA(SHA384()))
    public = key.public_key()

    def ours() -> None:
        for _ in range(CALLS):
            verify_live(
                document,
                policy=policy,
                nonce=documents.NONCE,
                user_data=documents.USER_DATA,
                public_key=documents.PUBLIC_KEY,
                now_ms=documents.NOW,
            )

    def theirs() -> None:
        for _ in range(5 * CALLS):
            public.verify(signature, message, ECDSA(SHA384()))

    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS)]
    mine, bare = (min(side) * 1000 / CALLS for side in zip(*pairs, strict=True))
    return [Figure("verify an attestation document", mine, bare, "ms", "five bare P-384 verifications", "<= 1.4")]
