"""Logs: JSON lines with coarse sizes, and nothing of what foreign exceptions quote."""

from __future__ import annotations

import json

import pytest

from parley_coordinator import log


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (1, "<=1B"), (1024, "<=1KiB"), (1025, "<=2KiB"), (600_000, "<=1MiB"), (3 << 40, "<=4TiB")],
)
def test_sizes_are_powers_of_two(size: int, text: str) -> None:
    assert log.coarse(size) == text


def test_keys_are_named_by_a_digest() -> None:
    key = b"k" * 32
    assert log.who(key) != key.hex()[:8]
    assert len(log.who(key)) == 8
    assert log.who(None) == ""


def test_a_fault_shows_frames_and_no_message(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("info")
    try:
        raise ValueError("salary 41548")
    except ValueError:
        log.fault("broke", method="X")
    log.info("size", size=log.coarse(5))
    log.debug("unseen")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["broke", "size"]
    assert lines[0]["error"] == "ValueError"
    assert "test_a_fault_shows" in lines[0]["frames"]
    assert "41548" not in json.dumps(lines)
