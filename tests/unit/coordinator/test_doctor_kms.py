"""The doctor before an emulated KMS: whether the keys of parties could be asked for, and what to do where not."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from parley_coordinator import config as configuration
from parley_coordinator.config import Config, KmsAccount, KmsConfig
from parley_coordinator.doctor import report
from parley_coordinator.doctor_kms import kms
from parley_coordinator.doctor_system import Check, System, Verdict
from parley_deploy.kms import process
from parley_deploy.kms.accounts import Accounts
from parley_deploy.nsm import LocalRoot
from parley_deploy.pki import system_now_ms
from parley_protocol.agreement.key_arn import KeyArn
from support.aws import COORDINATOR, PARTY, REGION, Aws
from support.coordinator import free_port
from support.desk import NOW, Desk, make_agreement

ROLE = f"arn:aws:iam::{PARTY}:role/parley-kms"
MOMENT = datetime.fromtimestamp(NOW / 1000, UTC)
AT_NOW = System(now=lambda: MOMENT)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aws]:
    folder = tmp_path_factory.mktemp("aws")
    (folder / "root").mkdir()
    LocalRoot.create(system_now_ms()).save(folder / "root")
    try:
        made = Aws(folder / "kms", folder / "root")
        Accounts(folder / "kms").add(ROLE, trusts=[COORDINATOR])
        yield made
    finally:
        process.stop(folder / "kms")


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


@pytest.fixture
def trusted(cloud: Aws, monkeypatch: pytest.MonkeyPatch) -> Aws:
    """The machine has the coordinator's credentials."""
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    return cloud


def config_of(folder: Path, cloud: Aws, key: KeyArn | None, account: KmsAccount | None = None) -> Config:
    """A coordinator for which an agreement names a key, and how the key's account is asked."""
    found = configuration.from_tree({}, folder / "c")
    if key is not None:
        agreement = make_agreement(kms={"bob": key})
        desk = Desk(folder)
        desk.sign(agreement)
        desk.store.close()
        found = replace(found, database=f"sqlite:///{folder / 'c.db'}")
    accounts = {} if account is None else {PARTY: account}
    return replace(found, kms=KmsConfig(cloud.url, cloud.url, connect_s=1.0, read_s=5.0, accounts=accounts))


def only(checks: list[Check]) -> Check:
    [found] = checks
    assert found.name == "kms"
    return found


def test_a_key_of_an_agreement_can_be_asked_for(trusted: Aws, tmp_path: Path) -> None:
    key = trusted.make_key()
    found = only(kms(config_of(tmp_path, trusted, key), AT_NOW))
    assert found.verdict is Verdict.OK
    # The policy of the key lets this role do nothing without an enclave: it is denied, and so it was reached and known.
    assert f"account {PARTY} in {REGION}: KMS answers" in found.found
    assert "asked as arn:aws:sts::111122223333:assumed-role/parley-parent/" in found.found


def test_by_an_assumed_role_too(trusted: Aws, tmp_path: Path) -> None:
    found = only(kms(config_of(tmp_path, trusted, trusted.make_key(), KmsAccount(ROLE)), AT_NOW))
    assert found.verdict is Verdict.OK and "assumed-role/parley-kms/parley-coordinator" in found.found


@pytest.mark.parametrize("external", ["", "e-17"])
def test_a_role_that_is_not_given(trusted: Aws, tmp_path: Path, external: str) -> None:
    role = f"arn:aws:iam::{PARTY}:role/trusts-nobody"
    found = only(kms(config_of(tmp_path, trusted, trusted.make_key(), KmsAccount(role, external)), AT_NOW))
    assert found.verdict is Verdict.FAIL
    assert f"{role} is not given (AssumeRole: AccessDenied)" in found.found
    assert "trust policy has to name the role of this machine" in found.do
    assert ("external id" in found.do) is bool(external)
    assert f"-> {found.do}" in report([found], as_json=False)


@pytest.mark.parametrize("which", ["kms", "sts", "account"])
def test_an_endpoint_that_is_down(trusted: Aws, tmp_path: Path, which: str) -> None:
    down = f"http://127.0.0.1:{free_port()}"
    made = config_of(tmp_path, trusted, trusted.make_key(), KmsAccount(ROLE if which == "sts" else ""))
    changed = {
        "kms": {"endpoint": down},
        "sts": {"sts_endpoint": down},
        "account": {"accounts": {PARTY: KmsAccount(endpoint=down)}},
    }
    found = only(kms(replace(made, kms=replace(made.kms, **changed[which])), AT_NOW))  # type: ignore[arg-type]
    assert found.verdict is Verdict.FAIL
    assert f"{down}" in found.found and "is not reached: EndpointConnectionError" in found.found
    assert "VPC endpoint" in found.do and "kms.sts_endpoint" in found.do


def test_sts_may_be_away_where_no_role_is_assumed(trusted: Aws, tmp_path: Path) -> None:
    made = config_of(tmp_path, trusted, trusted.make_key())
    down = replace(made.kms, sts_endpoint=f"http://127.0.0.1:{free_port()}")
    found = only(kms(replace(made, kms=down), AT_NOW))
    assert found.verdict is Verdict.OK and "KMS answers, but STS does not tell" in found.found


def test_no_credentials(cloud: Aws, tmp_path: Path) -> None:
    found = only(kms(config_of(tmp_path, cloud, cloud.make_key()), AT_NOW))
    assert found.verdict is Verdict.FAIL and "no credentials: NoCredentialsError" in found.found
    assert f"kms.account.{PARTY}.profile" in found.do


def test_a_profile_that_is_not_there(cloud: Aws, tmp_path: Path) -> None:
    found = only(kms(config_of(tmp_path, cloud, cloud.make_key(), KmsAccount(profile="gone")), AT_NOW))
    assert found.verdict is Verdict.FAIL and "no credentials: ProfileNotFound" in found.found
    again = only(kms(config_of(tmp_path / "n", cloud, None, KmsAccount(profile="gone")), AT_NOW))
    assert again.verdict is Verdict.FAIL and "ProfileNotFound" in again.found


@pytest.mark.parametrize("role", ["", ROLE])
def test_credentials_that_are_nobodys(trusted: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    found = only(kms(config_of(tmp_path, trusted, trusted.make_key(), KmsAccount(role)), AT_NOW))
    assert found.verdict is Verdict.FAIL
    assert f"{'STS' if role else 'KMS'} does not know the credentials: InvalidSignatureException" in found.found


def test_a_key_that_is_gone(trusted: Aws, tmp_path: Path) -> None:
    key = replace(trusted.make_key(), key="11111111-2222-3333-4444-555555555555")
    found = only(kms(config_of(tmp_path, trusted, key), AT_NOW))
    assert found.verdict is Verdict.WARN and f"KMS knows no key {key.key}" in found.found and "party" in found.do


def test_an_account_of_which_no_key_is_known_yet(trusted: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config_of(tmp_path, trusted, None, KmsAccount(ROLE))
    found = only(kms(made, AT_NOW))
    assert found.verdict is Verdict.SKIP and "AWS_REGION is not set" in found.found
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    found = only(kms(made, AT_NOW))
    assert found.verdict is Verdict.OK and "assumed-role/parley-kms/" in found.found


def test_nothing_is_asked_where_no_key_is_to_be_used(trusted: Aws, tmp_path: Path) -> None:
    assert kms(config_of(tmp_path / "none", trusted, None), AT_NOW) == []
    made = config_of(tmp_path, trusted, trusted.make_key())
    over = System(now=lambda: MOMENT + timedelta(days=36500))
    assert kms(made, over) == []


def test_an_agreement_that_is_damaged(trusted: Aws, tmp_path: Path) -> None:
    made = config_of(tmp_path, trusted, trusted.make_key())
    with closing(sqlite3.connect(tmp_path / "c.db")) as database, database:
        database.execute("UPDATE agreements SET canonical = substr(canonical, 1, 100)")
    found = only(kms(made, AT_NOW))
    assert found.verdict is Verdict.FAIL and "cannot be read" in found.found and "backup" in found.do
