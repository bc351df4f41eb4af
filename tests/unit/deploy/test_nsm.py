"""The simulated module answers as the real one does, and its documents pass the verifier of the real ones."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography import x509

from parley_deploy.nsm import SimulatedNsm, serve
from parley_deploy.pki import LIVES, LocalRoot, moment
from parley_protocol import limits
from parley_protocol.attestation.document import extended, parse_unverified
from parley_protocol.attestation.policy import Measurement, Policy, RootPolicy
from parley_protocol.attestation.verify import check_document, verify_live
from parley_protocol.encoding import encode, sha384
from parley_protocol.errors import StateError, VerificationError

NOW = 1_800_000_000_000
HOUR = 3_600_000
IMAGE = {0: b"\1" * 48, 1: b"\2" * 48, 2: b"\3" * 48}
AGREEMENT = sha384(b"agreement")
ROOT = LocalRoot.create(NOW)


class Clock:
    now_ms = NOW

    def __call__(self) -> int:
        return self.now_ms


def counting() -> Callable[[int], bytes]:
    """A source of randomness that a test can repeat."""
    state = 0

    def random(count: int) -> bytes:
        nonlocal state
        state += 1
        return hashlib.shake_256(struct.pack(">I", state)).digest(count)

    return random


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def nsm(clock: Clock) -> SimulatedNsm:
    return SimulatedNsm(ROOT, IMAGE, now_ms=clock, random=counting())


def ask(nsm: SimulatedNsm, request: object) -> Any:
    return cbor2.loads(nsm.request(cbor2.dumps(request)))


def attest(nsm: SimulatedNsm, **fields: bytes | None) -> bytes:
    asked = {"user_data": None, "nonce": None, "public_key": None, **fields}
    document = ask(nsm, {"Attestation": asked})["Attestation"]["document"]
    assert type(document) is bytes
    return document


def test_describe(nsm: SimulatedNsm) -> None:
    described = ask(nsm, "DescribeNSM")["DescribeNSM"]
    assert described["max_pcrs"] == 32 and described["digest"] == "SHA384"
    assert described["locked_pcrs"] == list(range(16))
    assert described["module_id"] == nsm.module_id
    assert {"version_major", "version_minor", "version_patch"} < described.keys()


@pytest.mark.parametrize(
    ("request_hex", "answer"),
    [
        ("6947657452616e646f6d", "GetRandom"),
        ("6b44657363726962654e534d", "DescribeNSM"),
        ("a16b4465736372696265504352a165696e64657800", "DescribePCR"),
        ("a169457874656e64504352a265696e64657810646461746142aabb", "ExtendPCR"),
        ("a16b4174746573746174696f6ea369757365725f64617461f6656e6f6e6365f66a7075626c69635f6b6579f6", "Attestation"),
    ],
)
def test_the_bytes_that_the_driver_of_aws_sends_are_understood(
    nsm: SimulatedNsm, request_hex: str, answer: str
) -> None:
    assert list(cbor2.loads(nsm.request(bytes.fromhex(request_hex)))) == [answer]


def test_the_bytes_of_locking(nsm: SimulatedNsm) -> None:
    assert nsm.request(bytes.fromhex("a1674c6f636b504352a165696e64657810")) == cbor2.dumps("LockPCR")
    assert nsm.request(bytes.fromhex("a1684c6f636b50435273a16572616e676511")) == cbor2.dumps("LockPCRs")


def test_registers_extend_lock_and_describe(nsm: SimulatedNsm) -> None:
    assert ask(nsm, {"DescribePCR": {"index": 0}}) == {"DescribePCR": {"lock": True, "data": IMAGE[0]}}
    assert ask(nsm, {"DescribePCR": {"index": 16}}) == {"DescribePCR": {"lock": False, "data": bytes(48)}}
    once = ask(nsm, {"ExtendPCR": {"index": 16, "data": AGREEMENT}})["ExtendPCR"]["data"]
    assert once == extended(AGREEMENT)
    twice = ask(nsm, {"ExtendPCR": {"index": 16, "data": b"more"}})["ExtendPCR"]["data"]
    assert twice == sha384(once + b"more")
    assert ask(nsm, {"LockPCR": {"index": 16}}) == "LockPCR"
    assert ask(nsm, {"DescribePCR": {"index": 16}}) == {"DescribePCR": {"lock": True, "data": twice}}
    assert ask(nsm, {"ExtendPCR": {"index": 16, "data": b"x"}}) == {"Error": "ReadOnlyIndex"}
    assert ask(nsm, {"LockPCR": {"index": 16}}) == {"Error": "ReadOnlyIndex"}


def test_locking_a_range(nsm: SimulatedNsm) -> None:
    assert ask(nsm, {"LockPCRs": {"range": 20}}) == "LockPCRs"
    assert ask(nsm, "DescribeNSM")["DescribeNSM"]["locked_pcrs"] == list(range(20))
    assert ask(nsm, {"LockPCRs": {"range": 33}}) == {"Error": "InvalidIndex"}
    assert ask(nsm, {"LockPCRs": {"range": 32}}) == "LockPCRs"


@pytest.mark.parametrize(
    ("request_value", "code"),
    [
        ("Nonsense", "InvalidOperation"),
        ({}, "InvalidOperation"),
        ({"Nonsense": {}}, "InvalidOperation"),
        ({"DescribePCR": {"index": 0}, "LockPCR": {"index": 16}}, "InvalidOperation"),
        ({"DescribePCR": 0}, "InvalidOperation"),
        ({"DescribePCR": {}}, "InvalidArgument"),
        ({"DescribePCR": {"index": 0, "more": 0}}, "InvalidArgument"),
        ({"DescribePCR": {"index": -1}}, "InvalidArgument"),
        ({"DescribePCR": {"index": 65536}}, "InvalidArgument"),
        ({"DescribePCR": {"index": "0"}}, "InvalidArgument"),
        ({"DescribePCR": {"index": 32}}, "InvalidIndex"),
        ({"ExtendPCR": {"index": 32, "data": b""}}, "InvalidIndex"),
        ({"ExtendPCR": {"index": 0, "data": b""}}, "ReadOnlyIndex"),
        ({"ExtendPCR": {"index": 16, "data": "text"}}, "InvalidArgument"),
        ({"LockPCR": {"index": 32}}, "InvalidIndex"),
        ({"LockPCR": {"index": 4}}, "ReadOnlyIndex"),
        ({"LockPCRs": {"range": -1}}, "InvalidArgument"),
        ({"Attestation": {"user_data": None, "nonce": None}}, "InvalidArgument"),
        ({"Attestation": {"user_data": "text", "nonce": None, "public_key": None}}, "InvalidArgument"),
        ({"Attestation": {"user_data": None, "nonce": None, "public_key": b""}}, "InvalidArgument"),
        ({"Attestation": {"user_data": None, "nonce": bytes(1025), "public_key": None}}, "InputTooLarge"),
        ({"ExtendPCR": {"index": 16, "data": bytes(0x1000)}}, "InputTooLarge"),
        (1.5, "InvalidOperation"),
    ],
)
def test_errors_have_the_codes_of_the_device(nsm: SimulatedNsm, request_value: object, code: str) -> None:
    assert ask(nsm, request_value) == {"Error": code}


def test_bytes_that_are_no_message_are_answered_too(nsm: SimulatedNsm) -> None:
    for message in (b"", b"\xff", b"\xa1"):
        assert cbor2.loads(nsm.request(message)) == {"Error": "InvalidOperation"}


def test_random_bytes_come_256_at_a_time_and_differ(nsm: SimulatedNsm) -> None:
    first, second = (ask(nsm, "GetRandom")["GetRandom"]["random"] for _ in range(2))
    assert len(first) == len(second) == 256 and first != second


def test_a_document_passes_the_verifier(nsm: SimulatedNsm, clock: Clock) -> None:
    ask(nsm, {"ExtendPCR": {"index": 16, "data": AGREEMENT}})
    ask(nsm, {"LockPCR": {"index": 16}})
    image = Measurement(IMAGE[0], IMAGE[1], IMAGE[2])
    enclave = verify_live(
        attest(nsm, user_data=b"data", nonce=b"n" * 32, public_key=b"key"),
        policy=Policy((image,), RootPolicy.simulated(ROOT.sha256), AGREEMENT),
        nonce=b"n" * 32,
        user_data=b"data",
        public_key=b"key",
        now_ms=clock.now_ms,
    )
    assert enclave.module_id == nsm.module_id and enclave.simulated


def test_only_locked_registers_stand_in_a_document(nsm: SimulatedNsm) -> None:
    ask(nsm, {"ExtendPCR": {"index": 16, "data": AGREEMENT}})
    assert sorted(parse_unverified(attest(nsm)).pcrs) == list(range(16))
    ask(nsm, {"LockPCR": {"index": 16}})
    assert sorted(parse_unverified(attest(nsm)).pcrs) == list(range(17))


def test_the_largest_document_fits_the_response(nsm: SimulatedNsm) -> None:
    ask(nsm, {"LockPCRs": {"range": 32}})
    most = bytes(limits.ATTESTED_FIELD_BYTES)
    document = attest(nsm, user_data=most, nonce=most, public_key=most)
    assert len(document) < limits.DOCUMENT_BYTES
    assert check_document(document, root_sha256=ROOT.sha256, at_ms=None).nonce == most


def test_documents_have_the_shape_of_real_ones(nsm: SimulatedNsm) -> None:
    document = attest(nsm)
    assert document[:7] == bytes.fromhex("8444a1013822a0")
    found = parse_unverified(document)
    assert found.instance_id is not None and found.pcrs[4] == extended(found.instance_id.encode())
    chain = [x509.load_der_x509_certificate(der) for der in (*found.cabundle, found.certificate)]
    lives = [one.not_valid_after_utc - one.not_valid_before_utc for one in chain[1:]]
    assert lives == list(LIVES)
    assert chain[4].serial_number >> 64 == int(found.module_id.partition("-enc")[2], 16)


def test_certificates_are_kept_and_renewed_before_they_end(nsm: SimulatedNsm, clock: Clock) -> None:
    first = parse_unverified(attest(nsm))
    clock.now_ms += 2 * HOUR
    kept = parse_unverified(attest(nsm))
    assert (kept.certificate, kept.cabundle) == (first.certificate, first.cabundle)
    clock.now_ms += HOUR // 2
    renewed = parse_unverified(attest(nsm))
    assert renewed.certificate != first.certificate and renewed.cabundle == first.cabundle
    for _ in range(60):
        clock.now_ms += 12 * HOUR
        document = attest(nsm)
        assert check_document(document, root_sha256=ROOT.sha256, at_ms=clock.now_ms + 30 * 60_000)
    assert parse_unverified(document).cabundle[1] != first.cabundle[1]
    # The clock may also go back: an old certificate is not shown before its time.
    clock.now_ms = NOW
    assert check_document(attest(nsm), root_sha256=ROOT.sha256, at_ms=NOW)


def test_debug_registers_are_refused_by_every_policy(clock: Clock) -> None:
    debug = SimulatedNsm(ROOT, dict.fromkeys(range(3), bytes(48)), now_ms=clock, random=counting())
    image = Measurement(IMAGE[0], IMAGE[1], IMAGE[2])
    with pytest.raises(VerificationError) as refusal:
        verify_live(
            attest(debug, nonce=b"n" * 32),
            policy=Policy((image,), RootPolicy.simulated(ROOT.sha256), AGREEMENT),
            nonce=b"n" * 32,
            user_data=b"",
            public_key=b"",
            now_ms=NOW,
        )
    assert refusal.value.step == "att-13"


def test_a_module_measures_48_bytes_into_its_own_registers_only(clock: Clock) -> None:
    for pcrs in ({16: bytes(48)}, {0: bytes(32)}):
        with pytest.raises(ValueError, match="register"):
            SimulatedNsm(ROOT, pcrs, now_ms=clock, random=counting())


def test_two_modules_of_one_root_have_other_names_and_registers() -> None:
    one, two = (SimulatedNsm.create(ROOT, IMAGE) for _ in range(2))
    assert one.module_id != two.module_id
    assert ask(one, {"DescribePCR": {"index": 4}}) != ask(two, {"DescribePCR": {"index": 4}})


def test_a_root_is_made_once_and_shared(tmp_path: Path) -> None:
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(LocalRoot.load_or_create(tmp_path / "root", NOW).sha256))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    loaded = LocalRoot.load(tmp_path / "root")
    assert loaded.sha256 == found[0] and loaded.pem == (tmp_path / "root" / "root.pem").read_bytes()
    assert (tmp_path / "root" / "root.key").stat().st_mode & 0o777 == 0o600
    assert not list((tmp_path / "root").glob("*.part"))


def test_a_folder_without_a_root_or_with_another_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no local root"):
        LocalRoot.load(tmp_path)
    LocalRoot.load_or_create(tmp_path / "one", NOW)
    LocalRoot.load_or_create(tmp_path / "two", NOW)
    (tmp_path / "one" / "root.key").write_bytes((tmp_path / "two" / "root.key").read_bytes())
    with pytest.raises(StateError, match="not the key"):
        LocalRoot.load(tmp_path / "one")


def test_a_private_key_does_not_print(nsm: SimulatedNsm) -> None:
    assert "key=" not in repr(ROOT.issued)


def test_serve_answers_messages_of_a_socket(nsm: SimulatedNsm) -> None:
    here, there = socket.socketpair()
    thread = threading.Thread(target=serve, args=(nsm, there))
    thread.start()
    with here:
        stream = here.makefile("rwb")
        for request in ("DescribeNSM", "GetRandom"):
            message = encode(request)
            stream.write(struct.pack(">I", len(message)) + message)
            stream.flush()
            (length,) = struct.unpack(">I", stream.read(4))
            assert list(cbor2.loads(stream.read(length))) == [request]
        stream.write(struct.pack(">I", limits.NSM_REQUEST_BYTES + 1))
        stream.flush()
        assert stream.read(1) == b""
        stream.close()
    thread.join(5)
    assert not thread.is_alive()


def test_moment_cuts_to_the_second() -> None:
    assert moment(1_999).timestamp() == 1
