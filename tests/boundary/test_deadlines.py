"""The tables of calls and deadlines on the coordinator's page say what the code does."""

from __future__ import annotations

import importlib
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from parley import transport
from parley_coordinator import config
from parley_coordinator.telemetry import ATTRIBUTES, METRICS
from parley_protocol import limits
from parley_protocol.v1 import coordinator_pb2 as pb

PAGE = (Path(__file__).resolve().parent.parent.parent / "coordinator" / "README.md").read_text("utf-8")
METHODS = pb.DESCRIPTOR.services_by_name["Coordinator"].methods_by_name


def table(head: str) -> list[list[str]]:
    """The rows of the table whose first cell is `head`."""
    found = re.search(rf"^\| {head} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert found, head
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def in_config(field: str) -> float:
    """The default that the template states."""
    lines = [line.removeprefix("# ") for line in config.TEMPLATE.splitlines()[2:]]
    value: Any = tomllib.loads("\n".join(lines).replace("{listen}", "x"))
    for part in field.split("."):
        value = value[part]
    return float(value)


def in_code(name: str) -> float:
    if name.startswith("parley.transport"):
        return float(inspect.signature(transport.Transport).parameters["patience_s"].default)
    module, _, constant = name.partition(".")
    value = getattr(limits if module == "limits" else importlib.import_module(f"parley_coordinator.{module}"), constant)
    return float(value) / (1000 if constant.endswith("_MS") else 1)


@pytest.mark.parametrize("row", table("deadline"), ids=lambda row: row[2])
def test_a_deadline_is_what_the_page_says(row: list[str]) -> None:
    name = code(row[2])[0]
    constant = name.rpartition(".")[2].isupper() or name.startswith("parley.")
    assert (in_code(name) if constant else in_config(name)) == float(row[1])


def test_every_deadline_of_the_configuration_is_on_the_page() -> None:
    there = {name for row in table("deadline") for name in code(row[2])}
    fields = {f"deadline.{name}" for name in config.Deadlines.__dataclass_fields__} - {"deadline.status_s"}
    assert fields | {"cluster.lease_s", "cluster.abandon_s", "grace_s"} <= there


def test_every_method_is_in_the_table_of_calls() -> None:
    named = [name for row in table("method") for name in code(row[0])]
    assert sorted(named) == sorted(METHODS)


_METHOD = re.compile(r"self\._stub\.(\w+)")
_SECONDS = {"QUICK_S": transport.QUICK_S, "LONG_S": transport.LONG_S, "UPLOAD_S": transport.UPLOAD_S}


def test_the_client_waits_as_long_as_the_table_says() -> None:
    source = inspect.getsource(transport)
    told = {name: row[3] for row in table("method") for name in code(row[0])}
    for method in METHODS:
        if method == "Watch":
            continue
        where = source.index(f"self._stub.{method}")
        rest = source[where : where + 400]
        # What stands nearest behind the stub's name: its deadline, or none, which is the quick one.
        end = min((at for text in ("def ", "except") if (at := rest.find(text)) > 0), default=len(rest))
        found = re.search("|".join(_SECONDS), rest[:end])
        seconds = _SECONDS[found[0] if found else "QUICK_S"]
        number, unit = re.match(r"(\d+) (s|h)", told[method]).groups()  # type: ignore[union-attr]
        assert int(number) * {"s": 1, "h": 3600}[unit] == seconds, method
    assert transport.WHOLE_S == 6 * 3600


def test_every_metric_and_attribute_is_on_the_page() -> None:
    assert sorted(name for row in table("metric") for name in code(row[0])) == sorted(METRICS)
    assert all(f"`{name}`" in PAGE for name in ATTRIBUTES)
