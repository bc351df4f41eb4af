"""What the parents' role allows is what the coordinator asks AWS for: no more, which nobody needs, and no less, which fails one day.

What it asks for is read from its source, and seen in the life of a blob against a server; both must agree.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import boto3
import pytest

from parley_coordinator import doctor_store
from parley_coordinator.blobs import upload_name
from parley_coordinator.config import S3
from parley_coordinator.s3 import LEAST_PART, PARTS, Bucket, Progress
from support import s3 as support
from support import terraform

ROOT = Path(__file__).resolve().parents[3]
SOURCE = ROOT / "coordinator" / "parley_coordinator"
ACTIONS: Mapping[str, str] = {
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "CompleteMultipartUpload": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
    "GetObject": "s3:GetObject",
    "HeadBucket": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListObjectsV2": "s3:ListBucket",
    "ListParts": "s3:ListMultipartUploadParts",
    "PutObject": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "UploadPartCopy": "s3:PutObject",
    "Decrypt": "kms:Decrypt",
    "AssumeRole": "sts:AssumeRole",
}
"""What AWS wants for each operation, by its service authorization reference."""
NO_RIGHT = {"DescribeKey", "GetCallerIdentity"}
"""What the doctor asks to see whether somebody answers: the one may be denied, the other is never."""


def operations(service: str, *files: str) -> set[str]:
    """The operations of a service that the source calls, by the names that boto3 gives them, pages included."""
    make: Any = boto3.client
    client = make(service, "eu-central-1", aws_access_key_id="x", aws_secret_access_key="x")
    names: dict[str, str] = client.meta.method_to_api_mapping
    found = set()
    for file in files:
        for call in ast.walk(ast.parse((SOURCE / file).read_text("utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            name = call.func.attr
            if name == "get_paginator":
                name = cast("ast.Constant", call.args[0]).value  # type: ignore[assignment]
            if name in names:
                found.add(names[name])
    return found


def granted() -> dict[str, list[str]]:
    """The actions of each statement of the parents' policy."""
    document = terraform.load(ROOT / "deploy/terraform/operator").resources["data.aws_iam_policy_document.parent"]
    made = [each["statement"]["content"][0] for each in document["dynamic"]]
    return {each["sid"]: each["actions"] for each in [*document["statement"], *made]}


@pytest.fixture(scope="module")
def config() -> Iterator[S3]:
    with support.server() as url:
        yield support.bucket(url)


def life_of_blobs(config: S3) -> set[str]:
    """The operations of uploads that are interrupted, finished, read, given up and swept, of a bundle, and of the doctor."""
    bucket = Bucket(config)
    seen: set[str] = set()
    bucket.client.meta.events.register("before-parameter-build.s3", lambda model, **_: seen.add(model.name))
    size = 2 * LEAST_PART + 7
    name = upload_name(1)
    small = replace(config, part_bytes=LEAST_PART)
    first = Bucket(small)
    first.client.meta.events.register("before-parameter-build.s3", lambda model, **_: seen.add(model.name))
    writer = first.writer(name, 0, size)
    writer.write(b"x" * (LEAST_PART + 3))
    stored = writer.sync()
    copied = first.writer(name, stored, size, replace(Progress.load(writer.state), floor=PARTS).dump())
    resumed = first.writer(name, stored, size, copied.state)
    resumed.write(b"x" * (size - stored))
    assert resumed.sync() == size
    assert bucket.reader(name).read(0, size) == b"x" * size
    bucket.delete(name, resumed.state)
    given_up = first.writer(upload_name(2), 0, size)
    given_up.write(b"x" * (LEAST_PART + 3))
    given_up.sync()
    assert bucket.sweep(2**62, lambda _: None) == 1
    bucket.put("bundle-1", [b"small"])
    tail = first.writer(upload_name(3), 0, size)
    tail.write(b"x" * (LEAST_PART + 3))
    tail.sync()
    bucket.delete(upload_name(3), tail.state)
    bucket.close()
    first.close()
    return seen


def test_the_role_may_do_with_blobs_what_the_coordinator_does(config: S3) -> None:
    called = operations("s3", "s3.py", "doctor_store.py")
    seen = life_of_blobs(config)
    assert seen <= called, "something that the source does not show is called"
    assert called - seen == {"HeadBucket"}, "nothing here shows that it is called; the doctor alone asks for the bucket"
    needed = {ACTIONS[operation] for operation in called}
    allowed = granted()
    assert {*allowed["Blobs"], *allowed["ListBlobs"]} == needed
    assert {action for action in needed if "ListBucket" in action} == set(allowed["ListBlobs"]), (
        "these are the bucket's"
    )
    assert all(check.verdict.name == "OK" for check in doctor_store.bucket(config))


def test_the_role_may_ask_for_keys_as_the_coordinator_does() -> None:
    for service, sid in (("kms", "PartyKeys"), ("sts", "PartyRoles")):
        assert {ACTIONS[operation] for operation in operations(service, "kms.py") - NO_RIGHT} == set(granted()[sid])


def test_the_page_lists_what_a_role_needs() -> None:
    page = (ROOT / "coordinator" / "README.md").read_text("utf-8")
    [said] = re.findall(r"The credentials need(.*?) on the bucket", page, re.DOTALL)
    named = {f"s3:{name.removeprefix('s3:')}" for name in re.findall(r"`([\w:]+)`", said)}
    assert named == {ACTIONS[operation] for operation in operations("s3", "s3.py", "doctor_store.py")}


def test_a_new_call_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that the role does not allow shows in the comparison above."""
    text = (SOURCE / "s3.py").read_text("utf-8")
    (tmp_path / "s3.py").write_text(text + "\n\ndef copy(client):\n    client.copy_object()\n")
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    assert "CopyObject" in operations("s3", "s3.py")
