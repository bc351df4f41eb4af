"""Agreements from files, by one name."""

from __future__ import annotations

from pathlib import Path

from parley.agreements import load_signed, load_source
from parley_protocol.agreement import model


class Agreement(model.Agreement):
    """An agreement. `load` gives the one in a file; what it gives is `parley_protocol.agreement.model.Agreement`."""

    __slots__ = ()

    @staticmethod
    def load(path: str | Path) -> model.Agreement:
        """The agreement in a `.parley` file, signed by all its members, or in a YAML file, signed by nobody.

        AgreementError with every problem, its field and line; MalformedError; VerificationError agr-7 where a signature
        is missing.
        """
        path = Path(path)
        return load_source(path) if path.suffix in (".yaml", ".yml") else load_signed(path).verify()
