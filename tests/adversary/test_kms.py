"""Those who operate KMS calls as attackers: the same genuine image under an agreement of their own (REVIEW E2)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from parley_protocol.agreement.key_arn import KeyArn
from parley_protocol.claims import VerifiedOffer
from parley_protocol.transcript import KmsJoin
from parley_protocol.v1 import enclave_pb2 as pb
from support.aws import COORDINATOR, Aws, aws
from support.enclave import Run, Simulation, agreement_of, identities, payload, rows_of
from support.kms import arn

pytestmark = pytest.mark.timeout(180)


class Stage:
    """A victim's run under its agreement, and the attackers' run of the same image under theirs, before one KMS."""

    def __init__(self, folder: Path, cloud: Aws, simulation: Simulation) -> None:
        self.aws = cloud
        self.key: KeyArn = cloud.make_key()
        self.victim = self._run(simulation, ("amber", "birch"), {"amber": self.key})
        cloud.agree(self.key, self.victim.agreement)
        # Its ciphertext lies with the coordinator.
        self.join = self.victim.parties["amber"].kms_join(cloud.key(self.key))
        other = Simulation(folder)
        other.root, other.registers = simulation.root, simulation.registers
        self.other = other.boot()
        self.attackers = self._run(self.other, ("mallory", "moe"), {"mallory": arn()})

    @staticmethod
    def _run(simulation: Simulation, names: tuple[str, ...], kms: dict[str, KeyArn]) -> Run:
        members = identities(names)
        agreement = agreement_of(simulation, members, kms=kms)
        rows = {name: {"visits": rows_of(number, 900)} for number, name in enumerate(names)}
        run = Run(simulation, agreement, members, rows)
        run.load()
        return run

    def close(self) -> None:
        self.victim.close()
        self.attackers.close()
        self.other.end()

    def decrypt(self, document: bytes) -> bytes:
        """What KMS answers the coordinator for the victim's ciphertext and a document."""
        amber = self.victim.parties["amber"]
        answer = self.aws.client(COORDINATOR).decrypt(
            KeyId=self.key.text,
            CiphertextBlob=KmsJoin.from_bytes(payload(self.join.cose)).ciphertext,
            EncryptionContext=amber.kms_context,
            Recipient={"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256", "AttestationDocument": document},
        )
        assert "Plaintext" not in answer
        return answer["CiphertextForRecipient"]

    def denied(self, document: bytes) -> str:
        """The code with which KMS refuses."""
        with pytest.raises(ClientError) as caught:
            self.decrypt(document)
        return str(caught.value.response["Error"]["Code"])

    def stolen(self, offer: VerifiedOffer) -> pb.KmsJoin:
        """The attackers' own join, with the victim's ciphertext in it."""
        ciphertext = KmsJoin.from_bytes(payload(self.join.cose)).ciphertext
        join = self.attackers.parties["mallory"].kms_join(self.aws.key(self.key), ciphertext=ciphertext)
        return pb.KmsJoin(session=offer.offer.session, cose=join.cose, uploads=join.uploads)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    (tmp_path / "victim").mkdir()
    (tmp_path / "attackers").mkdir()
    (tmp_path / "root").mkdir()
    with Simulation(tmp_path / "victim") as simulation:
        simulation.root.save(tmp_path / "root")
        with aws(tmp_path / "kms", tmp_path / "root") as cloud:
            made = Stage(tmp_path / "attackers", cloud, simulation)
            try:
                yield made
            finally:
                made.close()


def _without(policy: dict[str, Any], register: str) -> dict[str, Any]:
    for statement in policy["Statement"]:
        conditions = statement.get("Condition", {}).get("StringEqualsIgnoreCase", {})
        conditions.pop(f"kms:RecipientAttestation:{register}", None)
    return policy


def test_the_same_image_under_another_agreement_gets_no_key(stage: Stage) -> None:
    offer = stage.attackers.offer()
    document = stage.attackers.recipient(offer, stage.stolen(offer))
    assert stage.denied(document) == "AccessDeniedException"
    # The same ciphertext, image and key, under the agreement that the policy names.
    right = stage.victim.offer()
    answer = stage.decrypt(stage.victim.recipient(right, stage.join))
    stage.victim.host.want("joined", kms_join=stage.victim.answering(right, stage.join, answer))


def test_without_pcr16_in_the_policy_kms_answers_them_and_the_enclave_still_refuses(stage: Stage) -> None:
    stage.aws.put(stage.key, _without(stage.aws.policy(stage.key), "PCR16"))
    offer = stage.attackers.offer()
    stolen = stage.stolen(offer)
    answer = stage.decrypt(stage.attackers.recipient(offer, stolen))
    assert stage.attackers.host.refused(kms_join=stage.attackers.answering(offer, stolen, answer)) == "key"
    # Nor does it take the victim's own statement, which names its agreement.
    asked = pb.Recipient(session=offer.offer.session, cose=stage.join.cose, uploads=stage.join.uploads)
    assert stage.attackers.host.refused(recipient=asked) == "agreement"


def test_no_other_document_of_the_enclave_opens_a_key(stage: Stage) -> None:
    """The documents of offers and records carry a session's Ed25519 key, for which KMS seals nothing."""
    stage.victim.offer()
    assert stage.denied(stage.victim.document) in ("ValidationException", "InvalidCiphertextException")


def test_after_a_revocation_no_document_helps(stage: Stage) -> None:
    offer = stage.victim.offer()
    document = stage.victim.recipient(offer, stage.join)
    stage.decrypt(document)
    stage.aws.revoke(stage.key)
    assert stage.denied(document) == "AccessDeniedException"
    assert stage.denied(stage.victim.recipient(offer, stage.join)) == "AccessDeniedException"


def test_a_ciphertext_is_bound_to_agreement_party_and_uploads(stage: Stage) -> None:
    offer = stage.victim.offer()
    amber = stage.victim.parties["amber"]
    for name in ("parley:agreement", "parley:party", "parley:uploads"):
        context = dict(amber.kms_context)
        amber.kms_context = context | {name: "other"}
        assert stage.denied(stage.victim.recipient(offer, stage.join)) == "InvalidCiphertextException"
        amber.kms_context = context
    assert stage.decrypt(stage.victim.recipient(offer, stage.join))
