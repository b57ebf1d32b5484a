"""The error for a request that cannot be answered as asked: it names the field, so that no client has to guess."""

from llmos_cli.errors import UsageError


class Refused(UsageError):
    """`field` is the request's field in OpenAI's words ("prompt", "max_tokens"), `reason` a stable machine word."""

    def __init__(self, message: str, *, field: str, reason: str = "invalid_value", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.field = field
        self.reason = reason
