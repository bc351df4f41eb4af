"""`parley kms`: the policy of your KMS key, made from the agreement, compared with the one that stands there, and revoked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from parley.cli.app import command, make_app
from parley.cli.console import Console
from parley.cli.exits import Exit, Failure
from parley.cli.options import CertOption, JsonOption, KeyOption, ToOption, YesOption, find_agreement, member

if TYPE_CHECKING:
    from parley import Member
    from parley.kms import Key
    from parley_protocol.agreement.model import Agreement
    from parley_protocol.kms_policy import Principals

AgreementArgument = Annotated[
    str, typer.Argument(help="Title, start of the digest, or file of an agreement.", metavar="AGREEMENT")
]
RoleOption = Annotated[
    str | None, typer.Option("--coordinator-role", help="ARN of the role under which the coordinator calls KMS.")
]
AdminOption = Annotated[
    list[str] | None, typer.Option("--admin", help="ARN of your role or user that manages the key; may be repeated.")
]
SealerOption = Annotated[
    list[str] | None,
    typer.Option("--sealer", help="ARN of your role or user that runs parley; may be repeated. Default: --admin."),
]
ProfileOption = Annotated[str | None, typer.Option("--profile", help="Profile of your AWS configuration.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = make_app("Your KMS key: who may decrypt under it, and that nobody else may.")
    command(group, "policy")(policy)
    command(group, "check")(check)
    command(group, "revoke")(revoke)
    app.add_typer(group, name="kms")


def policy(
    agreement: AgreementArgument,
    coordinator_role: RoleOption = None,
    admin: AdminOption = None,
    sealer: SealerOption = None,
    put: Annotated[bool, typer.Option("--put", help="Put it on your key, after a question.")] = False,
    profile: ProfileOption = None,
    yes: YesOption = False,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the policy that your KMS key must have for an agreement: only its enclaves, until its dates, may decrypt."""
    import json

    from parley_protocol import kms_policy

    out = Console(as_json)
    agreed = find_agreement(agreement, key, to, cert).agreement()
    who = _given(coordinator_role, admin, sealer)
    me = member(key) if put or who is None else None
    if who is None:
        assert me is not None, "loaded, since nothing was given"
        who = _remembered(me, agreed)
    made = kms_policy.policy_of(agreed, who)
    out.text(json.dumps(made, indent=2))
    if me is None or not put:
        out.result(**made)
        return
    name = _key_arn(me, agreed)
    reached = _connect(name, profile)
    found = kms_policy.differences(reached.policy(), made)
    for line in found:
        out.note(f"{name}: the policy that stands there {line}")
    if found and not out.confirm(f"Put this policy on {name}?", yes):
        raise Failure(f"{name}: the policy stays as it was", Exit.REFUSED, "state")
    if found:
        reached.put_policy(made)
    me.state.remember_principals(name, who)
    out.result(key=name, put=bool(found), policy=made)


def check(
    agreement: AgreementArgument,
    coordinator_role: RoleOption = None,
    admin: AdminOption = None,
    sealer: SealerOption = None,
    profile: ProfileOption = None,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the policy and the grants of your KMS key with what an agreement says. `submit` does so each time."""
    from parley import kms
    from parley_protocol import kms_policy

    out = Console(as_json)
    agreed = find_agreement(agreement, key, to, cert).agreement()
    me = member(key)
    name = _key_arn(me, agreed)
    who = _given(coordinator_role, admin, sealer)
    found = kms.check(_connect(name, profile), kms_policy.policy_of(agreed, who or _remembered(me, agreed)))
    for line in found:
        out.line("drift", line)
    out.result(key=name, agreement=agreed.digest.hex(), differences=list(found))
    if found:
        raise Failure(f"{name}: not the policy of {agreed.title}, version {agreed.version}", Exit.REFUSED, "policy")
    if who is not None:
        me.state.remember_principals(name, who)
    out.line("key", f"{name}: only enclaves of {agreed.title}, version {agreed.version}, may decrypt")


def revoke(
    agreement: AgreementArgument,
    profile: ProfileOption = None,
    yes: YesOption = False,
    key: KeyOption = None,
    to: ToOption = None,
    cert: CertOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take the enclaves out of the policy of your KMS key: no session of any agreement gets your keys any more."""
    from parley_protocol import kms_policy

    out = Console(as_json)
    agreed = find_agreement(agreement, key, to, cert).agreement()
    name = _key_arn(member(key), agreed)
    reached = _connect(name, profile)
    left, gone = kms_policy.revoked(reached.policy())
    for line in gone:
        out.line("goes", line)
    if gone:
        # What an enclave has got already it keeps until its session ends.
        if not out.confirm(f"Take {'this' if len(gone) == 1 else 'these'} out of the policy of {name}?", yes):
            raise Failure(f"{name}: nothing is revoked", Exit.REFUSED, "state")
        reached.put_policy(left)
    remaining = [
        *kms_policy.openers(reached.policy()),
        *(f"grant {grant}" for grant in reached.grants() if grant.opens),
    ]
    for line in remaining:
        out.line("remains", line)
    out.result(key=name, revoked=list(gone), remaining=remaining)
    if remaining:
        raise Failure(f"{name}: others can still decrypt, or let others", Exit.REFUSED, "policy")
    out.line("revoked", f"{name}: no enclave gets keys from it; one that has them already keeps them until it ends")


def _given(role: str | None, admins: Sequence[str] | None, sealers: Sequence[str] | None) -> Principals | None:
    """Who stands in the policy, from the options; None where none of them is given."""
    from parley_protocol.kms_policy import Principals

    if role is None and not admins and not sealers:
        return None
    if role is None or not admins:
        raise Failure("who stands in the policy: give --coordinator-role and --admin together")
    return Principals(role, tuple(admins), tuple(sealers or admins))


def _remembered(me: Member, agreement: Agreement) -> Principals:
    name = _key_arn(me, agreement)
    found = me.state.principals(name)
    if found is None:
        raise Failure(f"{name}: give --coordinator-role and --admin once", Exit.USAGE, "state")
    return found


def _key_arn(me: Member, agreement: Agreement) -> str:
    found = agreement.kms.get(me.name)
    if found is None:
        raise Failure(f"{agreement.title} names no KMS key of {me.name}", Exit.USAGE, "agreement")
    return found.text


def _connect(arn: str, profile: str | None) -> Key:
    from parley.kms import Key

    return Key.connect(arn, profile=profile)
