"""Which texts may be names: what people read must be what is signed."""

from __future__ import annotations

import keyword
import unicodedata
from typing import Final

from parley_protocol import limits
from parley_protocol.agreement.expression import RESERVED

_INVISIBLE: Final = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
_PATHS: Final = frozenset("/\\")
RESERVED_MEMBERS: Final = frozenset(("everyone", "all"))
"""Names that mean something of their own where a member may stand."""


def text_problem(text: str, most: int = limits.NAME_BYTES) -> str | None:
    """What is wrong with a text that people read on one line, or None."""
    if not text:
        return "is empty"
    if len(text.encode("utf-8", "surrogatepass")) > most:
        return f"is longer than {most} bytes"
    if any(unicodedata.category(character) in _INVISIBLE for character in text):
        return "contains a control or invisible character"
    if not unicodedata.is_normalized("NFC", text):
        return "is not in Unicode's form NFC: type its accents as single characters"
    if text != text.strip():
        return "begins or ends with blank space"
    return None


def name_problem(name: str) -> str | None:
    """What is wrong with the name of a member, a group, an output or a column of an output, or None."""
    problem = text_problem(name)
    if problem is None and (_PATHS & set(name) or name.startswith((".", "-"))):
        return "contains / or \\, or begins with . or -"
    return problem


def identifier_problem(name: str) -> str | None:
    """What is wrong with the name of a table or a column, which stand in expressions, or None."""
    problem = text_problem(name)
    if problem is not None:
        return problem
    # Python reads names in NFKC: others could be written and never found.
    if not name.isidentifier() or not unicodedata.is_normalized("NFKC", name):
        return "is not made of letters, digits and _, beginning with no digit"
    if keyword.iskeyword(name) or name in RESERVED:
        return "is a word of the language of expressions"
    return None
