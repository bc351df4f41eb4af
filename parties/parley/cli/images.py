"""`parley measure`: what an enclave image is measured to be, and whether an agreement accepts it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parley.cli.app import command
from parley.cli.console import Console, plural, printable, size
from parley.cli.exits import Exit, Failure
from parley.cli.options import JsonOption, read_agreement

if TYPE_CHECKING:
    from parley.images import AcceptedImage
    from parley_protocol.agreement.model import Agreement
    from parley_protocol.measurement import Image, SigningCertificate


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(app, "measure")(measure)


def measure(
    file: Annotated[Path, typer.Argument(help="An enclave image (EIF).", metavar="FILE")],
    agreement: Annotated[
        Path | None, typer.Option("--agreement", help="A .parley or YAML file: does it accept this image?")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure an enclave image: PCR0, 1, 2 and 8, as the hypervisor will. Nothing else in the file is evidence."""
    from parley.clock import now_ms
    from parley.images import measure_file
    from parley_protocol.measurement import EMPTY_PCR

    out = Console(as_json)
    image, now = measure_file(file), now_ms()
    warnings = []
    if image.pcrs[2] == EMPTY_PCR:
        warnings.append(
            "one ramdisk: PCR2 is measured over nothing and is the same for every such image; PCR0 and PCR1 tell all"
        )
    if image.certificate is not None and not _valid(image.certificate, now):
        warnings.append("the signing certificate is not valid now: nitro-cli will not start this image")
    _print(out, file, image)
    for warning in warnings:
        out.line("warning", warning)
    facts = _facts(image, warnings)
    if agreement is None:
        out.result(**facts)
        return
    agreed = read_agreement(agreement).agreement()
    found, problem = _judge(agreed, image, now)
    what = f"{agreed.title}, version {agreed.version}"
    out.line("agreement", f"{what}: {problem or found}")
    if found is not None:
        warn(out, found)
    out.result(
        **facts,
        agreement={
            "title": agreed.title,
            "version": agreed.version,
            "digest": agreed.digest.hex(),
            "accepted": problem is None,
            **({} if found is None else image_facts(found)),
        },
    )
    if problem is not None:
        raise Failure(f"{file}: not accepted by {what}", Exit.REFUSED, "attestation")


def _judge(agreement: Agreement, image: Image, now_ms: int) -> tuple[AcceptedImage | None, str | None]:
    """Which image of the agreement this is, and why it is not accepted."""
    from parley.images import matching_image

    found = matching_image(agreement, image.pcrs, at_ms=now_ms)
    if found is not None:
        return found, None if found.accepted(now_ms) else f"no longer accepted: {found}"
    registers = tuple(image.pcrs[index] for index in range(3))
    if any((item.pcr0, item.pcr1, item.pcr2) == registers for item in agreement.measurements):
        return None, "accepted only when another certificate has signed it (PCR8)"
    return None, f"none of its {plural(len(agreement.measurements), 'measurement')} is of this image"


def say(out: Console, found: AcceptedImage) -> None:
    """One line on the image that an enclave was verified to run, and one where it soon ends."""
    out.line("image", str(found))
    warn(out, found)


def warn(out: Console, found: AcceptedImage) -> None:
    """One line where an image is soon accepted no more."""
    from parley.clock import now_ms

    notice = found.notice(now_ms())
    if notice is not None:
        out.line("warning", notice)


def image_facts(found: AcceptedImage) -> dict[str, Any]:
    """The same for programs."""
    until = found.measurement.until
    return {
        "measurement": found.number,
        "measurements": found.of,
        "until": None if until is None else until.isoformat(),
    }


def _print(out: Console, file: Path, image: Image) -> None:
    from parley_protocol.measurement import Kind

    out.line("image", f"{file}, {size(image.size)}, EIF version {image.version}, {image.architecture}, CRC good")
    for index, value in sorted(image.pcrs.items()):
        out.line(f"PCR{index}", value.hex())
    ramdisks = 0
    for section in image.sections:
        ramdisks += section.kind is Kind.RAMDISK
        label = f"ramdisk {ramdisks}" if section.kind is Kind.RAMDISK else section.kind.name.lower()
        text = size(section.size)
        if section.kind is Kind.CMDLINE:
            text += f": {image.cmdline.decode(errors='replace')}"
        elif section.kind is Kind.METADATA:
            name, version = _name(image)
            text += f": {name or 'no name'} {version or ''}".rstrip() + "; not measured, so it proves nothing"
        elif section.kind is Kind.SIGNATURE and image.certificate is not None:
            text += f": {_signer(image.certificate)}"
        out.line(label, text)
    memory, cpus = f"{image.memory_bytes >> 20:,} MiB of memory", plural(image.cpus, "CPU")
    out.line("default", f"{memory}, {cpus}; not measured, whoever starts it decides")


def _name(image: Image) -> tuple[str | None, str | None]:
    found = [(image.metadata or {}).get(key) for key in ("ImageName", "ImageVersion")]
    name, version = (printable(value) if isinstance(value, str) else None for value in found)
    return name, version


def _signer(certificate: SigningCertificate) -> str:
    start, end = _day(certificate.not_before_ms), _day(certificate.not_after_ms)
    return f"by {certificate.subject}, {certificate.curve}, valid {start} to {end}; the name is what its maker says"


def _valid(certificate: SigningCertificate, now_ms: int) -> bool:
    return certificate.not_before_ms <= now_ms <= certificate.not_after_ms


def _day(ms: int) -> str:
    from datetime import UTC, datetime, timedelta

    return f"{datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms):%Y-%m-%d}"


def _facts(image: Image, warnings: list[str]) -> dict[str, Any]:
    """What `nitro-cli build-enclave` prints, and beside it what else is in the file."""
    import json

    from parley_protocol.measurement import measurements_json

    certificate = image.certificate
    name, version = _name(image)
    return {
        **json.loads(measurements_json(image.pcrs)),
        "eif_version": image.version,
        "architecture": str(image.architecture),
        "size": image.size,
        "sections": [{"kind": section.kind.name.lower(), "size": section.size} for section in image.sections],
        "cmdline": image.cmdline.decode(errors="replace"),
        "certificate": None
        if certificate is None
        else {
            "subject": certificate.subject,
            "issuer": certificate.issuer,
            "curve": certificate.curve,
            "not_before_ms": certificate.not_before_ms,
            "not_after_ms": certificate.not_after_ms,
        },
        "unmeasured": {"name": name, "version": version, "memory_bytes": image.memory_bytes, "cpus": image.cpus},
        "warnings": warnings,
    }
