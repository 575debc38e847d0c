"""Errors as responses, in the form of the OpenAI API: `ApiError`, and `from_validation` for malformed bodies."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from pydantic import ValidationError

from dsmoe_jax.errors import DSMoEError, did_you_mean

_INVALID: Final = "invalid_request_error"
# By status: the `type` of the body. Others: `_INVALID` below 500, "server_error" above.
_TYPES: Final = {429: "rate_limit_error"}
# Fields of several types, by name: what they must be.
_UNIONS: Final = {
    "prompt": "a non-empty string, non-empty token ids, or a list of either",
    "stop": "a non-empty string or a list of at most 64 non-empty strings",
    "content": "a string or a list of text parts",
}


_MAX_ERRORS: Final = 1000


class ApiError(Exception):
    """A response other than success.

    Attributes:
        status: HTTP status.
        message: For people, on one line, without paths of this machine.
        param: Field of the request that is at fault, or None.
        code: For programs, such as "model_not_found", or None.
        headers: Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body of the response."""
        kind = _TYPES.get(self.status, _INVALID if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def internal_error() -> ApiError:
    """Return the error for a bug, whose traceback is in the log alone."""
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; the log of the server has the details")


def timed_out(seconds: float) -> ApiError:
    """Return the error of a request that has reached its deadline."""
    return ApiError(HTTPStatus.GATEWAY_TIMEOUT, f"the request took more than {seconds:g} s", code="timeout")


def shutting_down() -> ApiError:
    """Return the error of requests that a server receives, or does not complete, after a signal."""
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down", code="shutting_down")


@contextlib.contextmanager
def refusals(param: str) -> Iterator[None]:
    """Raise `ApiError` for what the engine or the tokenizer refuses of the field `param`."""
    try:
        yield
    except DSMoEError as error:
        raise from_refusal(error, (), param=param) from None


def from_refusal(error: DSMoEError, fields: Sequence[str], *, param: str | None = None) -> ApiError:
    """Return the response for a value that the engine refuses; the field is the first word of the message."""
    first = re.split(r"\W", str(error), maxsplit=1)[0]
    named = first if first in fields else param
    message = str(error) if named is None or named in str(error) else f"{named}: {error}"
    too_long = "exceed the context_length" in message
    return ApiError(400, message, param=named, code="context_length_exceeded" if too_long else None)


def from_validation(invalid: ValidationError, fields: Sequence[str]) -> ApiError:
    """Return the response for a body that is not as its schema."""
    if (count := invalid.error_count()) > _MAX_ERRORS:  # a list of them takes seconds
        return ApiError(400, f"the body has {count} invalid values")
    error: Any = invalid.errors(include_url=False)[0]
    path: list[Any] = [part for part in error["loc"] if part != "[key]"]
    union = next((at for at, part in enumerate(path) if part in _UNIONS), None)
    if union is not None:
        path = path[: union + 1]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or None
    match error["type"]:
        case "json_invalid":
            reason = error["ctx"]["error"]
            fault = "has a lone surrogate, half of a character" if "hex escape" in reason else "is not valid JSON"
            return ApiError(400, f"the body {fault}: {reason}")
        case "extra_forbidden":
            name = str(path[-1])
            hint = did_you_mean(name, fields) if len(path) == 1 and len(name) < 100 else ""
            message = f"unknown field {_short(name)}{hint}"
        case "none_required" | "too_long" if not error.get("ctx", {}).get("max_length"):
            message = f"{param} is not supported"
        case "missing":
            message = f"{param} is required"
        case _ if union is not None:
            message = f"{param} must be {_UNIONS[path[-1]]}"
        case _:
            message = (
                f"{param or 'the body'}: {error['msg'][:1].lower()}{error['msg'][1:]}, got {_short(error['input'])}"
            )
    return ApiError(400, message, param=None if param is None else param[:100])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
