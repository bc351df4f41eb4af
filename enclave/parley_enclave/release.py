"""The release: outputs committed in a record, sealed to each recipient, the record signed and attested.

Nothing in the record's body is random or a time: the same inputs under the same head give the same body (REVIEW T5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from parley_enclave import ENGINE_VERSION
from parley_enclave.keys import SessionKeys
from parley_enclave.nsm import Nsm
from parley_protocol import cose, hpke
from parley_protocol.agreement.model import Agreement
from parley_protocol.chain import ChainState
from parley_protocol.encoding import sha384
from parley_protocol.errors import MalformedError
from parley_protocol.output import OutputTable
from parley_protocol.transcript import (
    Committed,
    Offer,
    Record,
    RecordBody,
    Roster,
    SealedOutput,
    noise_key,
    output_commitment,
    output_info,
    output_salt,
    record_user_data,
)


@dataclass(frozen=True, slots=True)
class Sealed:
    """One output for one recipient."""

    output: str
    recipient: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Release:
    """What the host takes away. `record` is the digest of the record statement."""

    record: bytes
    cose: bytes = field(repr=False)
    document: bytes = field(repr=False)
    outputs: tuple[Sealed, ...] = field(repr=False)


def make(
    agreement: Agreement,
    offer: Offer,
    roster: Roster,
    *,
    chain: ChainState,
    charge: int,
    tables: Sequence[OutputTable],
    shares: Sequence[bytes],
    keys: SessionKeys,
    nsm: Nsm,
) -> Release:
    """The release (ses-13) of `tables`, one for each output of the agreement in its order, with `shares` in the roster's order."""
    if [table.name for table in tables] != list(agreement.outputs):
        raise MalformedError("the outputs are not the agreement's")
    key = noise_key(tuple(shares), agreement.digest, offer.head, roster.inputs_digest)
    plaintexts = {
        table.name: SealedOutput.of(output_salt(key, table.name), table.to_bytes(), table.widest) for table in tables
    }
    body = RecordBody(
        agreement=agreement.digest,
        engine=ENGINE_VERSION,
        inputs=tuple(entry.input for entry in roster.included),
        absentees=roster.absentees,
        outputs=tuple(
            Committed(name, output.recipients, output_commitment(plaintexts[name].salt, plaintexts[name].plaintext))
            for name, output in agreement.outputs.items()
        ),
        privacy=(),
        sequence=chain.sequence + 1,
        charged=chain.charged + charge,
        previous=offer.head,
    )
    record = Record(body.to_bytes(), offer.session, offer.digest, roster.digest)
    sealed = tuple(
        Sealed(
            name,
            recipient,
            hpke.seal(
                agreement.members[recipient].sealing,
                plaintexts[name].to_bytes(),
                output_info(record.head, name, recipient),
            ),
        )
        for name, output in agreement.outputs.items()
        for recipient in output.recipients
    )
    statement = record.to_bytes()
    return Release(
        record=sha384(statement),
        cose=cose.sign(statement, keys.signing),
        document=nsm.attest(user_data=record_user_data(statement), public_key=keys.signing_public),
        outputs=sealed,
    )
