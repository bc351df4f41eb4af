"""Secrets have no text form: what holds one says so with `field(repr=False)`, and is no `pickle` and no copy."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex


class Secret:
    """Base of dataclasses that hold keys, shares or the parties' data."""

    __slots__ = ()

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} holds a secret, which is neither pickled nor copied")
