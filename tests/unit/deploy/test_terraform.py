"""Terraform: what the provider would refuse, what would open the machine or the keys, and what the rendered files say.

The linter in `support.terraform` and the rules below read the files as they are; each rule is also shown files that break it.
What has no provider (the key's policy, the first boot's script) is evaluated by terraform itself where it is installed.
"""

from __future__ import annotations

import base64
import fnmatch
import gzip
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from parley_coordinator import config
from support import terraform
from support.terraform import Module

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
ROOTS = ("operator", "party-key")
MODULES = (*ROOTS, "modules/key-policy", "modules/bootstrap")
REGISTERS = ("PCR0", "PCR1", "PCR2", "PCR16")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The Terraform and systemd folders, to be altered."""
    for name in ("terraform", "systemd"):
        shutil.copytree(DEPLOY / name, tmp_path / name, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
    return tmp_path / "terraform"


def alter(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text, f"{path.name} has changed: {old!r} is not in it"
    path.write_text(text.replace(old, new), encoding="utf-8")


# The linter


@pytest.mark.parametrize("name", MODULES)
def test_the_modules_are_sound(name: str) -> None:
    assert terraform.problems(terraform.load(DEPLOY / "terraform" / name)) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("operator/instance.tf", "var.instance_type}.", "var.instance_typ}.", "var.instance_typ: not declared"),
        ("operator/variables.tf", 'variable "name"', 'variable "nam"', "var.nam: never used"),
        ("operator/network.tf", "aws_vpc.this.id", "aws_vpc.that.id", "aws_vpc.that: not declared"),
        ("operator/network.tf", "aws_vpc.this.id", "aws_vpc.this.ident", "aws_vpc.this.ident: no such attribute"),
        ("operator/instance.tf", "local.ami_id", "local.ami", "local.ami: not declared"),
        (
            "operator/instance.tf",
            "nitro_enclaves_support",
            "enclaves",
            "aws_ec2_instance_type.parent.enclaves: no such",
        ),
        ("operator/instance.tf", "http_tokens ", "http_token ", "metadata_options: no argument http_token"),
        ("operator/storage.tf", "  status = ", "  state = ", "rule: status is missing"),
        ("operator/instance.tf", "  volume_id   =", "  volume =", "aws_volume_attachment.data: volume_id is missing"),
        (
            "operator/instance.tf",
            "  enclave_cpus       = var",
            "  enclave_cpu = var",
            "bootstrap: enclave_cpus is missing",
        ),
        (
            "operator/instance.tf",
            "bootstrap[each.key].user_data",
            "bootstrap[each.key].data",
            "module.bootstrap.data: no such output",
        ),
        ("operator/iam.tf", "for_each = length", "for_eac = length", "dynamic statement has no for_each"),
        ("party-key/main.tf", '"../modules/key-policy"', '"hashicorp/x/aws"', "is not in this repository"),
        ("party-key/versions.tf", 'version = "~> 6.0"', "", "the provider's version is not pinned"),
        ("party-key/variables.tf", "  type        = string", "", "var.region: no type"),
        ("party-key/outputs.tf", 'description = "For', 'descriptio = "For', "output.key_arn: no description"),
    ],
)
def test_the_linter_sees(copy: Path, file: str, old: str, new: str, problem: str) -> None:
    alter(copy / file, old, new)
    if "hashicorp/x" in new:
        alter(copy / file, "module.policy.json", '"{}"')
        alter(copy / "party-key/outputs.tf", "module.policy.json", '"{}"')
    found = terraform.problems(terraform.load((copy / file).parent))
    assert any(problem in line for line in found), found


# What must hold


def violations(operator: Module, party: Module) -> list[str]:
    """Every rule of the deployment that the two root modules break."""
    return [
        line
        for rule in (_instance, _network, _database, _storage, _roles, _party_key)
        for line in rule(party if rule is _party_key else operator)
    ]


def _instance(module: Module) -> Iterator[str]:
    [template] = module.of_type("aws_launch_template")
    if template.get("enclave_options") != [{"enabled": True}]:
        yield "enclaves are not enabled"
    if template.get("hibernation_options") != [{"configured": False}]:
        yield "hibernation excludes enclaves"
    if template["metadata_options"][0].get("http_tokens") != "required":
        yield "IMDSv1 is open"
    if template["metadata_options"][0].get("http_put_response_hop_limit") != 1:
        yield "IMDS answers through more than one hop"
    if "key_name" in template:
        yield "a key pair: administrators use Session Manager"
    volumes = [mapping["ebs"][0] for mapping in template["block_device_mappings"]] + module.of_type("aws_ebs_volume")
    if not all(volume.get("encrypted") is True for volume in volumes):
        yield "a volume is not encrypted"
    [instance] = module.of_type("aws_instance")
    conditions = "\n".join(each["condition"] for each in instance["lifecycle"][0]["precondition"])
    for fact in ("nitro_enclaves_support", "burstable_performance_supported", "bare_metal", "supported_architectures"):
        if fact not in conditions:
            yield f"EC2 is not asked for {fact}"
    if instance["lifecycle"][0].get("ignore_changes") != ["launch_template"]:
        yield "an apply replaces the instance unasked"
    [data] = module.of_type("aws_ebs_volume")
    if data.get("lifecycle") != [{"prevent_destroy": True}]:
        yield "the data volume can be destroyed"


def _network(module: Module) -> Iterator[str]:
    parents = "${aws_security_group.parent.id}"
    rules = module.of_type("aws_vpc_security_group_ingress_rule")
    for rule in rules:
        port = 7443 if rule["security_group_id"] == parents else 5432
        if (rule.get("from_port"), rule.get("to_port"), rule.get("ip_protocol")) != (port, port, "tcp"):
            yield "a port other than 7443 is open"
        by_group = rule.get("referenced_security_group_id") == parents and "cidr_ipv4" not in rule
        if port == 5432 and not by_group:
            yield "others than the parents reach the database"
        elif not by_group and (
            rule.get("cidr_ipv4") != "${each.value}" or "var.members_cidrs" not in rule.get("for_each", "")
        ):
            yield "others than the members reach the coordinator"
    for rule in module.of_type("aws_vpc_security_group_egress_rule"):
        if rule["security_group_id"] != parents:
            yield "the database calls out"
        if rule.get("cidr_ipv4") and rule.get("from_port") != 443:
            yield "a parent calls out by more than HTTPS"
    for association in module.of_type("aws_route_table_association"):
        if association.get("for_each") != "${aws_subnet.public}":
            yield "the database's network leads somewhere"
    for type_ in ("aws_security_group", "aws_default_security_group"):
        if any({"ingress", "egress"} & group.keys() for group in module.of_type(type_)):
            yield "rules inside a security group escape the rules above"
    if len(module.of_type("aws_security_group_rule")) or not rules:
        yield "rules of another form"
    checks = "\n".join(each["condition"] for each in module.variables["members_cidrs"]["validation"])
    if "/[0-7]$" not in checks:
        yield "members_cidrs may be 0.0.0.0/0"


def _database(module: Module) -> Iterator[str]:
    [made] = module.of_type("aws_db_instance")
    for name, value, weakness in (
        ("multi_az", True, "what was acknowledged is in one zone"),
        ("storage_encrypted", True, "the database is not encrypted"),
        ("publicly_accessible", False, "the database has a public address"),
        ("deletion_protection", True, "the database can be deleted"),
        ("skip_final_snapshot", False, "a deleted database leaves nothing"),
        ("manage_master_user_password", True, "the administrator's password stands in Terraform's state"),
        ("lifecycle", [{"prevent_destroy": True}], "the database can be destroyed"),
    ):
        if made.get(name) != value:
            yield weakness
    if not made.get("backup_retention_period") or made["backup_retention_period"] == 0:
        yield "no moment of the database can be restored"
    [settings] = module.of_type("aws_db_parameter_group")
    if {"name": "rds.force_ssl", "value": "1"} not in settings["parameter"]:
        yield "the database answers without TLS"
    # `doctor` refuses these; RDS would let them be set.
    if {"fsync", "synchronous_commit"} & {each["name"] for each in settings["parameter"]}:
        yield "the database may lose what it acknowledged"
    if "sslmode=verify-full" not in module.locals["state"]:
        yield "the coordinators take any database for theirs"
    [instance] = module.of_type("aws_instance")
    if "var.database != null" not in "\n".join(each["condition"] for each in instance["lifecycle"][0]["precondition"]):
        yield "several parents need not share their state"


def _storage(module: Module) -> Iterator[str]:
    [block] = module.of_type("aws_s3_bucket_public_access_block")
    closed = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
    if not all(block.get(name) is True for name in closed):
        yield "the bucket can become public"
    [encryption] = module.of_type("aws_s3_bucket_server_side_encryption_configuration")
    if encryption["rule"][0]["apply_server_side_encryption_by_default"][0].get("sse_algorithm") != "aws:kms":
        yield "the bucket is not encrypted under a key of ours"
    [ownership] = module.of_type("aws_s3_bucket_ownership_controls")
    if ownership["rule"][0]["object_ownership"] != "BucketOwnerEnforced":
        yield "ACLs are not off"
    [lifecycle] = module.of_type("aws_s3_bucket_lifecycle_configuration")
    rules = {rule["filter"][0].get("prefix", ""): rule for rule in lifecycle["rule"]}
    aborted = {
        prefix: rule["abort_incomplete_multipart_upload"][0]["days_after_initiation"]
        for prefix, rule in rules.items()
        if "abort_incomplete_multipart_upload" in rule
    }
    if aborted.keys() != {"artefacts/", "backup/", "blobs/"}:
        yield "abandoned uploads stay, or a rule is for all"
    if aborted.get("blobs/", 0) * 86400 < 2 * config.Keep().uploads_s:
        yield "a member's upload is cut off while it pauses"
    if [prefix for prefix, rule in rules.items() if "expiration" in rule] != ["backup/database/"]:
        yield "backups stay for ever, or a table ends by itself"
    if module.of_type("aws_s3_bucket_versioning"):
        yield "deleted objects stay as versions"
    for statement in module.resources["data.aws_iam_policy_document.bucket"]["statement"]:
        if statement.get("effect") != "Deny":
            yield "the bucket's policy allows something"
    if not any(
        condition["variable"] == "aws:SecureTransport" and condition["values"] == ["false"]
        for statement in module.resources["data.aws_iam_policy_document.bucket"]["statement"]
        for condition in statement["condition"]
    ):
        yield "the bucket answers without TLS"


def _roles(module: Module) -> Iterator[str]:
    for address, body in module.resources.items():
        if not address.startswith("data.aws_iam_policy_document."):
            continue
        statements = list(body.get("statement", []))
        statements += [
            inner["content"][0] for each in body.get("dynamic", []) for inner in (each.get("statement"),) if inner
        ]
        for statement in statements:
            if statement.get("effect") == "Deny":
                continue
            actions = statement["actions"]
            if any("*" in action for action in actions):
                yield f"{address}: an action with a wildcard"
            if any("*" in principal["identifiers"] for principal in statement.get("principals", [])):
                yield f"{address}: everybody is a principal"
            on_key = address.endswith("_key")
            if not on_key and "*" in statement.get("resources", []):
                yield f"{address}: every resource"
            if not on_key and {"kms:PutKeyPolicy", "kms:CreateGrant"} & set(actions):
                yield f"{address}: the parent may change a key's policy"
    parent = granted(module)
    if parent["PartyKeys"]["condition"][0]["variable"] != "kms:RecipientAttestation:PCR0":
        yield "the parent may ask the parties' keys without an attestation"
    if parent["PartyKeys"]["actions"] != ["kms:Decrypt"] or parent["PartyRoles"]["actions"] != ["sts:AssumeRole"]:
        yield "the parent may do more to the parties' keys than ask for decryption"
    for sid, wanted in (
        ("PartyKeys", "${length(var.party_keys) == 0 ? [] : [var.party_keys]}"),
        ("PartyRoles", "${length(var.party_roles) == 0 ? [] : [[for role in var.party_roles : role.arn]]}"),
    ):
        if parent[sid]["for_each"] != wanted or parent[sid]["resources"] != "${statement.value}":
            yield "the parent may ask keys or assume roles that nobody named"
    for sid, body in parent.items():
        if sid not in ("PartyRoles", "PartyKeys") and any(action.startswith("sts:") for action in body["actions"]):
            yield "the parent may assume roles that nobody named"
    blobs = "${aws_s3_bucket.this.arn}/${statement.value}/*"
    if parent["Blobs"]["resources"] != [blobs] or '"blobs"' not in str(parent["Blobs"]["for_each"]).replace("'", '"'):
        yield "the coordinator reaches more than blobs/"
    for sid in ("Blobs", "ListBlobs"):
        if not str(parent[sid]["for_each"]).startswith("${var.database == null ? [] :"):
            yield "a coordinator with a folder for its blobs may use the bucket"
    attached = module.of_type("aws_iam_role_policy_attachment")
    if [each["policy_arn"].rpartition("/")[2] for each in attached] != ["AmazonSSMManagedInstanceCore"]:
        yield "the parent has more than Session Manager"


def granted(module: Module) -> dict[str, dict[str, Any]]:
    """The statements of the parents' policy by their sids, those that are made for a value with their `for_each`."""
    document = module.resources["data.aws_iam_policy_document.parent"]
    found = {each["sid"]: each for each in document["statement"]}
    for dynamic in document["dynamic"]:
        made = dynamic["statement"]
        found[made["content"][0]["sid"]] = {**made["content"][0], "for_each": made["for_each"]}
    return found


def _party_key(module: Module) -> Iterator[str]:
    [key] = module.of_type("aws_kms_key")
    if key.get("policy") != "${module.policy.json}":
        yield "the key has another policy than the module's"
    if key.get("bypass_policy_lockout_safety_check") is not False:
        yield "KMS does not check that somebody can still manage the key"
    if key.get("lifecycle") != [{"prevent_destroy": True}]:
        yield "the key can be destroyed"
    if module.of_type("aws_kms_grant"):
        yield "a grant goes round the policy"


def test_the_rules_hold() -> None:
    operator, party = (terraform.load(DEPLOY / "terraform" / name) for name in ROOTS)
    assert violations(operator, party) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "violation"),
    [
        (
            "operator/instance.tf",
            "    enabled = true\n  }\n\n  # Enclaves",
            "    enabled = false\n  }\n\n  # E",
            "not enabled",
        ),
        ("operator/instance.tf", "configured = false", "configured = true", "hibernation"),
        ("operator/instance.tf", 'http_tokens                 = "required"', 'http_tokens = "optional"', "IMDSv1"),
        ("operator/instance.tf", "hop_limit = 1", "hop_limit = 2", "more than one hop"),
        ("operator/instance.tf", "  ebs_optimized ", '  key_name = "me"\n  ebs_optimized ', "a key pair"),
        ("operator/instance.tf", "encrypted             = true", "encrypted = false", "not encrypted"),
        ("operator/storage.tf", "encrypted         = true", "", "not encrypted"),
        ("operator/storage.tf", "prevent_destroy = true", "prevent_destroy = false", "can be destroyed"),
        ("operator/instance.tf", "nitro_enclaves_support == ", "hypervisor == ", "nitro_enclaves_support"),
        ("operator/instance.tf", "ignore_changes = [launch_template]", "", "unasked"),
        ("operator/network.tf", "from_port         = 7443", "from_port = 22", "other than 7443"),
        ("operator/network.tf", "from_port                    = 7443", "from_port = 9464", "other than 7443"),
        ("operator/network.tf", "from_port         = 443", "from_port = 0", "more than HTTPS"),
        ("operator/network.tf", "for_each = aws_subnet.public", "for_each = aws_subnet.database", "leads somewhere"),
        (
            "operator/database.tf",
            "  referenced_security_group_id = aws_security_group.parent.id",
            '  cidr_ipv4 = "0.0.0.0/0"',
            "others than the parents",
        ),
        ("operator/database.tf", "multi_az               = true", "multi_az = false", "in one zone"),
        ("operator/database.tf", "storage_encrypted = true", "", "the database is not encrypted"),
        ("operator/database.tf", "publicly_accessible    = false", "publicly_accessible = true", "public address"),
        ("operator/database.tf", "deletion_protection       = true", "", "can be deleted"),
        ("operator/database.tf", "skip_final_snapshot       = false", "skip_final_snapshot = true", "leaves nothing"),
        (
            "operator/database.tf",
            "manage_master_user_password = true",
            'password = "x"',
            "password stands in Terraform's state",
        ),
        ("operator/database.tf", "prevent_destroy = true", "prevent_destroy = false", "database can be destroyed"),
        ("operator/database.tf", "min(var.backup_days, 35)", "0", "no moment"),
        ("operator/database.tf", 'value = "1"', 'value = "0"', "database answers without TLS"),
        ("operator/database.tf", '"rds.force_ssl"', '"synchronous_commit"', "may lose"),
        ("operator/database.tf", "verify-full", "require", "any database for theirs"),
        ("operator/instance.tf", "|| var.database != null", "|| true", "need not share"),
        ("operator/network.tf", "cidr_ipv4         = each.value", 'cidr_ipv4 = "0.0.0.0/0"', "others than the members"),
        ("operator/network.tf", '  name        = "${var.name}-parent"', "  ingress {}\n", "inside a security group"),
        ("operator/variables.tf", "/[0-7]$", "/x$", "0.0.0.0/0"),
        ("operator/storage.tf", "block_public_acls       = true", "block_public_acls = false", "become public"),
        ("operator/storage.tf", '"aws:kms"', '"AES256"', "under a key of ours"),
        ("operator/storage.tf", "BucketOwnerEnforced", "ObjectWriter", "ACLs"),
        ("operator/storage.tf", "    abort_incomplete_multipart_upload {", "    expiration {", "abandoned"),
        ("operator/storage.tf", '      prefix = "artefacts/"', "", "a rule is for all"),
        ("operator/storage.tf", "days_after_initiation = 90", "days_after_initiation = 30", "while it pauses"),
        ("operator/storage.tf", "    expiration {", "    noncurrent_version_expiration {", "for ever"),
        ("operator/storage.tf", '      prefix = "backup/database/"', '      prefix = "blobs/x"', "ends by itself"),
        ("operator/storage.tf", "aws:SecureTransport", "aws:Sourceip", "without TLS"),
        ("operator/storage.tf", '    effect    = "Deny"', '    effect    = "Allow"', "allows something"),
        ("operator/storage.tf", '"kms:UpdateKeyDescription"', '"kms:*"', "wildcard"),
        ("operator/storage.tf", "identifiers = [local.account_root]", 'identifiers = ["*"]', "everybody"),
        ("operator/iam.tf", '["${aws_s3_bucket.this.arn}/artefacts/*"]', '["*"]', "every resource"),
        ("operator/iam.tf", '["s3:GetObject"]', '["kms:PutKeyPolicy"]', "change a key's policy"),
        ("operator/iam.tf", "kms:RecipientAttestation:PCR0", "kms:ViaService", "without an attestation"),
        ("operator/iam.tf", '["kms:Decrypt"]', '["kms:Decrypt", "kms:Encrypt"]', "do more to the parties' keys"),
        ("operator/iam.tf", "[[for role in var.party_roles : role.arn]]", '[["*"]]', "roles that nobody named"),
        ("operator/iam.tf", '"s3:ListBucketMultipartUploads"]', '"sts:AssumeRole"]', "roles that nobody named"),
        ("operator/iam.tf", ".arn}/${statement.value}/*", ".arn}/*", "more than blobs/"),
        ("operator/iam.tf", 'var.database == null ? [] : ["blobs"]', '["blobs"]', "may use the bucket"),
        ("operator/iam.tf", "AmazonSSMManagedInstanceCore", "AdministratorAccess", "more than Session Manager"),
        ("party-key/main.tf", "module.policy.json", '"{}"', "another policy"),
        ("party-key/main.tf", "safety_check = false", "safety_check = true", "still manage"),
        ("party-key/main.tf", "prevent_destroy = true", "prevent_destroy = false", "the key can be destroyed"),
    ],
)
def test_a_broken_rule_is_seen(copy: Path, file: str, old: str, new: str, violation: str) -> None:
    alter(copy / file, old, new)
    operator, party = (terraform.load(copy / name) for name in ROOTS)
    assert any(violation in line for line in violations(operator, party))


# What terraform itself makes of it


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs terraform without network, home and telemetry; skips where it is not installed."""
    program = shutil.which("terraform")
    if program is None:
        pytest.skip("TERRAFORM IS NOT ON THIS MACHINE: format and rendered policies are not checked")
    (tmp_path / "terraformrc").touch()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TF_CLI_CONFIG_FILE": str(tmp_path / "terraformrc"),
        "CHECKPOINT_DISABLE": "1",
        "TF_IN_AUTOMATION": "1",
    }

    def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [program, *arguments]
        return subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )

    return call


def test_the_files_are_formatted(run: Callable[..., Any], copy: Path) -> None:
    assert run("fmt", "-check", "-recursive", cwd=copy).stdout == ""
    alter(copy / "operator/outputs.tf", "  value       =", "  value =")
    assert run("fmt", "-check", "-recursive", cwd=copy).stdout.strip() == "operator/outputs.tf"


def render(run: Callable[..., Any], folder: Path, values: Mapping[str, object], output: str) -> str:
    """One output of a module without provider; ValueError with terraform's message when it refuses the values."""
    (folder / "terraform.tfvars.json").write_text(json.dumps(values), encoding="utf-8")
    for command in (["init", "-no-color", "-backend=false"], ["apply", "-no-color", "-auto-approve"]):
        done = run(*command, cwd=folder)
        if done.returncode != 0:
            raise ValueError(" ".join(done.stderr.split()))
    return str(run("output", "-raw", output, cwd=folder).stdout)


COORDINATOR = "arn:aws:iam::111122223333:role/parley-parent"
ADMINISTRATOR = "arn:aws:iam::444455556666:role/key-administrator"
SEALER = "arn:aws:iam::444455556666:role/statistics"


def image(digit: str, until: str | None = None, agreement: str = "e") -> dict[str, str | None]:
    """An accepted image whose registers are `digit`0…, `digit`1… and `digit`2…."""
    registers: dict[str, str | None] = {f"pcr{index}": (digit + str(index)) * 48 for index in range(3)}
    return registers | {"pcr16": (agreement + "6") * 48, "until": until}


def key_values(**changed: object) -> dict[str, object]:
    return {
        "accepted": [image("a", "2027-06-30T00:00:00Z"), image("B")],
        "coordinator_role": COORDINATOR,
        "administrators": [ADMINISTRATOR],
        "sealers": [SEALER],
    } | changed


def allows(policy: Mapping[str, Any], principal: str, action: str, context: Mapping[str, str]) -> bool:
    """Whether a key policy allows it: IAM's evaluation, as far as these policies use it; anything else is an error here."""
    allowed = False
    for statement in policy["Statement"]:
        assert set(statement) <= {"Sid", "Effect", "Principal", "Action", "Resource", "Condition"}, statement
        assert set(statement["Principal"]) == {"AWS"} and statement["Resource"] == "*"
        applies = principal in statement["Principal"]["AWS"]
        applies = applies and any(fnmatch.fnmatchcase(action, pattern) for pattern in statement["Action"])
        for operator, wanted in statement.get("Condition", {}).items():
            for key, value in wanted.items():
                given = context.get(key)
                match operator:
                    case "StringEqualsIgnoreCase":
                        applies = applies and given is not None and given.casefold() == value.casefold()
                    case "DateLessThan":
                        applies = applies and given is not None and given < value
                    case _:
                        raise AssertionError(f"unknown operator {operator}")
        if applies:
            assert statement["Effect"] == "Allow"
            allowed = True
    return allowed


def request(digit: str, now: str = "2027-01-01T00:00:00Z", agreement: str = "e") -> dict[str, str]:
    """What KMS knows of a request that carries a document of this image under this agreement."""
    registers = {index: (digit + str(index)) * 48 for index in range(3)} | {16: (agreement + "6") * 48}
    found = {f"kms:RecipientAttestation:PCR{index}": value for index, value in registers.items()}
    return found | {"aws:CurrentTime": now}


def test_the_policy_lets_only_the_accepted_enclaves_decrypt(run: Callable[..., Any], copy: Path) -> None:
    policy = json.loads(render(run, copy / "modules/key-policy", key_values(), "json"))
    assert policy["Version"] == "2012-10-17"

    def may(context: Mapping[str, str], principal: str = COORDINATOR, action: str = "kms:Decrypt") -> bool:
        return allows(policy, principal, action, context)

    assert may(request("a"))
    assert may(request("b"))
    assert not may(request("a", now="2027-06-30T00:00:00Z")), "the old image ends by itself"
    assert may(request("b", now="2033-01-01T00:00:00Z"))
    assert not may(request("c"))
    assert not may(request("0")), "an enclave in debug mode"
    assert not may(request("b", agreement="f")), "the same image under another agreement"
    assert not may({"aws:CurrentTime": "2027-01-01T00:00:00Z"}), "no attestation document"
    for register in REGISTERS:
        without = {key: value for key, value in request("b").items() if not key.endswith(f":{register}")}
        assert not may(without), f"without {register}"
        mixed = request("b") | {f"kms:RecipientAttestation:{register}": "d" * 96}
        assert not may(mixed), f"with another {register}"
    assert not may(request("b") | {"kms:RecipientAttestation:PCR1": "a1" * 48}), "registers of two images"


def test_nobody_else_can_use_or_change_the_key(run: Callable[..., Any], copy: Path) -> None:
    policy = json.loads(render(run, copy / "modules/key-policy", key_values(), "json"))
    text = json.dumps(policy)
    assert "*" not in text.replace('"Resource": "*"', "")
    assert "kms:CreateGrant" not in text and ":root" not in text
    for action in (
        "kms:PutKeyPolicy",
        "kms:CreateGrant",
        "kms:Encrypt",
        "kms:ScheduleKeyDeletion",
        "kms:ReEncryptFrom",
    ):
        assert not allows(policy, COORDINATOR, action, request("b")), action
    for person in (ADMINISTRATOR, SEALER, "arn:aws:iam::111122223333:role/other"):
        assert not allows(policy, person, "kms:Decrypt", request("b")), person
    assert not allows(policy, SEALER, "kms:PutKeyPolicy", {})
    assert allows(policy, ADMINISTRATOR, "kms:PutKeyPolicy", {}), "a key that nobody can change is lost"
    assert allows(policy, SEALER, "kms:Encrypt", {})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"accepted": []}, "accepted: a key that no enclave may use"),
        ({"accepted": [image("a") | {"pcr0": "0" * 96}]}, "accepted: each PCR"),
        ({"accepted": [image("a") | {"pcr2": "a" * 95}]}, "accepted: each PCR"),
        ({"accepted": [image("a") | {"pcr16": ""}]}, "accepted: each PCR"),
        ({"accepted": [image("a", until="tomorrow")]}, "accepted: until"),
        ({"coordinator_role": "*"}, "coordinator_role: the ARN"),
        ({"coordinator_role": "arn:aws:iam::111122223333:role/*"}, "coordinator_role: the ARN"),
        ({"coordinator_role": "arn:aws:iam::111122223333:root"}, "coordinator_role: the ARN"),
        ({"administrators": []}, "administrators: at least"),
        ({"administrators": ["arn:aws:iam::444455556666:root"]}, "administrators: at least"),
        ({"sealers": ["*"]}, "sealers: at least"),
        ({"administrators": [COORDINATOR]}, "coordinator_role: the coordinator must neither"),
        ({"sealers": [COORDINATOR]}, "coordinator_role: the coordinator must neither"),
    ],
)
def test_a_policy_that_protects_nothing_is_refused(
    run: Callable[..., Any], copy: Path, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        render(run, copy / "modules/key-policy", key_values(**changed), "json")


BOOT = {
    "region": "eu-central-1",
    "bucket": "parley-20270101",
    "image": {"key": "artefacts/image.eif", "sha384": "a" * 96},
    "bundle": {"key": "artefacts/bundle.tar", "sha384": "b" * 96},
    "host_name": "parley.example.org",
    "data_volume_id": "vol-0123456789abcdef0",
    "database": "coordinator.db",
    "blobs": "blobs",
    "party_roles": [],
    "enclaves": 2,
    "enclave_memory_mib": 2048,
    "enclave_cpus": 2,
}


def test_the_first_boot_gets_its_files(run: Callable[..., Any], copy: Path, tmp_path: Path) -> None:
    text = render(run, copy / "modules/bootstrap", BOOT, "user_data")
    assert text.startswith("#cloud-config\n")
    assert len(base64.b64encode(gzip.compress(text.encode()))) < 16384, "EC2 takes 16 KiB of user data"
    boot = YAML(typ="safe").load(text)
    assert set(boot) == {"package_update", "packages", "write_files", "runcmd"}
    assert boot["runcmd"] == [["/usr/local/sbin/parley-setup"]]
    files = {each["path"]: each["content"] for each in boot["write_files"]}
    assert files["/etc/parley/allocator.yaml"] == "---\nmemory_mib: 4096\ncpu_count: 4\n"
    for name in ("parley-coordinator.service", "parley-backup.service", "parley-backup.timer"):
        assert files[f"/etc/systemd/system/{name}"] == (DEPLOY / "systemd" / name).read_text("utf-8")
    assert files["/usr/local/sbin/parley-backup"] == (DEPLOY / "systemd/parley-backup").read_text("utf-8")
    assert files["/usr/local/sbin/parley-setup"] == (DEPLOY / "terraform/modules/bootstrap/setup.sh").read_text("utf-8")
    assert (
        "DEVICE=/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0123456789abcdef0\n"
        in files["/etc/parley/setup.env"]
    )
    coordinator = config.from_tree(tomllib.loads(files["/etc/parley/coordinator.toml"]), Path("/var/lib/parley"))
    assert (coordinator.launcher, coordinator.enclaves, coordinator.listen) == ("nitro", 2, "0.0.0.0:7443")
    assert (coordinator.nitro.memory_mib, coordinator.nitro.cpus, coordinator.nitro.debug) == (2048, 2, False)
    assert coordinator.nitro.image == Path("/opt/parley/parley.eif")
    assert (coordinator.s3, coordinator.kms.accounts) == (None, {})
    assert coordinator.telemetry.metrics.startswith("127.0.0.1:"), "Prometheus may ask from this machine alone"
    assert "postgresql16" not in boot["packages"]


def test_several_parents_get_what_they_share(run: Callable[..., Any], copy: Path) -> None:
    role, other = "arn:aws:iam::444455556666:role/parley", "arn:aws:iam::777788889999:role/keys/parley"
    shared = {
        "database": "postgresql://parley@host.example/parley?sslmode=verify-full&sslrootcert=/var/lib/parley/database-ca.pem",
        "blobs": "s3://parley-20270101/blobs",
        "party_roles": [{"arn": role, "external_id": "7f3a"}, {"arn": other, "external_id": ""}],
    }
    text = render(run, copy / "modules/bootstrap", BOOT | shared, "user_data")
    assert len(base64.b64encode(gzip.compress(text.encode()))) < 16384
    boot = YAML(typ="safe").load(text)
    assert "postgresql16" in boot["packages"], "pg_dump and psql"
    files = {each["path"]: each["content"] for each in boot["write_files"]}
    made = config.from_tree(tomllib.loads(files["/etc/parley/coordinator.toml"]), Path("/var/lib/parley"))
    assert made.s3 is not None
    assert (made.s3.bucket, made.s3.prefix, made.s3.region) == ("parley-20270101", "blobs/", "eu-central-1")
    assert made.database == shared["database"]
    assert made.kms.accounts == {
        "444455556666": config.KmsAccount(role=role, external_id="7f3a"),
        "777788889999": config.KmsAccount(role=other),
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"database": 'x"\n[tls]'}, "database: a file, or"),
        ({"database": "postgresql://parley:pass word@host/parley"}, "database: a file, or"),
        ({"blobs": "s3://bucket/$(id)"}, "blobs: a folder, or"),
    ],
)
def test_what_is_no_place_is_refused(
    run: Callable[..., Any], copy: Path, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        render(run, copy / "modules/bootstrap", BOOT | changed, "user_data")


@pytest.mark.parametrize("host_name", ["", "a b", "x; rm -rf /", "$(id)", "-name"])
def test_a_host_name_is_no_command(run: Callable[..., Any], copy: Path, host_name: str) -> None:
    with pytest.raises(ValueError, match="host_name: a DNS name"):
        render(run, copy / "modules/bootstrap", BOOT | {"host_name": host_name}, "user_data")
