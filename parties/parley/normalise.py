"""Identifiers to unit keys, as SQL for the vectorised engine (tab-4).

An identifier is normalised, salted and hashed; the first 8 bytes of the SHA-256, little-endian, are its key. This gives a
fixed width, not secrecy: whoever knows the agreement can test a guess.
"""

from __future__ import annotations

import functools

from parley_protocol.agreement.model import Normalise

SPACES = "".join(character for character in map(chr, range(0x3100)) if character.isspace())
"""The characters that `strip` removes: Unicode's white space and the four separators of ASCII."""
_LAST_FOLDED = 0x1E944


def quoted(text: str) -> str:
    """A text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def normalised(expression: str, rule: Normalise) -> str:
    """SQL for the normalised form of a VARCHAR expression; empty text where nothing is left."""
    composed = f"nfc_normalize({expression})"
    if rule is Normalise.EXACT:
        return composed
    if rule is Normalise.DIGITS:
        return _digits(expression)
    if rule is Normalise.PHONE:
        digits = _digits(expression)
        return f"CASE WHEN starts_with({digits}, '00') THEN substr({digits}, 3) ELSE {digits} END"
    return _folded(_stripped(composed))


def unit_key(expression: str, salt: bytes) -> str:
    """SQL for the first 8 bytes of SHA-256(salt ‖ UTF-8 of a VARCHAR expression) as a big-endian UBIGINT."""
    literal = "".join(f"\\x{byte:02X}" for byte in salt)
    return f"('0x' || left(sha256('{literal}'::BLOB || encode({expression})), 16))::UBIGINT"


def _digits(expression: str) -> str:
    plain = f"regexp_full_match({expression}, '[0-9]*')"
    return f"CASE WHEN {plain} THEN {expression} ELSE regexp_replace({expression}, '[^0-9]', '', 'g') END"


def _stripped(expression: str) -> str:
    # trim() of a set of characters costs ten times the check that there is nothing to trim.
    first = f"ascii({expression}) BETWEEN 33 AND 126"
    last = f"right({expression}, 1) BETWEEN '!' AND '~'"
    return f"CASE WHEN {first} AND {last} THEN {expression} ELSE trim({expression}, {quoted(SPACES)}) END"


def _folded(expression: str) -> str:
    lowered = f"lower(replace({expression}, 'İ', 'i̇'))"
    folds = lowered
    for character, fold in _special_folds():
        folds = f"replace({folds}, {quoted(character)}, {quoted(fold)})"
    special = quoted("[" + "".join(character for character, _ in _special_folds()) + "]")
    return (
        f"CASE WHEN strlen({expression}) = length({expression}) THEN lower({expression})"
        f" WHEN regexp_matches({lowered}, {special}) THEN nfc_normalize({folds})"
        f" ELSE nfc_normalize({lowered}) END"
    )


@functools.cache
def _special_folds() -> tuple[tuple[str, str], ...]:
    # The lower-case characters that case folding changes further (ß, ς, ligatures, Cherokee): the engine has only lower().
    lower = (character for character in map(chr, range(0x80, _LAST_FOLDED)) if character.lower() == character)
    return tuple((character, character.casefold()) for character in lower if character.casefold() != character)
