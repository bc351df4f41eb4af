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

MESSAGE_BYTES: Final = 16 << 20
"""One protobuf message of the channel: an agreement of the greatest size fits with its lineage and signatures."""
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
KEY_POLICY_BYTES: Final = 128 << 10
"""The policy of a KMS key as it is given back: KMS takes 32 KiB, and may add spaces."""
MODULE_ID_BYTES: Final = 128
"""Real ones have 39; the bound keeps names printable."""
DOCUMENT_AGE_MS: Final = 5 * 60 * 1000
"""A live document: one round trip with a fresh nonce, not the three hours of its certificate (DESIGN 5.4)."""
CLOCK_SKEW_MS: Final = 60 * 1000
"""How far a document may come from the verifier's future: clocks under NTP differ by less."""

# Enclave images

EIF_BYTES: Final = 1 << 40
"""A whole image: enclaves have at least four times its size in memory, and no parent has that much."""
EIF_SECTIONS: Final = 32
"""Sections of an image: the format's table has no more places."""
EIF_CMDLINE_BYTES: Final = 4096
"""A kernel command line, which is held and shown: kernels take 2,048 bytes."""
EIF_METADATA_BYTES: Final = 1 << 20
"""The metadata, which are held and shown: `docker inspect` of an image is in them, tens of kilobytes at most."""
EIF_SIGNATURE_BYTES: Final = 32_768
"""The signature section, by AWS's format."""
EIF_CHUNK_BYTES: Final = 1 << 20
"""What is read of an image at a time: large enough for the disk, and all the memory that an image of any size takes."""

# Statements

NAME_BYTES: Final = 128
"""Names of members, tables, columns, outputs: long enough for people, short enough to show."""
MEMBERS: Final = 1024
"""Members of an agreement: a roster of all of them is 300 kB, well within a statement."""
TABLES: Final = 32
"""Tables of an agreement."""
OUTPUTS: Final = 64
"""Outputs of an agreement."""
COLUMNS: Final = 256
"""Columns of a table or an output."""
CELLS: Final = 100_000
"""Rows of an output: every combination of declared values has one."""
VERSIONS: Final = 64
"""Versions of a series that one bundle or one enclave takes."""
FORMER_ROSTERS: Final = 64
"""Rosters that a party may have signed before under one head; each distinct one is charged, so few are ever there."""
GROUPS: Final = 1 << 16
"""Groups of a table: a thousand million rows."""
GROUP_ROWS: Final = (1024, 4096, 16384)
"""Rows of a group. 16,384 rows of 8 bytes make frames that amortise a pull; small tables need not be padded to it."""
SEALING_KEY_BYTES: Final = 1216
"""A public key of MLKEM768_X25519."""
SEALED_KEYS_BYTES: Final = 4096
"""What a join seals: the KEM's 1,120 bytes, a content key for each table, a noise share."""
KMS_BLOB_BYTES: Final = 6144
"""A ciphertext of KMS, and what it sends to a recipient: the limits of its API."""
KMS_ANSWERS: Final = 16
"""Answers for one party that do not open, in one session: retries after that are guesses. An oracle would need thousands."""
KMS_OPEN_MS: Final = 100
"""When a refused answer of KMS is answered, counted from when its turn has come: many times what opening takes, so no step shows."""
STATEMENT_BYTES: Final = 1 << 20
"""One statement in its envelope."""
AGREEMENT_BYTES: Final = 8 << 20
"""One canonical agreement: several category domains of tens of thousands of codes (ICD-10) fit."""
OUTPUT_BYTES: Final = 16 << 20
"""One output's plaintext: 100,000 rows of 16 columns fit."""
SEALED_OUTPUT_BYTES: Final = OUTPUT_BYTES + 4096
"""The same, sealed: salt, KEM and tag beside it."""
RELEASE_BYTES: Final = 256 << 20
"""All outputs, each as often as it has recipients: an enclave holds them at once, and a bundle has room for the rest."""
BUNDLE_BYTES: Final = 512 << 20
"""A bundle: sealed once per output and recipient."""
CALLER_AGE_MS: Final = 5 * 60 * 1000
"""How long a caller statement may be valid: a stolen one is soon worthless."""

# Enclave process

NSM_REQUEST_BYTES: Final = 0x1000
"""NSM_REQUEST_MAX_SIZE of the kernel's driver."""
NSM_RESPONSE_BYTES: Final = 0x3000
"""NSM_RESPONSE_MAX_SIZE of the kernel's driver."""
NSM_TIMEOUT_MS: Final = 120 * 1000
"""After this the driver itself answers ETIMEDOUT."""
NSM_TIME_AGE_MS: Final = 60 * 1000
"""How long the monotonic clock carries the time of one document: its drift in a minute is below a millisecond."""
CONNECTIONS: Final = 128
"""Open connections of the host, each with a thread: two for each of 50 parties, and the serves of 16 workers."""
WORKERS: Final = 64
"""Workers of one enclave: one per vCPU of the largest parents."""
WORKER_ADDRESS_BYTES: Final = 4 << 30
"""Address space of a worker: a message of the greatest size twice, a window and a state, and libraries several times."""
WORKER_FILES: Final = 32
"""Open files of a worker: its control, one connection, and what an import opens."""
WORKER_THREADS: Final = 8
"""Threads that the workers' user may have for each worker: it works, pulls ahead, and waits for its end."""
WORKER_OOM_SCORE: Final = 500
"""Where memory runs out a worker ends, whose task is repeated, and never the process with the keys."""
ACCEPT_PAUSE_MS: Final = 50
"""After a connection that could not be accepted: long enough not to spin while descriptors are used up."""
ASK_TIMEOUT_MS: Final = 30 * 1000
"""From accepting a connection to the whole of its message: the host is a process on the same machine."""
ANSWER_TIMEOUT_MS: Final = 30 * 1000
"""To hand an answer to the host; one that does not read is cut off."""
PULL_TIMEOUT_MS: Final = 120 * 1000
"""One Pull: the host may have to fetch the frames from a remote store."""
PULL_RANGES: Final = 4096
"""Ranges of one Pull: every frame of a window, far below a message."""
SERVE_WAIT_MS: Final = 10 * 60 * 1000
"""How long a task waits for a Serve connection: a coordinator may restart in the middle of a computation."""
TASK_ATTEMPTS: Final = 8
"""How often a task is tried on a new worker or connection before the session is lost."""
PROGRESS_MS: Final = 1000
"""Between two Progress messages: they also tell the host that the enclave lives."""
WORKER_MESSAGE_BYTES: Final = 1 << 30
"""One message between the main process and a worker: the key index and the tags of a table of the greatest size."""
WORKER_HEADER_BYTES: Final = 64 << 20
"""The CBOR part of it; agreements are in it."""

# Agreements

INT_BOUND: Final = (1 << 63) - 1
"""Greatest magnitude of a whole number: 64 bits, whose least value stands for null."""
FLOAT_BOUND: Final = 1e100
"""Greatest magnitude of a float: its square, and sums of squares over all rows, are finite."""
DECIMAL_SCALE: Final = 18
"""Digits after the point of a decimal: 64 bits hold no more."""
CATEGORY_VALUES: Final = 200_000
"""Values of a category: ICD-10 with its national extensions has less than half of that."""
AGREEMENT_PROBLEMS: Final = 100
"""Problems that one check of an agreement reports: more, nobody reads at once."""
BY_COLUMNS: Final = 32
"""Columns of a `by`: 17 of two values each are more cells than an output has."""
BIN_EDGES: Final = 1000
"""Edges of the bins of one `by`: more is a histogram."""
ROWS_PER_UNIT: Final = 1_000_000
"""Rows of one unit in one upload: the engine keeps a unit's rows in one window."""
TEXT_BYTES: Final = 4096
"""The purpose of an agreement: a page at most, since people must read it."""
EXPRESSION_CHARACTERS: Final = 1000
"""A condition: what is longer, nobody reads before signing."""
EXPRESSION_DEPTH: Final = 64
"""Nesting of a condition: keeps recursion far from the stack's end."""
DURATION_MS: Final = 366 * 86_400_000
"""A deadline: an enclave that waits longer than a year is not waiting for data."""
RELEASES: Final = 100_000
"""`max_releases`: every hour for eleven years."""
MEASUREMENTS: Final = 64
"""Accepted images of one agreement: each is one more that must be trusted."""
OUTPUT_VALUES: Final = 1_600_000
"""Cells times columns of an output: its plaintext stays within OUTPUT_BYTES."""
REFERENCED_FILE_BYTES: Final = 16 << 20
"""A file that an agreement names: a domain of the greatest size fits."""
SIGNED_AGREEMENT_BYTES: Final = AGREEMENT_BYTES + MEMBERS * 1024
"""The same with a signature of each member."""

# Identities

KEY_FILE_BYTES: Final = 16 << 10
"""A file of a private or a public key: the longest has 3 kB."""
SCRYPT_N: Final = 1 << 17
"""Work of a passphrase: about half a second and 128 MiB (OWASP's advice for scrypt)."""
PASSPHRASE_BYTES: Final = 1024
"""A passphrase: more is a mistake such as a whole file."""

# Coordinator

CHUNK_BYTES: Final = 1 << 20
"""One message of an upload or a bundle: large enough for the wire, small enough that many streams fit in memory."""
SYNC_BYTES: Final = 32 << 20
"""How much of an upload may be on its way to the disk before it is fsynced and becomes `stored`."""
RPC_BYTES: Final = AGREEMENT_BYTES + (4 << 20)
"""One gRPC message: an agreement of the greatest size with the signatures of all its members."""
REQUEST_ID_BYTES: Final = (16, 64)
"""Least and most bytes of a caller's request id: unguessable, and no place to store things."""
ENCLAVES: Final = 4
"""Enclaves on one parent instance: what the Nitro hypervisor allows."""
BLOB_RANGES: Final = 65_536
"""Ranges of one Pull: a window of 17 parties and 256 columns has 4,352."""
CALLER_BYTES: Final = 1024
"""A caller statement in its envelope has less than 300."""

# Engine

ADMISSION_BYTES: Final = 4 << 20
"""Ciphertext that admission holds at a time: several groups, so that a pull is worth its round trip."""
WINDOW_ROWS: Final = 1 << 17
"""Rows that a window of the scan aims at: arrays that stay in a core's cache, operations that outweigh their calls."""
WINDOW_BYTES: Final = 160 << 20
"""Estimated memory of one window in one worker; a computation that needs more is refused before it begins."""
STATE_BYTES: Final = 128 << 20
"""State of all outputs of one range: cells x parties x rules; a computation that needs more is refused."""
PARTIALS_BYTES: Final = 256 << 20
"""States of all ranges together, which the main process holds until it has merged them."""
RANGES: Final = 64
"""Key ranges of a scan: at most so many workers share it."""
RANGE_GROUPS: Final = 16
"""Groups that a range has for each upload, at least: the one that each range shares with the next is read twice."""

# Client

TEXT_LINE_BYTES: Final = 2 * 10**6
"""One line of a CSV file: a table of 256 columns is far below; a cell of 10 MB is an open quote or no table at all."""
CHAIN_RECORDS: Final = 10_000
"""Records of a series that a client takes from a host in one answer: each is an attested release."""
MEASUREMENT_NOTICE_MS: Final = 14 * 86_400_000
"""Before the `until` of the image that runs: time for all members to sign the amendment that accepts the next one."""
