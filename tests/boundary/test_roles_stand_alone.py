"""Each role works with the other roles and every package that is not its own blocked (DESIGN §4)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support.roles import ROLES, TABLE, Role, import_alone


@pytest.mark.parametrize("role", TABLE, ids=lambda role: role.package)
def test_role_imports_with_all_else_blocked(role: Role) -> None:
    outcome = import_alone(role)
    assert len(outcome.names) > 1, "the role has modules"
    assert not outcome.failures
    for other in ROLES.keys() - role.below - {role.package}:
        assert other not in outcome.loaded


# Optional packages that third parties look for and do without. Anything else that is asked for in vain is a leak.
_PROBED = {
    "parley": {"grpc_health", "grpc_reflection", "grpc_tools", "pandas", "polars"},
    "parley_coordinator": {"certifi", "grpc_tools", "pygments"},
    "parley_enclave": set(),
    "parley_protocol": set(),
}


@pytest.mark.parametrize("role", TABLE, ids=lambda role: role.package)
def test_role_asks_for_nothing_in_vain(role: Role) -> None:
    asked = {name.partition(".")[0] for name in import_alone(role).refused}
    assert asked <= _PROBED[role.package]


def test_blocker_blocks() -> None:
    """Without its own right the role fails, so the test above can fail."""
    enclave = next(role for role in TABLE if role.package == "parley_enclave")
    outcome = import_alone(replace(enclave, third_party=enclave.third_party - {"numpy"}))
    assert any("numpy is blocked" in reason for reason in outcome.failures.values())
    assert "numpy" in outcome.refused
