"""Every bound of the protocol, with its reason. The only place with such numbers.

Sizes are in bytes and times in milliseconds unless the name says otherwise.
"""

from __future__ import annotations

from typing import Final

# Encoding

CBOR_BYTES: Final = 1 << 20
"""Default size of what is decoded: statements are kilobytes; whoever expects more says so."""
CBOR_DEPTH: Final = 16
"""Nesting: an agreement needs 8; the rest keeps the recursion of a parser far from the stack's end."""
CBOR_INT_MIN: Final = -(1 << 63)
"""Smallest integer: i64, which every language has."""
CBOR_INT_MAX: Final = (1 << 64) - 1
"""Largest integer: u64, the largest that CBOR writes without a tag."""

# Framing of the enclave's channel

MESSAGE_BYTES: Final = 4 << 20
"""One protobuf message of the channel: a lineage of agreements with its signatures and a chain of records fit."""
PAYLOAD_BYTES: Final = 32 << 20
"""The raw payload beside it: the frames of one window of 17 parties (128 KiB a frame) fit several times."""

# Attestation

DOCUMENT_BYTES: Final = 0x3000
"""A document: the NSM driver's response buffer, which no real document exceeds."""
CERTIFICATE_BYTES: Final = 1024
"""One certificate, by AWS's syntax rules."""
CERTIFICATES: Final = 5
"""Root, region, zone, instance, enclave: all 104 known documents have these five, and nothing else is accepted."""
ATTESTED_FIELD_BYTES: Final = 1024
"""public_key, user_data and nonce each, accepted: real documents use the whole of it."""
ATTESTED_FIELD_BYTES_MADE: Final = 512
"""The same, produced: AWS's text contradicts itself (512 or 1,024), so the smaller is made."""
PCRS: Final = 32
"""Platform configuration registers of an NSM."""
PCR_BYTES: Final = 48
"""SHA-384, the only digest of an NSM."""
MODULE_ID_BYTES: Final = 128
"""Real ones have 39; the bound keeps names printable."""
DOCUMENT_AGE_MS: Final = 5 * 60 * 1000
"""A live document: one round trip with a fresh nonce, not the three hours of its certificate (DESIGN 5.4)."""
CLOCK_SKEW_MS: Final = 60 * 1000
"""How far a document may come from the verifier's future: clocks under NTP differ by less."""

# Statements

STATEMENT_BYTES: Final = 1 << 20
"""One statement: the largest, a record of 1,024 members and 64 outputs, is a third of it."""
NAME_BYTES: Final = 128
"""One name, of a member, a table or an output: what fits a line of a terminal."""
MEMBERS: Final = 1024
"""Members of an agreement."""
TABLES: Final = 32
"""Tables that one party brings."""
OUTPUTS: Final = 64
"""Outputs of an agreement."""
COLUMNS: Final = 256
"""Columns of a table or an output."""
CELLS: Final = 100_000
"""Rows of an output: one for every combination of declared values; a person reads thousands."""
FORMER_ROSTERS: Final = 64
"""Rosters that a party may have countersigned under one head before it gives the head up."""
GROUPS: Final = 65_536
"""Groups of a table: 2^30 rows at 16,384 rows each."""
GROUP_ROWS: Final = (1024, 4096, 16_384)
"""Rows of a group; the first two only in a table of one group, so that a small table stays small."""
SEALING_KEY_BYTES: Final = 1216
"""A public key of MLKEM768_X25519: 1,184 bytes of ML-KEM-768 and 32 of X25519."""
SEALED_KEYS_BYTES: Final = 4096
"""The content keys and noise share of a join, sealed: 32 keys of 34 bytes and an encapsulation of 1,120."""
OUTPUT_BYTES: Final = 16 << 20
"""One output table, encoded: as many cells as allowed with labels of ordinary length."""
CALLER_AGE_MS: Final = 5 * 60 * 1000
"""How long a caller's statement may be valid: one per connection, made when it is opened."""
