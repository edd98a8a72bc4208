"""How each error is told over HTTP: status, and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse

from dora_vl.app.answering import Stopped, TooLate, TooManyRequests
from dora_vl.app.request_body import NotJson
from dora_vl.app.request_media import BadRequest, TooLarge
from dora_vl.app.served_model import UnknownModel
from dora_vl.errors import BadSample, UserError


class Refused(UserError):
    """Whoever asks may not, or not for this."""


class NoKey(UserError):
    """The program was started with a key, and the request lacks it."""


@dataclass(frozen=True)
class Problem:
    """How an error is told: its HTTP status and OpenAI's type and code."""

    status: int
    type: str
    code: str | None = None


INVALID = Problem(400, "invalid_request_error")
PROBLEMS: Mapping[type[Exception], Problem] = {
    NoKey: Problem(401, "invalid_request_error", "invalid_api_key"),
    Refused: Problem(403, "invalid_request_error", "refused"),
    UnknownModel: Problem(404, "invalid_request_error", "model_not_found"),
    TooLarge: Problem(413, "invalid_request_error", "too_large"),
    NotJson: Problem(415, "invalid_request_error", "not_json"),
    TooManyRequests: Problem(429, "rate_limit_error", "too_many_requests"),
    Stopped: Problem(503, "server_error", "stopped"),
    TooLate: Problem(504, "server_error", "timeout"),
    BadRequest: INVALID,
    BadSample: INVALID,
    UserError: INVALID,
}
"""The first class that an error is of counts, from the top."""
HEADERS: Mapping[int, Mapping[str, str]] = {
    401: {"WWW-Authenticate": 'Basic realm="dora-vl"'},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}
"""What an answer of a status has besides; a browser asks for the key where this scheme stands alone."""
INTERNAL = Problem(500, "server_error", "internal_error")


def error_response(error: Exception, param: str | None = None) -> JSONResponse:
    """An error as OpenAI's JSON."""
    problem = problem_of(error)
    return JSONResponse(error_content(error, param), status_code=problem.status, headers=HEADERS.get(problem.status))


def problem_of(error: Exception) -> Problem:
    """How an error is told."""
    return next((problem for kind, problem in PROBLEMS.items() if isinstance(error, kind)), INTERNAL)


def error_content(error: Exception, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object; what went wrong inside is in the log alone."""
    problem = problem_of(error)
    message = "the server failed to answer this request" if problem is INTERNAL else str(error)
    if isinstance(error, BadSample):
        message = error.reason
    place = error.place if isinstance(error, BadRequest) else param
    return {"error": {"message": message, "type": problem.type, "param": place, "code": problem.code}}
