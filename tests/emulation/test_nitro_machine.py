"""The image, byte for byte, on QEMU's machine `nitro-enclave`: the devices of a genuine enclave, and another's judgement.

QEMU has its own reader of EIFs and its own security module, which signs nothing. Run by `make qemu-nitro-test`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from emulation.nitro_support import Guest, bridge_image, refusal
from parley_deploy.emulator.nitro_machine import NitroMachine, find
from parley_deploy.image import eif
from parley_deploy.pki import system_now_ms
from parley_enclave.device import SocketDevice
from parley_enclave.nsm import Nsm, NsmError
from parley_protocol.agreement import model
from parley_protocol.attestation.document import ZERO_PCR, extended
from parley_protocol.attestation.policy import IMAGE_PCRS, Measurement, Policy, RootPolicy
from parley_protocol.attestation.verify import verify_live
from parley_protocol.encoding import encode
from parley_protocol.errors import MalformedError, UnavailableError, VerificationError
from parley_protocol.measurement import Image, Kind, measure
from support.enclave import Host, agreement_of, identities, signed, until
from support.vectors import images

if TYPE_CHECKING:
    from support.enclave import Simulation

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(
        "PARLEY_QEMU_NITRO" not in os.environ, reason="PARLEY_QEMU_NITRO is not set: make qemu-nitro-test"
    ),
]

INSTANCE = "i-0123456789abcdef0"
MODULE = f"{INSTANCE}-enc0123456789abcdef"
ROLE = "arn:aws:iam::123456789012:role/parent"


@pytest.fixture(scope="module")
def machine(repository: Path) -> NitroMachine:
    """QEMU with the machine, as `make qemu-nitro-test` has built it."""
    found = find(repository / ".cache" / "qemu-nitro")
    assert found is not None, "QEMU's machine nitro-enclave is not built: make qemu-nitro-test"
    return found


@pytest.fixture(scope="module")
def image(repository: Path) -> Path:
    """The image under test."""
    path = Path(os.environ.get("PARLEY_IMAGE") or repository / "build" / "image" / "parley.eif")
    assert path.is_file(), f"{path} is not there: make image"
    return path


@pytest.fixture(scope="module")
def measured(image: Path) -> Image:
    """What the image is by our own reading."""
    with image.open("rb") as file:
        return measure(file)


# The file


@pytest.fixture(scope="module")
def copy(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the image, to be damaged."""
    path = tmp_path_factory.mktemp("copy") / "copy.eif"
    shutil.copyfile(image, path)
    yield path
    path.unlink()


def _places(image: Image) -> dict[str, int]:
    """An offset in the header and in every section."""
    places = {"header: memory": 8, "the CRC": 0x220}
    for number, section in enumerate(image.sections):
        places[f"{section.kind.name.lower()} {number}"] = section.offset + section.size // 2
    return places | {"last byte": image.size - 1}


def test_a_flipped_bit_is_refused_by_qemu_and_by_us(machine: NitroMachine, copy: Path, measured: Image) -> None:
    assert "CRC" not in refusal(machine, copy)
    for place, offset in _places(measured).items():
        with copy.open("r+b") as file:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes((byte ^ 0x10,)))
            file.seek(0)
            with pytest.raises(MalformedError, match="its CRC is"):
                measure(file)
            file.flush()
            assert "CRC mismatch" in refusal(machine, copy), place
            file.seek(offset)
            file.write(bytes((byte,)))


def test_the_judge_reads_what_awss_own_builder_wrote(machine: NitroMachine) -> None:
    verdicts = {name: "CRC mismatch" in refusal(machine, recorded.path) for name, recorded in images().items()}
    assert [name for name, damaged in verdicts.items() if damaged] == ["bad_crc"]


# The enclave


@pytest.fixture(scope="module")
def enclave(machine: NitroMachine, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """The unmodified image, booted to an enclave that answers."""
    with Guest(
        tmp_path_factory.mktemp("enclave"), machine, image, module_id=MODULE, parent_id=INSTANCE, cpus=2
    ) as guest:
        until(lambda: _answers(guest), seconds=120)
        yield guest


def _answers(guest: Guest) -> bool:
    try:
        Host(guest.path).state()
    except (EOFError, OSError):
        return False
    return True


def test_the_image_boots_among_the_devices_of_a_genuine_enclave(enclave: Guest, measured: Image) -> None:
    said = enclave.console
    assert enclave.heartbeat_seconds is not None
    assert not enclave.failures
    # Devices come on the command line, after the measured one, and from nowhere else.
    (line,) = {line.partition("Command line: ")[2] for line in said.splitlines() if "] Command line: " in line}
    assert line.startswith(measured.cmdline.decode("ascii"))
    assert line.count("virtio_mmio.device=") == said.count("virtio-mmio: Registering device") >= 2
    assert "ACPI: Interpreter disabled" in said
    assert "PCI: System does not support PCI" in said
    assert "parley-init: started /usr/bin/python" in said
    assert "parley-enclave: listening, workers: 2" in said
    assert Host(enclave.path).state().phase == "empty"


def test_the_enclave_reads_its_registers_and_believes_no_unsigned_document(enclave: Guest, measured: Image) -> None:
    host = Host(enclave.path)
    members = identities(("ada", "ben", "cyd"))

    def load(pcrs: dict[int, bytes]) -> str:
        image = model.Measurement(pcrs[0], pcrs[1], pcrs[2])
        platform = cast("Simulation", SimpleNamespace(root=SimpleNamespace(sha256=b"r" * 32), measurement=image))
        return host.refused(load={"agreements": [signed(agreement_of(platform, members), members)]})

    # QEMU has measured what we measure; any other register is another image.
    for index in IMAGE_PCRS:
        assert load({**measured.pcrs, index: b"\1" * 48}) == "attestation"
    # So far the enclave comes: PCR16 holds the agreement and is locked. It has no clock but a document's, and this module
    # makes none that is one.
    assert load(dict(measured.pcrs)) == "internal"
    assert host.state().phase == "empty"
    members = identities(("ada", "ben", "cyd"))
    assert load(dict(measured.pcrs)) == "conflict"


# The module


@pytest.fixture(scope="module")
def signer() -> eif.Signer:
    """A key to sign an image with, and its certificate."""
    key = generate_private_key(SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "image signer of a test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, SHA384())
    )
    return eif.Signer(key, certificate.public_bytes(Encoding.PEM), now_ms=system_now_ms())


@pytest.fixture(scope="module")
def bridge(image: Path, signer: eif.Signer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A signed image of the same kernel, init and libraries that hands its module to the host."""
    work = tmp_path_factory.mktemp("bridge")
    yield bridge_image(image, work, signer)
    shutil.rmtree(work)


@pytest.fixture(scope="module")
def device(machine: NitroMachine, bridge: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SocketDevice]:
    """QEMU's module, through the kernel's driver in the guest and over vsock."""
    folder = tmp_path_factory.mktemp("module")
    options = {"module_id": MODULE, "parent_id": INSTANCE, "parent_role": ROLE}
    with Guest(folder, machine, bridge, **options) as guest:
        found = SocketDevice(str(guest.path))
        until(lambda: _describes(found), seconds=120)
        yield found
        found.close()
        assert not guest.failures


def _describes(device: SocketDevice) -> bool:
    try:
        Nsm(device).describe()
    except UnavailableError:
        return False
    return True


def test_every_register_is_what_the_file_says(
    device: SocketDevice, bridge: Path, measured: Image, signer: eif.Signer
) -> None:
    with bridge.open("rb") as file:
        found = measure(file)
    expected = {
        **dict.fromkeys(range(16), ZERO_PCR),
        **found.pcrs,
        3: extended(ROLE.encode()),
        4: extended(INSTANCE.encode()),
    }
    nsm = Nsm(device)
    description = nsm.describe()
    assert (description.module_id, description.digest, description.max_pcrs) == (MODULE, "SHA384", 32)
    assert set(description.locked) >= set(range(16))
    registers = {index: nsm.register(index) for index in range(16)}
    assert {index: register.data for index, register in registers.items()} == expected
    assert all(register.locked for register in registers.values())
    # The registers tell images apart as they should: the same boot ramdisk, another application, a signature.
    assert found.pcrs.keys() == {0, 1, 2, 8}
    assert found.certificate is not None
    assert found.certificate.der == signer.certificate.der
    assert found.pcrs[1] == measured.pcrs[1]
    assert found.pcrs[0] != measured.pcrs[0]
    assert found.pcrs[2] != measured.pcrs[2]
    assert [section.kind for section in found.sections][-1] is Kind.SIGNATURE


def test_the_drivers_answers_are_typed(device: SocketDevice) -> None:
    nsm = Nsm(device)
    with pytest.raises(NsmError) as refused:
        nsm.extend(0, b"x")
    assert refused.value.answer == "ReadOnlyIndex"
    assert len(set(nsm.random(600))) > 128
    assert nsm.random(600) != nsm.random(600)


def test_an_unsigned_document_is_refused_whatever_it_is_wrapped_in(device: SocketDevice, bridge: Path) -> None:
    with bridge.open("rb") as file:
        pcrs = measure(file).pcrs
    agreement, nonce, user_data, public_key = b"a" * 48, b"n" * 32, b"what is said", b"k" * 32
    nsm = Nsm(device)
    nsm.extend(16, agreement)
    nsm.lock(16)
    request = {"Attestation": {"user_data": user_data, "nonce": nonce, "public_key": public_key}}
    document = cbor2.loads(device.request(encode(request)))["Attestation"]["document"]
    protected, unprotected, payload, signature = cbor2.loads(document)
    fields = cbor2.loads(payload)
    # Everything in it is right ...
    assert fields["module_id"] == MODULE
    assert (fields["user_data"], fields["nonce"], fields["public_key"]) == (user_data, nonce, public_key)
    assert {index: fields["pcrs"][index] for index in pcrs} == dict(pcrs)
    assert fields["pcrs"][16] == extended(agreement)
    assert abs(fields["timestamp"] - system_now_ms()) < 60_000
    # ... but nobody has signed it.
    assert cbor2.loads(protected) == {1: -1}
    assert not any(signature)

    policy = Policy((Measurement(pcrs[0], pcrs[1], pcrs[2], pcrs[8]),), RootPolicy.simulated(b"r" * 32), agreement)

    def refused(told: bytes) -> tuple[str, str]:
        with pytest.raises(VerificationError) as error:
            verify_live(
                told, policy=policy, nonce=nonce, user_data=user_data, public_key=public_key, now_ms=system_now_ms()
            )
        return error.value.step, error.value.code

    assert refused(document) == ("att-1", "malformed")
    # Nor does the enclave's own code read a time in it.
    with pytest.raises(NsmError, match="a document that is none"):
        nsm.now_ms()
    es384 = encode({1: -35})
    assert refused(encode([es384, unprotected, payload, bytes(96)])) == ("att-2", "malformed")
    # As many certificates as there should be, each as empty as the module's own.
    longer = encode({**fields, "cabundle": fields["cabundle"] * 4})
    assert refused(encode([es384, unprotected, longer, bytes(96)])) == ("att-4", "attestation")
