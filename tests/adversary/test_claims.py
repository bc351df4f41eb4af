"""What the host shows a client that is not so: documents, offers, receipts, rosters, records, bundles of its own making.

Each attack is refused at the step it names, and succeeds against a client without that check.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from parley_deploy.nsm import LocalRoot
from parley_protocol import claims, cose, hpke
from parley_protocol.agreement.model import Agreement, Measurement, Platform
from parley_protocol.attestation import policy
from parley_protocol.attestation.policy import RootPolicy
from parley_protocol.attestation.verify import verify_live
from parley_protocol.bundle import Bundle, open_output, verify_bundle
from parley_protocol.chain import verify_chain, verify_lineage
from parley_protocol.claims import VerifiedOffer
from parley_protocol.errors import AgreementError, VerificationError
from parley_protocol.transcript import (
    GENESIS,
    Caller,
    Join,
    Offer,
    Record,
    SealedOutput,
    offer_user_data,
    output_info,
    record_user_data,
)
from support import documents
from support.attacks import Attack, check_can_fail, check_refused, refusal
from support.world import NONCE, NOW, Paper, World, release, signed, world

LATER = NOW + 365 * 86_400_000
OTHER = b"\7" * 48


@dataclass
class Stage:
    """Two sessions of one agreement on paper, and an agreement of other members under the same root."""

    w: World
    other: World
    foreign: World

    @property
    def agreement(self) -> Agreement:
        return self.w.agreement


@pytest.fixture(scope="module")
def stage() -> Stage:
    first = world()
    strangers = world(max_releases=2)
    foreign = release(replace(strangers.agreement, root_sha256=first.root.sha256), first.root, strangers.members)
    return Stage(first, release(first.agreement, first.root, first.members), foreign)


def seen(
    agreement: Agreement, paper: Paper, *, offer: Offer | None = None, document: bytes | None = None, **changes: Any
) -> VerifiedOffer:
    """The offer as a client takes it."""
    arguments: dict[str, Any] = {"nonce": NONCE, "head": GENESIS, "now_ms": NOW + 2000, **changes}
    return claims.verify_offer(
        agreement, (offer or paper.offer).to_bytes(), document or paper.attest(arguments["nonce"]), **arguments
    )


# Which enclave


def foreign_image(stage: Stage) -> object:
    """The agreement wants another image than the one that runs."""
    other = Measurement(b"\1" * 48, b"\2" * 48, b"\3" * 48)
    wanted = replace(stage.agreement, measurements=(other,))
    running = Paper(stage.agreement, stage.w.root, pcr16=wanted.digest)
    running.offer = replace(running.offer, agreement=wanted.digest)
    return seen(wanted, running)


def stale_document(stage: Stage) -> object:
    """A document with the right nonce, kept for ten minutes."""
    return seen(stage.agreement, stage.w.paper, now_ms=NOW + 600_000)


def replayed_document(stage: Stage) -> object:
    """A document that was made for another caller, a moment ago."""
    return seen(stage.agreement, stage.w.paper, document=stage.w.paper.attest(os.urandom(32)))


def foreign_agreements_enclave(stage: Stage) -> object:
    """The same image, fed with another agreement, says what it is told of this one."""
    return seen(stage.agreement, Paper(stage.agreement, stage.w.root, pcr16=stage.foreign.agreement.digest))


def local_root_as_nitro(stage: Stage) -> object:
    """An agreement that says nitro, and a document under a root made on the spot."""
    nitro = replace(stage.agreement, platform=Platform.NITRO, root_sha256=None)
    return seen(nitro, Paper(nitro, stage.w.root))


def another_local_root(stage: Stage) -> object:
    """The simulated platform, under the attacker's own root."""
    return seen(stage.agreement, Paper(stage.agreement, LocalRoot.create(NOW)))


def altered(**changes: Any) -> Callable[[Stage], object]:
    def act(stage: Stage) -> object:
        """An offer whose fields were changed on the way, under the document of the right one."""
        return seen(stage.agreement, stage.w.paper, offer=replace(stage.w.paper.offer, **changes))

    return act


ATTACKER = Ed25519PrivateKey.generate()
SEALING = hpke.generate_sealing_key(os.urandom)


def offer_signed_by_the_host(stage: Stage) -> object:
    """The offer with the host's signing key: the document carries another statement, and another key."""
    key = ATTACKER.public_key().public_bytes_raw()
    return seen(stage.agreement, stage.w.paper, offer=replace(stage.w.paper.offer, signing_key=key))


def older_head(stage: Stage) -> object:
    """A genuine offer that continues a head from before the client's last release."""
    return seen(stage.agreement, stage.w.paper, head=stage.other.record.head)


def offer_of_a_foreign_agreement(stage: Stage) -> object:
    """The genuine offer and document of another agreement's enclave."""
    return seen(stage.agreement, stage.foreign.paper)


# Versions and chains


def amended(w: World, version: int = 2) -> Agreement:
    first = w.agreement
    return replace(
        first, version=version, replaces=first.digest, series_digest=first.digest, purpose="A test, amended."
    )


def record_of_a_foreign_series(stage: Stage) -> object:
    """A genuine record of a series with the same title, to use up the releases or to move the head."""
    foreign = stage.foreign.bundle
    return verify_chain([(foreign.record, foreign.record_document)], [stage.agreement], now_ms=LATER)


def record_of_an_older_version(stage: Stage) -> object:
    """After a record of version 2, one that an enclave of version 1 made on top of it."""
    second = amended(stage.w)
    new = release(second, stage.w.root, stage.w.members)
    old = release(stage.agreement, stage.w.root, stage.w.members, new.record.head, 2, 2)
    records = [(world.bundle.record, world.bundle.record_document) for world in (new, old)]
    return verify_chain(records, [stage.agreement, second], now_ms=LATER)


def forked_chain(stage: Stage) -> object:
    """Two records that follow the same head, as if one followed the other."""
    records = [(world.bundle.record, world.bundle.record_document) for world in (stage.w, stage.w)]
    return verify_chain(records, [stage.agreement], now_ms=LATER)


def version_of_another_series(stage: Stage) -> object:
    """A version 2 that its members signed as the successor of somebody else's version 1."""
    second = replace(amended(stage.foreign), members=stage.agreement.members)
    return verify_lineage([signed(item, stage.w.members) for item in (stage.agreement, second)])


def version_not_signed_by_all(stage: Stage) -> object:
    """An amendment that one member did not sign."""
    second = signed(amended(stage.w), stage.w.members)
    partly = replace(second, signatures={name: cose for name, cose in second.signatures.items() if name != "bea"})
    return verify_lineage([signed(stage.agreement, stage.w.members), partly])


# Receipts, rosters


def receipt(**changes: Any) -> Callable[[Stage], object]:
    def act(stage: Stage) -> object:
        """A receipt of this session's key for something else than the client's join."""
        made = stage.w.paper.sign(replace(stage.w.receipt("ada"), **changes))
        return claims.verify_receipt(made, stage.w.paper.offer, stage.w.joins["ada"])

    return act


def invented_receipt(stage: Stage) -> object:
    """A receipt that the host signed itself."""
    made = cose.sign(stage.w.receipt("ada").to_bytes(), ATTACKER)
    return claims.verify_receipt(made, stage.w.paper.offer, stage.w.joins["ada"])


def invented_roster(stage: Stage) -> object:
    """A roster that the host signed itself."""
    return claims.verify_roster(cose.sign(stage.w.roster.to_bytes(), ATTACKER), stage.w.paper.offer, stage.agreement)


def roster_of_another_session(stage: Stage) -> object:
    """The genuine roster of another session: another key, another offer."""
    return claims.verify_roster(stage.other.bundle.roster, stage.w.paper.offer, stage.agreement)


def consent_without_the_one_time_key(stage: Stage) -> object:
    """A second client of the member, or one with a restored backup, has its key but not the join's one-time key."""
    good = stage.w.consent("ada")
    forged = ATTACKER.sign(good.consent.to_bytes())
    statement = stage.w.by("ada", replace(good, one_time_signature=forged))
    return claims.verify_countersignature(statement, stage.w.roster, stage.agreement)


def consent_of_the_host(stage: Stage) -> object:
    """A countersignature that the host made for a party."""
    statement = cose.sign(stage.w.consent("ada").to_bytes(), ATTACKER)
    return claims.verify_countersignature(statement, stage.w.roster, stage.agreement)


# Records and bundles


def record_of(stage: Stage, body: dict[str, Any], key: Ed25519PrivateKey | None = None) -> tuple[bytes, bytes]:
    """An altered record, signed by `key`, with the document of the true one."""
    record = stage.w.record
    made = replace(record, body_bytes=replace(record.body, **body).to_bytes())
    return cose.sign(made.to_bytes(), key or stage.w.paper.key), stage.w.record_document


def altered_record(stage: Stage) -> object:
    """Other inputs in the record, under its document."""
    made, document = record_of(stage, {"inputs": stage.w.record.body.inputs[:1]}, ATTACKER)
    return claims.verify_record(made, document, stage.agreement, now_ms=LATER)


def record_signed_by_the_host(stage: Stage) -> object:
    """The true record under another signature."""
    made = cose.sign(stage.w.record.to_bytes(), ATTACKER)
    return claims.verify_record(made, stage.w.record_document, stage.agreement, now_ms=LATER)


def record_of_another_roster(stage: Stage) -> object:
    """A genuine record that is not of the roster beside it."""
    claims.verify_record_of_roster(stage.other.record, stage.w.paper.offer, stage.w.roster)
    return stage.other.record


def record_of_other_inputs(stage: Stage) -> object:
    """A record that names this roster and used something else."""
    body = replace(stage.w.record.body, inputs=stage.w.record.body.inputs[:1])
    claims.verify_record_of_roster(
        replace(stage.w.record, body_bytes=body.to_bytes()), stage.w.paper.offer, stage.w.roster
    )
    return body


def altered_output(stage: Stage) -> object:
    """Another table than the one that the record commits to."""
    (opened,) = stage.w.bundle.opened
    place = opened.plaintext.index(b"\x07\x08")
    changed = bytearray(opened.plaintext)
    changed[place] = 9
    verified = claims.verify_record(
        stage.w.bundle.record, stage.w.bundle.record_document, stage.agreement, now_ms=LATER
    )
    return open_output(verified, opened.output, opened.salt, bytes(changed))


def bundled(changes: Callable[[Stage], dict[str, Any]]) -> Callable[[Stage], object]:
    def act(stage: Stage) -> object:
        """A bundle put together of parts of others."""
        return verify_bundle(replace(stage.w.bundle, **changes(stage)).to_bytes(), now_ms=LATER)

    return act


def back_dated(stage: Stage) -> object:
    """Whoever gets an old leaf key makes offer, roster and record of an old session; no party signed that roster."""
    made = release(stage.agreement, stage.w.root, stage.w.members)
    return verify_bundle(replace(made.bundle, countersignatures=()).to_bytes(), now_ms=LATER)


# Calls


def caller_for_another_server(stage: Stage) -> object:
    """A caller statement that a false coordinator was given, shown to the true one."""
    statement = Caller(stage.agreement.members["ada"].signing, OTHER, NOW + 60_000)
    return claims.verify_caller(stage.w.by("ada", statement), b"\1" * 48, now_ms=NOW)


def caller_of_yesterday(stage: Stage) -> object:
    """A caller statement that has expired."""
    statement = Caller(stage.agreement.members["ada"].signing, OTHER, NOW - 1)
    return claims.verify_caller(stage.w.by("ada", statement), OTHER, now_ms=NOW)


def caller_for_ever(stage: Stage) -> object:
    """A caller statement that would be good for a year."""
    statement = Caller(stage.agreement.members["ada"].signing, OTHER, LATER)
    return claims.verify_caller(stage.w.by("ada", statement), OTHER, now_ms=NOW)


def caller_signed_by_another(stage: Stage) -> object:
    """A caller statement that names a member's key and is signed by another."""
    statement = Caller(stage.agreement.members["ada"].signing, OTHER, NOW + 60_000)
    return claims.verify_caller(stage.w.by("bea", statement), OTHER, now_ms=NOW)


ENCLAVE = {
    "foreign image": Attack("foreign image", "att-14", foreign_image),
    "stale document": Attack("stale document", "att-12", stale_document),
    "replayed document": Attack("replayed document", "att-16", replayed_document),
    "foreign agreement's enclave": Attack("foreign agreement's enclave", "att-15", foreign_agreements_enclave),
    "local root as nitro": Attack("local root as nitro", "att-4", local_root_as_nitro),
    "another local root": Attack("another local root", "att-4", another_local_root),
    "offer of a foreign agreement": Attack(
        "offer of a foreign agreement", "off-2", offer_of_a_foreign_agreement, ("att-15",)
    ),
    "older head": Attack("older head", "off-6", older_head),
    "altered head": Attack("altered head", "att-17", altered(head=OTHER), ("off-6",)),
    "altered sealing key": Attack("altered sealing key", "att-17", altered(sealing_key=SEALING.public)),
    "altered session": Attack("altered session", "att-17", altered(session=bytes(16))),
    "host's signing key": Attack("host's signing key", "att-17", offer_signed_by_the_host, ("att-18",)),
}
VERSIONS = {
    attack.name: attack
    for attack in (
        Attack("record of an older version", "chn-1", record_of_an_older_version),
        Attack("forked chain", "chn-2", forked_chain, ("chn-3", "chn-4")),
        Attack("version of another series", "lin-2", version_of_another_series),
        Attack("version not signed by all", "agr-7", version_not_signed_by_all),
    )
}
RECEIPTS = {
    attack.name: attack
    for attack in (
        Attack("invented receipt", "rcp-1", invented_receipt),
        Attack("receipt of another session", "rcp-2", receipt(offer=OTHER)),
        Attack("receipt of another join", "rcp-3", receipt(join=OTHER)),
        Attack("receipt of other uploads", "rcp-3", receipt(uploads=(OTHER,))),
    )
}
ROSTERS = {
    attack.name: attack
    for attack in (
        Attack("invented roster", "ros-1", invented_roster),
        Attack("roster of another session", "ros-1", roster_of_another_session, ("ros-2",)),
        Attack("consent without the one-time key", "cos-4", consent_without_the_one_time_key),
        Attack("consent of the host", "cos-3", consent_of_the_host),
    )
}
RECORDS = {
    attack.name: attack
    for attack in (
        Attack("altered record", "att-17", altered_record, ("rec-3",)),
        Attack("record signed by the host", "rec-3", record_signed_by_the_host),
        Attack("record of another roster", "rec-6", record_of_another_roster),
        Attack("record of other inputs", "rec-7", record_of_other_inputs),
        Attack("altered output", "bun-9", altered_output),
        Attack(
            "record of another session in a bundle",
            "bun-6",
            bundled(
                lambda s: {
                    "record": s.other.bundle.record,
                    "record_document": s.other.bundle.record_document,
                    "opened": (),
                }
            ),
            ("rec-6",),
        ),
        Attack("outputs left out", "bun-8", bundled(lambda s: {"sealed": s.w.bundle.sealed[1:]})),
        Attack("no countersignatures", "bun-5", back_dated),
    )
}
CALLERS = {
    attack.name: attack
    for attack in (
        Attack("caller for another server", "cal-2", caller_for_another_server),
        Attack("caller of yesterday", "cal-3", caller_of_yesterday),
        Attack("caller for ever", "cal-3", caller_for_ever),
        Attack("caller signed by another", "cal-1", caller_signed_by_another),
    )
}
ALL = [attack for group in (ENCLAVE, VERSIONS, RECEIPTS, ROSTERS, RECORDS, CALLERS) for attack in group.values()]


@pytest.mark.parametrize("attack", ALL, ids=str)
def test_every_attack_is_refused_at_its_step(stage: Stage, attack: Attack) -> None:
    check_refused(attack, stage)


# Its check is a comparison of which the rest makes use; it has a mutant of its own below.
@pytest.mark.parametrize("attack", [attack for attack in ALL if attack.name != "foreign image"], ids=str)
def test_every_attack_succeeds_without_its_checks(stage: Stage, attack: Attack) -> None:
    check_can_fail(attack, stage)


def test_a_foreign_image_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused(ENCLAVE["foreign image"], stage)
    # A debug enclave: one of PCR0, 1 and 2 is zero, or all of them.
    for zero in ((0,), (1,), (2,), (0, 1, 2)):
        document = documents.document(pcrs=dict.fromkeys(zero, bytes(48)))
        step = refusal(
            lambda document=document: verify_live(
                document,
                policy=documents.policy(),
                nonce=documents.NONCE,
                user_data=documents.USER_DATA,
                public_key=documents.PUBLIC_KEY,
                now_ms=documents.NOW,
            )
        )
        assert step == "att-13"
    with pytest.raises(AgreementError, match="debug"):
        Measurement(bytes(48), b"\2" * 48, b"\3" * 48) and replace(
            stage.agreement, measurements=(Measurement(bytes(48), b"\2" * 48, b"\3" * 48),)
        )
    monkeypatch.setattr(policy.Measurement, "matches", lambda _self, _pcrs: True)
    assert ENCLAVE["foreign image"].act(stage)


def test_a_stale_document_is_refused(stage: Stage) -> None:
    check_refused(ENCLAVE["stale document"], stage)
    check_refused(ENCLAVE["replayed document"], stage)


def test_a_foreign_agreements_enclave_is_refused(stage: Stage) -> None:
    check_refused(ENCLAVE["foreign agreement's enclave"], stage)
    check_refused(ENCLAVE["offer of a foreign agreement"], stage)


def test_nitro_with_a_local_root_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    # By the agreement that names the root, by the policy that is made of one, and by the verifier without either.
    with pytest.raises(AgreementError, match="platform nitro"):
        replace(stage.agreement, platform=Platform.NITRO)
    with pytest.raises(AgreementError, match="platform nitro"):
        RootPolicy("nitro", stage.w.root.sha256)
    check_refused(ENCLAVE["local root as nitro"], stage)
    # And real hardware cannot be called simulated.
    for known in policy.NITRO_ROOTS:
        with pytest.raises(AgreementError, match="simulated"):
            replace(stage.agreement, root_sha256=known)
    monkeypatch.setattr(policy, "NITRO_ROOTS", frozenset({stage.w.root.sha256}))
    assert ENCLAVE["local root as nitro"].act(stage)


def test_an_altered_offer_is_refused(stage: Stage) -> None:
    for name in ("altered head", "altered sealing key", "altered session", "host's signing key"):
        check_refused(ENCLAVE[name], stage)


def test_every_altered_byte_of_an_offer_or_its_document_is_refused(stage: Stage) -> None:
    offer, document = stage.w.paper.offer.to_bytes(), stage.w.paper.attest()

    def spoiled(data: bytes, place: int) -> bytes:
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    def accept(offer: bytes, document: bytes) -> object:
        return claims.verify_offer(stage.agreement, offer, document, nonce=NONCE, head=GENESIS, now_ms=NOW + 2000)

    assert accept(offer, document)
    for place in range(0, len(offer), 61):
        assert refusal(lambda place=place: accept(spoiled(offer, place), document))
    for place in range(0, len(document), 211):
        assert refusal(lambda place=place: accept(offer, spoiled(document, place)))


def test_a_document_of_a_record_cannot_stand_for_an_offer(stage: Stage) -> None:
    paper = stage.w.paper
    document = paper.document(record_user_data(paper.offer.to_bytes()), NONCE)
    assert refusal(lambda: seen(stage.agreement, paper, document=document)) == "att-17"
    document = paper.document(offer_user_data(stage.w.record.to_bytes()), None)
    made = paper.sign(stage.w.record)
    assert refusal(lambda: claims.verify_record(made, document, stage.agreement, now_ms=LATER)) == "att-17"


def test_a_forked_chain_or_an_unsigned_version_is_refused(stage: Stage) -> None:
    for attack in VERSIONS.values():
        check_refused(attack, stage)
    assert refusal(lambda: record_of_a_foreign_series(stage)) == "chn-1"


def test_a_receipt_the_host_invents_is_refused(stage: Stage) -> None:
    for attack in RECEIPTS.values():
        check_refused(attack, stage)


def test_an_altered_record_or_output_is_refused(stage: Stage) -> None:
    for attack in RECORDS.values():
        check_refused(attack, stage)


def test_a_release_of_another_recipient_does_not_open(stage: Stage) -> None:
    bundle: Bundle = stage.w.bundle
    for item in bundle.sealed:
        info = output_info(stage.w.record.head, item.output, item.recipient)
        assert SealedOutput.from_bytes(stage.w.members[item.recipient].open(item.sealed, info)).plaintext
        for name, identity in stage.w.members.items():
            if name != item.recipient:
                with pytest.raises(VerificationError, match="idn-4"):
                    identity.open(item.sealed, info)
        # The right recipient, told that it is of another release, output or member.
        for wrong in (
            output_info(stage.other.record.body.previous, item.output, item.recipient),
            output_info(stage.w.record.head, "other", item.recipient),
            output_info(stage.w.record.head, item.output, "eve"),
        ):
            with pytest.raises(VerificationError, match="idn-4"):
                stage.w.members[item.recipient].open(item.sealed, wrong)


def test_a_record_without_countersignatures_is_refused(stage: Stage) -> None:
    check_refused(RECORDS["no countersignatures"], stage)
    both = stage.w.bundle.countersignatures
    for some in (both[:1], both[1:], (both[0], both[0])):
        assert refusal(partial(bundled(lambda _stage, some=some: {"countersignatures": some}), stage)) == "bun-5"


def test_a_caller_statement_for_another_server_is_refused(stage: Stage) -> None:
    for attack in CALLERS.values():
        check_refused(attack, stage)


def test_a_verified_offer_cannot_be_made_by_hand(stage: Stage) -> None:
    offer = stage.w.paper.offer
    enclave = seen(stage.agreement, stage.w.paper).enclave
    with pytest.raises(TypeError):
        VerifiedOffer(stage.agreement, offer, offer.digest, enclave, object())
    with pytest.raises((TypeError, ValueError)):
        replace(seen(stage.agreement, stage.w.paper), offer=replace(offer, sealing_key=SEALING.public))  # type: ignore[call-arg]


def test_nothing_signed_for_one_purpose_stands_for_another(stage: Stage) -> None:
    """Every signed statement of a member, offered wherever the signature of that member is asked for."""
    w = stage.w
    statements = {
        "join": w.by("ada", w.joins["ada"]),
        "upload": w.by("ada", w.uploads["ada"]),
        "consent": w.by("ada", w.consent("ada")),
    }
    accept: dict[str, Callable[[bytes], object]] = {
        "join": lambda data: claims.verify_join(data, w.paper.offer, w.agreement),
        "upload": lambda data: claims.verify_upload(data, w.agreement),
        "consent": lambda data: claims.verify_countersignature(data, w.roster, w.agreement),
    }
    for kind, data in statements.items():
        for wanted, check in accept.items():
            if kind == wanted:
                assert check(data)
            else:
                assert refusal(lambda check=check, data=data: check(data)) == "malformed"
    session = {
        "roster": w.paper.sign(w.roster),
        "receipt": w.paper.sign(w.receipt("ada")),
        "record": w.paper.sign(w.record),
    }
    join: Join = w.joins["ada"]
    assert refusal(lambda: claims.verify_receipt(session["roster"], w.paper.offer, join)) == "malformed"
    assert refusal(lambda: claims.verify_roster(session["receipt"], w.paper.offer, w.agreement)) == "malformed"
    assert refusal(lambda: Record.from_bytes(cose.payload_unverified(session["roster"]))) == "malformed"
