"""Every error in the shape that OpenAI's clients expect: {"error": {"message", "type", "param", "code"}}."""

import re

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nanochat.common import UserError
from nanochat.server.schemas import UNSUPPORTED

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "internal_error", 503: "service_unavailable_error"}
CODES = {404: "not_found", 405: "method_not_allowed", 500: "internal_error"}
RETRY_AFTER_S = 2
IN_VAIN = frozenset(("timeout", "slow_reader", "engine_error"))  # of a 503: the engine has worked on the request


class ApiError(HTTPException):
    """An answer other than 2xx: the sentence, and for programs a code and the parameter it is about."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None,
                 headers: dict[str, str] | None = None):
        super().__init__(status, message, {**_retry(status, code), **(headers or {})})
        self.code, self.param = code or CODES.get(status), param

    def body(self) -> dict:
        return {"error": {"message": self.detail, "type": TYPES.get(self.status_code, "invalid_request_error"),
                          "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def invalid_request(error: RequestValidationError) -> ApiError:
    """Return the error for the first fault."""
    fault = error.errors()[0]
    path = [str(part) for part in fault["loc"][1:] if _is_field(part)]
    if not path:
        return ApiError(400, "the request body must be a JSON object, sent as Content-Type: application/json",
                        "invalid_body")
    rule, code = fault["msg"][:1].lower() + fault["msg"][1:], "invalid_value"
    if path[0] in UNSUPPORTED:
        rule, code = "must be left out, this server cannot do what it asks", "unsupported_value"
    value = "" if fault["type"] == "missing" else f", got {_short(fault['input'])}"
    return ApiError(400, f"{'.'.join(path)}: {rule}{value}", code, ".".join(path))


def add_error_handlers(app: FastAPI) -> None:
    """Answer with ApiError's shape whatever is raised."""
    def handler(convert):
        async def handle(request: Request, error: Exception) -> JSONResponse:
            return convert(error).response()
        return handle

    app.add_exception_handler(ApiError, handler(lambda error: error))
    app.add_exception_handler(HTTPException, handler(
        lambda error: ApiError(error.status_code, f"the request could not be served: {error.detail}",
                               headers=error.headers)))
    app.add_exception_handler(RequestValidationError, handler(invalid_request))
    app.add_exception_handler(UserError, handler(lambda error: ApiError(400, str(error), "invalid_value")))
    app.add_exception_handler(Exception, handler(lambda error: ApiError(500, "the server made a mistake; see its log")))


def _retry(status: int, code: str | None) -> dict[str, str]:
    """Return the headers that say when to ask again, or not to: OpenAI's client by itself asks thrice on any 503."""
    if status == 503 and code in IN_VAIN:
        return {"x-should-retry": "false"}
    return {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}


def _is_field(part: int | str) -> bool:
    """Say whether a part of a pydantic location is a field's name or an index, not the tag of a union's member."""
    return isinstance(part, int) or bool(re.fullmatch("[a-z_]+", part)) and part not in ("str", "list")


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
