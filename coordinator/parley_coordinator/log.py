"""Structured logs: one JSON object per line on standard error. No payload, no statement, no exact size, no member's name.

Callers are named by the first 8 hex digits of the SHA-384 of their key, sizes by the power of two above them.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Final

from parley_protocol.encoding import sha384

_LOGGER: Final = logging.getLogger("parley_coordinator")

Field = str | int | float | bool | None


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Field] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = type(record.exc_info[1]).__name__
            # Frames only: messages of foreign exceptions may quote what they choked on.
            frames = traceback.extract_tb(record.exc_info[2])
            line["frames"] = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames[-12:]))
        return json.dumps(line, ensure_ascii=False, separators=(",", ":"))


def setup(level: str) -> None:
    """Sends all logs of this program, and warnings of its libraries, to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _LOGGER.setLevel(level.upper())


def debug(event: str, **fields: Field) -> None:
    """What only a search for a fault needs."""
    _LOGGER.debug(event, extra={"fields": fields})


def info(event: str, **fields: Field) -> None:
    """What happened."""
    _LOGGER.info(event, extra={"fields": fields})


def warning(event: str, **fields: Field) -> None:
    """What the operator should look at."""
    _LOGGER.warning(event, extra={"fields": fields})


def fault(event: str, **fields: Field) -> None:
    """A fault of the program, within an `except` block: with the frames of the exception."""
    _LOGGER.error(event, exc_info=sys.exception(), extra={"fields": fields})


def who(key: bytes | None) -> str:
    """A caller's key as the log names it."""
    return "" if key is None else sha384(key).hex()[:8]


def short(identifier: bytes | None) -> str:
    """A digest or a session id as the log names it."""
    return "" if identifier is None else identifier.hex()[:8]


def coarse(size: int) -> str:
    """A size as the log tells it: the power of two that it does not exceed."""
    if size <= 0:
        return "0"
    bits = (size - 1).bit_length()
    return f"<={1 << (bits % 10)}{('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[min(bits // 10, 5)]}"
