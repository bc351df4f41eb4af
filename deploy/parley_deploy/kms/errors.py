"""Errors of KMS: a code of the service and its text, on the wire as AWS writes them."""

from __future__ import annotations


class KmsError(Exception):
    """An answer that is an error: `code` as in AWS's API reference, HTTP status 400 unless KMS itself failed."""

    def __init__(self, code: str, message: str | None = None, *, status: int = 400) -> None:
        super().__init__(message or code)
        self.code = code
        self.message = message
        self.status = status

    def body(self) -> dict[str, str]:
        """The JSON of the answer. Denials spell the field with a capital; what has no text has no field."""
        if self.message is None:
            return {"__type": self.code}
        return {"__type": self.code, "Message" if self.code == "AccessDeniedException" else "message": self.message}


def invalid(message: str) -> KmsError:
    """A parameter that is not as the service's model says."""
    return KmsError("ValidationException", message)


def constraint(value: object, parameter: str, rule: str) -> KmsError:
    """A parameter out of its bounds, in the words of AWS's own validator."""
    return invalid(
        f"1 validation error detected: Value '{value}' at '{parameter}' failed to satisfy constraint: Member must {rule}"
    )


def malformed_policy(message: str) -> KmsError:
    """A key policy that KMS does not take."""
    return KmsError("MalformedPolicyDocumentException", message)
