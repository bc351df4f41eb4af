"""The verifier of attestation documents: every step refuses what it is there to refuse, and nothing else is refused."""

from __future__ import annotations

import dataclasses
import hashlib
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from parley_deploy.pki import Issued, moment
from parley_protocol import cose, limits
from parley_protocol.agreement import model as agreed
from parley_protocol.attestation import roots
from parley_protocol.attestation.document import extended, parse_unverified
from parley_protocol.attestation.policy import Measurement, Policy, RootPolicy
from parley_protocol.attestation.verify import (
    VerifiedEnclave,
    VerifiedStatement,
    check_document,
    verify_live,
    verify_statement,
)
from parley_protocol.encoding import Value, decode, encode
from parley_protocol.errors import AgreementError, MalformedError, VerificationError
from support.documents import (
    AGREEMENT,
    IMAGE,
    INSTANCE,
    MODULE,
    NONCE,
    NOW,
    PUBLIC_KEY,
    USER_DATA,
    altered_chain,
    chain,
    document,
    extended_certificate,
    payload,
    policy,
    root_sha256,
)
from support.enclave import Simulation, agreement_of, identities

HOUR = 3_600_000


def live(data: bytes, **changes: Any) -> VerifiedEnclave:
    arguments: dict[str, Any] = {
        "policy": policy(),
        "nonce": NONCE,
        "user_data": USER_DATA,
        "public_key": PUBLIC_KEY,
        "now_ms": NOW,
    }
    return verify_live(data, **{**arguments, **changes})


def stated(data: bytes, **changes: Any) -> VerifiedStatement:
    arguments: dict[str, Any] = {
        "policy": policy(),
        "user_data": USER_DATA,
        "public_key": PUBLIC_KEY,
        "nonce_present": True,
        "now_ms": NOW,
    }
    return verify_statement(data, **{**arguments, **changes})


def refuses(step: str, data: bytes, code: str = "attestation", **changes: Any) -> None:
    """Both functions refuse `data`, at `step`."""
    for function in (live, stated):
        with pytest.raises(VerificationError) as refusal:
            function(data, **changes)
        assert (refusal.value.step, refusal.value.code) == (step, code)


def refuses_chain(step: str, certificates: tuple[Issued, ...], code: str = "attestation") -> None:
    """A document under this chain is refused at `step`, though its root is the pinned one."""
    refuses(step, document(certificates), code, policy=policy(certificates))


def test_a_good_document_is_verified() -> None:
    enclave = live(document())
    assert (enclave.module_id, enclave.timestamp_ms, enclave.measurement) == (MODULE, NOW, IMAGE)
    assert (enclave.public_key, enclave.user_data, enclave.nonce) == (PUBLIC_KEY, USER_DATA, NONCE)
    assert enclave.pcrs[16] == extended(AGREEMENT)
    assert enclave.simulated
    assert stated(document()).timestamp_ms == NOW


def test_a_statement_holds_for_ever_and_an_enclave_does_not() -> None:
    later = NOW + 20 * 365 * 24 * HOUR
    assert stated(document(nonce=None), nonce_present=False, now_ms=later).nonce is None
    with pytest.raises(VerificationError) as refusal:
        live(document(), now_ms=later)
    assert refusal.value.step == "att-8"


# att-1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xd2" + document(),
        document() + b"\0",
        document()[:-1],
        encode([]),
        bytes(limits.DOCUMENT_BYTES + 1),
        document(user_data=bytes(limits.DOCUMENT_BYTES)),
    ],
    ids=["empty", "tag 18", "trailing byte", "truncated", "empty array", "too long", "too long and well-formed"],
)
def test_att_1_refuses_what_is_no_envelope(data: bytes) -> None:
    refuses("att-1", data, "malformed")
    with pytest.raises(MalformedError):
        parse_unverified(data)


def test_att_1_refuses_an_unprotected_header() -> None:
    envelope = decode(document())
    assert type(envelope) is list
    header: dict[int, Value] = {4: b"kid"}
    envelope[1] = header
    refuses("att-1", encode(envelope), "malformed")


# att-2


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": None},
        {"nitrotpm_pcrs": {0: bytes(48)}},
        {"module_id": ""},
        {"module_id": b"i-0"},
        {"module_id": "i" * 129},
        {"digest": None},
        {"timestamp": 0},
        {"timestamp": -1},
        {"timestamp": 1.5},
        {"timestamp": 1 << 63},
        {"timestamp": True},
        {"certificate": b""},
        {"certificate": bytes(1025)},
        {"certificate": None},
        {"cabundle": None},
        {"cabundle": []},
        {"cabundle": [b"x"] * 3},
        {"cabundle": [b"x"] * 5},
        {"cabundle": [b"x"] * 3 + [b""]},
        {"cabundle": [b"x"] * 3 + ["x"]},
        {"public_key": b""},
        {"public_key": bytes(1025)},
        {"public_key": "key"},
        {"user_data": bytes(1025)},
        {"user_data": 0},
        {"nonce": bytes(1025)},
        {"nonce": []},
        {"pcrs": {32: bytes(48)}},
        {"pcrs": {3: bytes(47)}},
        {"pcrs": {3: "register"}},
    ],
    ids=lambda changes: "-".join(f"{name}" for name in changes),
)
def test_att_2_refuses_a_field_of_another_shape(changes: dict[str, Any]) -> None:
    refuses("att-2", document(**changes), "malformed")
    with pytest.raises(MalformedError):
        parse_unverified(document(**changes))


@pytest.mark.parametrize("key", sorted(payload()))
def test_att_2_refuses_a_document_that_lacks_a_key(key: str) -> None:
    fields = payload()
    del fields[key]
    refuses("att-2", cose.sign(cbor2.dumps(fields), chain()[-1].key), "malformed")


def test_att_2_refuses_the_registers_of_a_nitro_tpm() -> None:
    fields = payload(module_id=f"{INSTANCE}-tpm0000000000000000")
    fields["nitrotpm_pcrs"] = fields.pop("pcrs")
    data = cose.sign(cbor2.dumps(fields), chain()[-1].key)
    refuses("att-2", data, "malformed")
    with pytest.raises(MalformedError, match="NitroTPM"):
        parse_unverified(data)


@pytest.mark.parametrize("pcrs", [{}, [], None, [bytes(48)] * 16, {"0": bytes(48)}])
def test_att_2_refuses_registers_that_are_no_map_of_registers(pcrs: object) -> None:
    fields = payload()
    fields["pcrs"] = pcrs
    refuses("att-2", cose.sign(cbor2.dumps(fields), chain()[-1].key), "malformed")


def test_att_2_refuses_other_payloads_and_duplicate_keys() -> None:
    good = cbor2.dumps(payload())
    twice = bytes([good[0] + 1]) + good[1:] + cbor2.dumps("digest") + cbor2.dumps("SHA384")
    for data in (b"", b"\xf6", encode({1: b""}), good + b"\0", twice):
        refuses("att-2", cose.sign(data, chain()[-1].key), "malformed")


def test_att_2_accepts_a_payload_of_indefinite_length_as_real_modules_write_it() -> None:
    good = cbor2.dumps(payload())
    assert live(cose.sign(b"\xbf" + good[1:] + b"\xff", chain()[-1].key)).module_id == MODULE


def test_att_2_tells_null_from_empty() -> None:
    assert parse_unverified(document(user_data=None)).user_data is None
    assert parse_unverified(document(user_data=b"")).user_data == b""


# att-3


@pytest.mark.parametrize("changes", [{"digest": "SHA256"}, {"pcrs": {5: bytes(32)}}, {"pcrs": {5: bytes(64)}}])
def test_att_3_refuses_another_digest(changes: dict[str, Any]) -> None:
    refuses("att-3", document(**changes))


# att-4


def test_att_4_refuses_a_chain_with_another_root() -> None:
    other = altered_chain({})
    refuses("att-4", document(other))


def test_att_4_refuses_a_local_root_where_the_agreement_says_nitro() -> None:
    real = Policy((IMAGE,), RootPolicy.nitro(), AGREEMENT)
    refuses("att-4", document(), policy=real)


def test_att_4_refuses_the_pinned_root_anywhere_but_in_its_place() -> None:
    # The root of the policy is there, as the last of the bundle; the chain is another one's.
    other = altered_chain({})
    fields = payload(other)
    fields["cabundle"][3] = chain()[0].der
    refuses("att-4", cose.sign(cbor2.dumps(fields), other[-1].key))


# att-5


@pytest.mark.parametrize("place", range(1, 5))
def test_att_5_refuses_bytes_that_are_no_certificate(place: int) -> None:
    ders = [issued.der for issued in chain()]
    for bad in (b"x", ders[place][:-1], ders[place] + b"\0"):
        fields = payload([*ders[:place], bad, *ders[place + 1 :]])
        refuses("att-5", cose.sign(cbor2.dumps(fields), chain()[-1].key), "malformed")


@pytest.mark.parametrize("place", range(5))
def test_att_5_refuses_another_curve(place: int) -> None:
    refuses_chain_signed_by(altered_chain({place: {"key": generate_private_key(SECP256R1())}}))


def refuses_chain_signed_by(certificates: tuple[Issued, ...]) -> None:
    data = document(certificates, key=chain()[-1].key)
    refuses("att-5", data, policy=policy(certificates))


@pytest.mark.parametrize("place", range(1, 5))
def test_att_5_refuses_another_signature_algorithm(place: int) -> None:
    with_sha384, with_sha256 = bytes.fromhex("2a8648ce3d040303"), bytes.fromhex("2a8648ce3d040302")
    ders = [issued.der for issued in chain()]
    ders[place] = ders[place].replace(with_sha384, with_sha256)
    refuses("att-5", cose.sign(cbor2.dumps(payload(ders)), chain()[-1].key))


# att-6


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        (0, {"authority": False}),
        (0, {"path_length": 3}),
        (1, {"authority": False, "path_length": None}),
        (1, {"path_length": 1}),
        (1, {"path_length": None}),
        (2, {"path_length": 2}),
        (3, {"path_length": 1}),
        (3, {"path_length": None}),
        (3, {"usage": frozenset({"digital_signature"})}),
        (4, {"authority": True, "path_length": 0}),
        (4, {"usage": frozenset({"content_commitment"})}),
        (4, {"usage": frozenset({"digital_signature", "key_cert_sign"})}),
    ],
)
def test_att_6_refuses_a_certificate_for_another_use(place: int, changes: dict[str, Any]) -> None:
    refuses_chain("att-6", altered_chain({place: changes}))


@pytest.mark.parametrize("place", range(1, 5))
def test_att_6_refuses_a_critical_extension_that_it_does_not_know(place: int) -> None:
    good = chain()
    constraint = x509.NameConstraints([x509.DNSName("example.org")], None)
    altered = extended_certificate(good[place], good[place - 1], constraint)
    refuses_chain("att-6", (*good[:place], altered, *good[place + 1 :]))


@pytest.mark.parametrize("oid", ["551d13", "551d0f"], ids=["basicConstraints", "keyUsage"])
def test_att_6_refuses_a_certificate_without_its_constraints(oid: str) -> None:
    ders = [issued.der for issued in chain()]
    ders[4] = ders[4].replace(bytes.fromhex("0603" + oid), bytes.fromhex("0603551d7f"))
    refuses("att-6", cose.sign(cbor2.dumps(payload(ders)), chain()[-1].key))


# att-7


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (1, "a1.other.aws.nitro-enclaves"),
        (1, "a1.zonal.local.aws.nitro-enclaves"),
        (1, "A1.local.aws.nitro-enclaves"),
        (1, "0123456789abcdef0.local.aws.nitro-enclaves"),
        (1, "a1.local.aws.nitro-enclaves\n"),
        (2, "b2.zonal.other.aws.nitro-enclaves"),
        (2, "b2.local.aws.nitro-enclaves"),
        (3, f"{INSTANCE}.other.aws.nitro-enclaves"),
        (3, "i-0123456789abcdef1.local.aws.nitro-enclaves"),
        (4, f"{MODULE}.other.aws"),
        (4, f"{INSTANCE}-enc0123456789abcde0.local.aws"),
        (4, f"{MODULE}.local.aws.nitro-enclaves"),
    ],
)
def test_att_7_refuses_a_certificate_of_another_name(place: int, name: str) -> None:
    refuses_chain("att-7", altered_chain({place: {"name": name}}))


@pytest.mark.parametrize(("old", "new"), [("550403", "55040b"), ("55040a", "550403")], ids=["none", "two"])
def test_att_7_refuses_a_certificate_with_no_common_name_or_two(old: str, new: str) -> None:
    ders = [issued.der for issued in chain()]
    ders[4] = ders[4].replace(bytes.fromhex("0603" + old), bytes.fromhex("0603" + new))
    refuses("att-7", cose.sign(cbor2.dumps(payload(ders)), chain()[-1].key))


@pytest.mark.parametrize("module", [f"{INSTANCE}-tpm0123456789abcdef", INSTANCE, f"{MODULE}0", "enclave"])
def test_att_7_refuses_a_module_that_is_no_enclave(module: str) -> None:
    refuses("att-7", document(module_id=module))


# att-8


@pytest.mark.parametrize("place", range(5))
def test_att_8_refuses_a_certificate_that_is_not_valid_now(place: int) -> None:
    hour = timedelta(hours=1)
    for start in (moment(NOW) + hour, moment(NOW) - 2 * hour):
        refuses_chain("att-8", altered_chain({place: {"start": start, "life": hour}}), "expired")


def test_att_8_counts_both_ends_of_the_validity() -> None:
    exact = altered_chain({4: {"start": moment(NOW), "life": timedelta(seconds=100)}})
    pin = root_sha256(exact)
    data = document(exact)
    for at_ms in (NOW, NOW + 100_999):
        assert check_document(data, root_sha256=pin, at_ms=at_ms).module_id == MODULE
    for at_ms in (NOW - 1, NOW + 101_000):
        with pytest.raises(VerificationError) as refusal:
            check_document(data, root_sha256=pin, at_ms=at_ms)
        assert refusal.value.step == "att-8"


def test_att_8_bears_a_verifier_whose_clock_is_a_little_late() -> None:
    young = altered_chain({4: {"start": moment(NOW)}})
    assert live(document(young), policy=policy(young), now_ms=NOW - 5_000).module_id == MODULE
    with pytest.raises(VerificationError) as refusal:
        live(document(young), policy=policy(young), now_ms=NOW - limits.CLOCK_SKEW_MS - 1)
    assert refusal.value.step == "att-8"


# att-9


@pytest.mark.parametrize("place", range(1, 5))
def test_att_9_refuses_a_certificate_of_another_issuer(place: int) -> None:
    # An issuer of the same name with another key, and one with another name.
    other = altered_chain({})
    refuses_chain("att-9", (*chain()[:place], *other[place:]), "signature")
    stranger = altered_chain({0: {"name": "stranger"}})
    refuses_chain("att-9", (*chain()[:place], *altered_chain({place: {"issuer": stranger[0]}})[place:]), "signature")


@pytest.mark.parametrize("place", range(1, 5))
def test_att_9_refuses_an_altered_signature_of_a_certificate(place: int) -> None:
    ders = [issued.der for issued in chain()]
    ders[place] = ders[place][:-1] + bytes([ders[place][-1] ^ 1])
    refuses("att-9", cose.sign(cbor2.dumps(payload(ders)), chain()[-1].key), "signature")


# att-10


def test_att_10_refuses_a_document_that_its_certificate_did_not_sign() -> None:
    refuses("att-10", document(key=altered_chain({})[-1].key), "signature")
    refuses("att-10", cose.sign(cbor2.dumps(payload()), Ed25519PrivateKey.generate()), "signature")


def test_att_10_refuses_a_document_signed_by_the_instance() -> None:
    refuses("att-10", document(key=chain()[3].key), "signature")


# att-11


@pytest.mark.parametrize("register", [None, bytes(48), extended(b"i-0123456789abcdef1")])
def test_att_11_refuses_a_module_of_another_instance(register: bytes | None) -> None:
    refuses("att-11", document(pcrs={4: register}))


# att-12


def test_att_12_refuses_an_old_document_and_one_of_the_future() -> None:
    data = document()
    assert live(data, now_ms=NOW + limits.DOCUMENT_AGE_MS).timestamp_ms == NOW
    assert live(data, now_ms=NOW - limits.CLOCK_SKEW_MS).timestamp_ms == NOW
    with pytest.raises(VerificationError, match="too old") as refusal:
        live(data, now_ms=NOW + limits.DOCUMENT_AGE_MS + 1)
    assert (refusal.value.step, refusal.value.code) == ("att-12", "expired")
    refuses("att-12", data, "expired", now_ms=NOW - limits.CLOCK_SKEW_MS - 1)


def test_att_12_takes_the_age_from_the_policy() -> None:
    strict = Policy((IMAGE,), policy().root, AGREEMENT, max_age_ms=1000)
    assert live(document(), policy=strict, now_ms=NOW + 1000)
    with pytest.raises(VerificationError) as refusal:
        live(document(), policy=strict, now_ms=NOW + 1001)
    assert refusal.value.step == "att-12"


# att-13


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("register", [None, bytes(48)])
def test_att_13_refuses_a_debug_enclave(index: int, register: bytes | None) -> None:
    refuses("att-13", document(pcrs={index: register}))


# att-14


@pytest.mark.parametrize("index", [0, 1, 2])
def test_att_14_refuses_an_image_of_which_one_register_differs(index: int) -> None:
    refuses("att-14", document(pcrs={index: b"\7" * 48}))


def test_att_14_takes_the_three_registers_of_one_image_and_never_of_two() -> None:
    other = Measurement(b"\4" * 48, b"\5" * 48, b"\6" * 48)
    both = policy(None, IMAGE, other)
    assert live(document(), policy=both).measurement == IMAGE
    assert live(document(pcrs={0: other.pcr0, 1: other.pcr1, 2: other.pcr2}), policy=both).measurement == other
    refuses("att-14", document(pcrs={2: other.pcr2}), policy=both)


def test_att_14_asks_for_the_signer_where_the_policy_names_one() -> None:
    signed = dataclasses.replace(IMAGE, pcr8=b"\x08" * 48)
    assert live(document(pcrs={8: signed.pcr8}), policy=policy(None, signed)).measurement == signed
    refuses("att-14", document(), policy=policy(None, signed))
    refuses("att-14", document(pcrs={8: None}), policy=policy(None, signed))


def test_att_14_refuses_an_image_after_its_time() -> None:
    until = dataclasses.replace(IMAGE, until_ms=NOW)
    refuses("att-14", document(), "expired", policy=policy(None, until))
    later = dataclasses.replace(IMAGE, until_ms=NOW + 1000)
    assert live(document(), policy=policy(None, later)).measurement == later
    # A live enclave is judged by the verifier's clock, a statement by its own time.
    with pytest.raises(VerificationError) as refusal:
        live(document(), policy=policy(None, later), now_ms=NOW + 1000)
    assert refusal.value.step == "att-14"
    assert stated(document(), policy=policy(None, later), now_ms=NOW + HOUR).measurement == later


def test_att_14_takes_an_image_that_another_entry_still_accepts() -> None:
    ended = dataclasses.replace(IMAGE, until_ms=NOW - 1)
    assert live(document(), policy=policy(None, ended, IMAGE)).measurement == IMAGE


# att-15


@pytest.mark.parametrize(
    "register",
    [None, bytes(48), extended(b"another agreement"), AGREEMENT],
    ids=["not locked", "zero", "another agreement", "not extended"],
)
def test_att_15_refuses_another_agreement_in_pcr16(register: bytes | None) -> None:
    refuses("att-15", document(pcrs={16: register}), "agreement")


# att-16


@pytest.mark.parametrize("nonce", [None, b"", b"m" * 32, NONCE + b"\0"])
def test_att_16_refuses_another_nonce(nonce: bytes | None) -> None:
    with pytest.raises(VerificationError) as refusal:
        live(document(nonce=nonce))
    assert refusal.value.step == "att-16"


def test_att_16_refuses_a_statement_with_a_nonce_where_none_belongs_and_the_reverse() -> None:
    for nonce, present in ((NONCE, False), (b"", False), (None, True)):
        with pytest.raises(VerificationError) as refusal:
            stated(document(nonce=nonce), nonce_present=present)
        assert refusal.value.step == "att-16"


def test_att_16_takes_no_nonce_that_may_repeat() -> None:
    for nonce in (b"", b"n" * 15):
        with pytest.raises(ValueError, match="nonce"):
            live(document(nonce=nonce), nonce=nonce)


# att-17, att-18


@pytest.mark.parametrize("value", [None, b"", b"other"])
def test_att_17_refuses_other_user_data(value: bytes | None) -> None:
    refuses("att-17", document(user_data=value))


@pytest.mark.parametrize("value", [None, b"other", PUBLIC_KEY + b"\0"])
def test_att_18_refuses_another_key(value: bytes | None) -> None:
    refuses("att-18", document(public_key=value))


# What a policy and a result are


def test_the_two_results_cannot_stand_for_each_other_nor_be_made_by_hand() -> None:
    enclave, statement = live(document()), stated(document())
    assert not isinstance(enclave, VerifiedStatement) and not isinstance(statement, VerifiedEnclave)
    with pytest.raises(ValueError, match="token"):
        dataclasses.replace(enclave, module_id="other")  # type: ignore[call-arg]
    fields = {field.name: getattr(statement, field.name) for field in dataclasses.fields(statement)}
    for kind in (VerifiedEnclave, VerifiedStatement):
        with pytest.raises(TypeError, match="from the verifier"):
            kind(**fields, token=object())


def test_a_policy_that_accepts_nothing_or_everything_cannot_be_made() -> None:
    root = RootPolicy.simulated(root_sha256())
    for make in (
        lambda: Policy((), root, AGREEMENT),
        lambda: Policy((IMAGE,), root, b""),
        lambda: Policy((IMAGE,), root, AGREEMENT, max_age_ms=0),
        lambda: Policy((IMAGE,), root, AGREEMENT, max_age_ms=limits.DOCUMENT_AGE_MS + 1),
        lambda: Measurement(bytes(48), b"\1" * 48, b"\1" * 48),
        lambda: Measurement(b"\1" * 48, bytes(48), b"\1" * 48),
        lambda: Measurement(b"\1" * 48, b"\1" * 48, bytes(48)),
        lambda: Measurement(b"\1" * 48, b"\1" * 48, b"\1" * 47),
        lambda: Measurement(b"\1" * 48, b"\1" * 48, b"\1" * 48, bytes(48)),
        lambda: RootPolicy.simulated(b""),
        lambda: RootPolicy("simulated"),
        lambda: RootPolicy("else"),  # type: ignore[arg-type]
    ):
        with pytest.raises(AgreementError):
            make()


def test_nitro_with_a_root_of_its_own_and_simulated_with_the_real_root_cannot_be_made() -> None:
    with pytest.raises(AgreementError, match="no other"):
        RootPolicy("nitro", root_sha256())
    with pytest.raises(AgreementError, match="cannot be called simulated"):
        RootPolicy.simulated(roots.AWS_NITRO_ROOT_G1)
    assert set(RootPolicy.nitro().accepted) == {roots.AWS_NITRO_ROOT_G1}


def test_the_pinned_root_is_the_certificate_of_aws() -> None:
    der = roots.aws_nitro_root_g1()
    certificate = x509.load_der_x509_certificate(der)
    assert hashlib.sha256(der).digest() == roots.AWS_NITRO_ROOT_G1
    assert certificate.subject.rfc4514_string() == "CN=aws.nitro-enclaves,OU=AWS,O=Amazon,C=US"
    certificate.verify_directly_issued_by(certificate)


def test_a_policy_says_what_its_agreement_says(tmp_path: Path) -> None:
    image = agreed.Measurement(IMAGE.pcr0, IMAGE.pcr1, IMAGE.pcr2, b"\x08" * 48, until=date(2027, 1, 15))
    real = agreement_of(Simulation(tmp_path), identities(["ann", "bob"]))
    local = dataclasses.replace(real, root_sha256=root_sha256(), measurements=(image,))
    made = Policy.of(local)
    assert (made.agreement, made.root, made.max_age_ms) == (
        local.digest,
        RootPolicy.simulated(root_sha256()),
        limits.DOCUMENT_AGE_MS,
    )
    # The named day is the last one: it ends 16 hours after the tests' time.
    assert made.measurements == (Measurement(IMAGE.pcr0, IMAGE.pcr1, IMAGE.pcr2, b"\x08" * 48, NOW + 16 * HOUR),)
    hardware = dataclasses.replace(local, platform=agreed.Platform.NITRO, root_sha256=None)
    assert Policy.of(hardware).root == RootPolicy.nitro()
    with pytest.raises(AgreementError):
        Policy.of(dataclasses.replace(hardware, root_sha256=root_sha256()))
