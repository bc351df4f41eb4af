"""An inbox of many agreements takes as many queries as one of few."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from support.desk import Desk, key, make_agreement


def queries(desk: Desk, name: str) -> tuple[int, int]:
    """(statements, items) of one look into an inbox."""
    seen: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        items = desk.inbox.items(key(name))
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    return len([statement for statement in seen if statement.startswith("SELECT")]), len(items)


def test_the_number_of_queries_does_not_grow(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    base = make_agreement()
    desk.sign(base)
    few, one = queries(desk, "bob")
    for number in range(9):
        desk.sign(replace(base, title=f"visits-{number}"))
    desk.sign(replace(base, title="unsigned"), "ann")
    many, eleven = queries(desk, "bob")
    assert (one, eleven) == (1, 11)
    assert few == many > 0
    desk.store.close()
